"""Rewrite passes.  Import them as ``srfx.passes``: a second copy under another name would register twice."""

if __name__ != "srfx.passes":
    raise ImportError(f"this package is srfx.passes, not {__name__!r}: use `import srfx.passes`")

from srfx.passes import (  # noqa: F401
    bake_masks,
    compact_channels,
    decompose_attention,
    decompose_recurrent,
    drop_noops,
    fold_parameter_math,
    functionalize,
    fuse_spreads,
    group_heads,
    lower_einsum,
    move_templates,
    open_tuples,
    ragged_reads_writes,
    raise_channel_shuffle,
    raise_linear,
    raise_norms,
    raise_softmax,
    repeat_to_index_select,
    restore_in_place,
    split_fused_projections,
    split_parameters,
)
from srfx.passes._machine_costs import MachineCosts, machine_costs
from srfx.passes.base import PASSES, HintedPass, Pass, PassResult, get_pass, register_pass
from srfx.passes.pipeline import Pipeline, PipelineResult

__all__ = [
    "PASSES",
    "HintedPass",
    "MachineCosts",
    "Pass",
    "PassResult",
    "Pipeline",
    "PipelineResult",
    "get_pass",
    "machine_costs",
    "register_pass",
]
