"""Replace weights that are computed before each forward pass by parameters that hold the values.

Before: conv.weight_orig, conv.weight_mask and a hook that multiplies them      After: conv.weight
"""

from __future__ import annotations

from torch import fx, nn

from srfx.ir.attrs import get_attr, split_path
from srfx.ir.masks import BakeMask, bake, find_masks
from srfx.ir.plan import Edit, Plan
from srfx.passes.base import Pass, register_pass


@register_pass("bake-masks")
class BakeMasks(Pass):
    """Bake pruning masks, parametrizations, weight norm and spectral norm of the modules a graph calls.

    Masks that appear in the graph itself (exported models, custom modules) are ``fold-parameter-math``'s.
    Hooks that do anything else stay where they are.  The effective weight is computed from its sources, never
    from the ``weight`` attribute a hook left behind, which is stale after an optimizer step; the exception is
    MultiheadAttention's ``out_proj``, which really computes with the stale one.

    Refuses: TRAINING_MODE, when the value changes from call to call.
    Source: torch.nn.utils.prune, torch.nn.utils.parametrize, torch.ao.pruning.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every computed tensor below ``gm``, in tree order."""
        return find_masks(gm)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Bake one; attributes that a ``get_attr`` node reads stay."""
        assert isinstance(edit, BakeMask)
        bake(gm, edit, keep=_read_attributes(gm))


def _read_attributes(gm: fx.GraphModule) -> set[tuple[nn.Module, str]]:
    read = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        parent, name = split_path(str(node.target))
        read.add((get_attr(gm, parent) if parent else gm, name))
    return read
