"""The main entry: `minimize`, the pipeline in reading order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from srfx.analysis.generic_inputs import generic_survey
from srfx.errors import CaptureError, VerificationError
from srfx.ir.capture import capture
from srfx.ir.effects import changes_itself
from srfx.ir.fake_run import UNKNOWN, Survey
from srfx.ir.own import own_tensors, storages
from srfx.ir.shapes import SharedHints, survey
from srfx.ir.short_paths import shorten_paths
from srfx.ir.surroundings import on_cpu, plain_torch
from srfx.ir.timing import is_faster, turns_s
from srfx.passes import (
    PASSES,
    HintedPass,
    MachineCosts,
    Pass,
    Pipeline,
    PipelineResult,
    get_pass,
    machine_costs,
)
from srfx.passes._costed import CostedPass
from srfx.passes.compact_channels import CompactChannels
from srfx.passes.group_heads import GroupHeadsPass
from srfx.passes.move_templates import add_narrow_summands
from srfx.passes.ragged_reads_writes import RaggedReadsWrites
from srfx.passes.restore_in_place import RestoreInPlacePass
from srfx.record.attach import attach, record_of, remembered_inputs
from srfx.record.recorder import Recorder
from srfx.verify import first_batch
from srfx.verify import verify as run_verification

CANONICALISE = (
    "bake-masks",
    "decompose-attention",
    "decompose-recurrent",
    "functionalize",
    "lower-einsum",
    "open-tuples",
    "fold-parameter-math",
    "drop-noops",
    "split-parameters",
    "raise-linear",
    "raise-norms",
    "raise-softmax",
    "split-fused-projections",
    "repeat-to-index-select",
    "raise-channel-shuffle",
)
"""Passes that bring a captured graph into the form the analyses read, in this order."""

MAX_ROUNDS = 100
"""How often `compact` cuts; two or three rounds are usual."""

FASTER = 0.97
"""What share of the aligned result's time a ragged one may take to be kept by ``ragged="auto"``: least times, and median."""


def minimize(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
    ragged: bool | Literal["auto"] | MachineCosts = False,
    verify: bool = False,
) -> fx.GraphModule:
    """Rewrite a network whose weights contain zeros into a smaller dense one that computes the same.

    Every channel that nothing needs is cut out of every tensor: channels that no reader takes in, and
    channels that are one constant for every input, whose effect is folded into the biases of their readers.

    Args:
        model: a GraphModule of torch.fx.symbolic_trace or of ``torch.export.export(...).module()``, an
            ExportedProgram, or a plain nn.Module (traced here, exported when it cannot be traced).  Masks may
            be zeros in the weights, torch.nn.utils.prune, parametrizations or sparsifiers.  It is not
            changed.
        example_inputs: positional arguments (a tensor, or a tuple of arguments); needed only when the graph
            has no shape metadata and no common input shape fits.  Only shapes and dtypes count, unless
            ``verify``.
        example_kwargs: keyword arguments.
        multiple_of: keep the number of channels of every tensor a multiple of this where there are enough
            channels, by keeping some dead ones; inputs and outputs stay as they are.
        ragged: let each layer read only those channels of a shared value that it needs, and bring only those
            to a sum that it computes, through index buffers; no kept weight then has a row or column of zeros.
            The result is smaller, and not always faster (docs/ragged.md).  "auto": only where that is predicted to
            save time for inputs like the examples; the costs of the machine are measured once and cached, and the
            result is kept only if it is measured to be faster than the one without, by 3 %.  A `srfx.MachineCosts`: by
            these costs, and nothing is measured, so that the same result comes out on every machine.
        verify: run both models on the examples, or on generated inputs, and compare (see `srfx.verify`).

    Returns:
        A GraphModule with tensors of its own: same inputs, same outputs, same names of parameters and
        modules, same training flag.  It trains, deep-copies, pickles, compiles and exports like any other;
        minimized again it stays as it is.  ``srfx.report`` and ``srfx.plan`` say what was done.

    Raises:
        CaptureError: the model cannot be turned into a graph.
        MissingShapesError: pass ``example_inputs``.
        UnsupportedModelError: lazy, quantized or sparse parameters.
        VerificationError: ``verify`` found a difference; it names the numbers.
        ValueError: ``multiple_of`` is less than 1, or ``ragged`` is none of its values.
        AssertionError: the result is wrong (a bug of srfx).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:].zero_()       # six of the eight hidden channels are constant
        >>> minimize(net, torch.randn(1, 4)).get_submodule("0").weight.shape
        torch.Size([2, 4])

    Cost: a few passes over the weights and about 2 ms per node of the graph; memory for the kept weights.
    """
    if not (isinstance(ragged, (bool, MachineCosts)) or ragged == "auto"):
        raise ValueError(f'ragged is True, False, "auto" or a srfx.MachineCosts; got {ragged!r}')
    if multiple_of < 1:
        raise ValueError(f"multiple_of is a count of channels, at least 1; got {multiple_of}")
    if isinstance(model, ExportedProgram):
        model = model.module()
    with plain_torch():
        if isinstance(ragged, str):
            small = _faster(model, example_inputs, example_kwargs, multiple_of)
        else:
            small = _minimize(model, example_inputs, example_kwargs, multiple_of, ragged)
    if verify:
        check_result(model, small, example_inputs, example_kwargs)
    return small


def _minimize(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    multiple_of: int,
    ragged: bool | MachineCosts,
) -> fx.GraphModule:
    captured = capture(model, example_inputs, example_kwargs)
    gm = captured.graph_module
    given = survey(gm, captured.inputs if captured.inputs is not None else remembered_inputs(model, gm))
    before = generic_survey(gm, given)

    hints = SharedHints(before)
    done = canonicalise(gm, hints)
    canonical = survey(gm, hints)
    assert_same_interface(before, canonical)
    options: dict[str, Any] = {"multiple_of": multiple_of}
    if ragged:
        options["ragged"] = True if ragged is True else "auto"
    recorder = Recorder(gm, _at(gm, given, before, canonical), model, options)
    for name, refusal in done.refusals:
        recorder.refusals(name, [refusal])

    timing: dict[str, float] = {}
    after = compact(
        gm, hints, multiple_of, ragged, recorder, timing, None if before is given else given.inputs
    )
    assert_same_interface(before, after)
    forget_shapes(canonical, after)
    record = recorder.record(gm, _at(gm, given, before, after))
    record.timing = timing
    gm = own_tensors(RestoreInPlacePass()(gm).graph_module, storages([model]))
    shorten_paths(gm)
    attach(gm, record)
    return gm


def _faster(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None, multiple_of: int
) -> fx.GraphModule:
    """The ragged result where it is predicted and measured to be as fast as the aligned one, else that one."""
    device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "cpu")
    ragged = _minimize(model, example_inputs, example_kwargs, multiple_of, machine_costs(device))
    record = record_of(ragged)
    assert record is not None
    if not record.timing or changes_itself(ragged):
        return ragged
    aligned = _minimize(model, example_inputs, example_kwargs, multiple_of, False)
    has_values = _have_values(example_inputs, example_kwargs)
    args, kwargs = first_batch(ragged, example_inputs, example_kwargs) if has_values else first_batch(ragged)
    with torch.no_grad(), torch.random.fork_rng():
        runs = [lambda: aligned(*args, **kwargs), lambda: ragged(*args, **kwargs)]
        turns = turns_s(runs, device, n_rounds=40)
    times = [min(t) for t in zip(*turns, strict=True)]
    is_ragged = is_faster(turns, FASTER)
    small = ragged if is_ragged else aligned
    kept = record_of(small)
    assert kept is not None
    measured = {"aligned_ms": 1e3 * times[0], "ragged_ms": 1e3 * times[1], "is_ragged": float(is_ragged)}
    kept.timing = {**record.timing, **measured}
    return small


def _at(gm: fx.GraphModule, given: Survey, before: Survey, now: Survey) -> Survey:
    """The survey at the user's sizes, for numbers that depend on them; ``now`` is the one at the sizes analysed."""
    return now if before is given else survey_result(gm, given.inputs)


def compact(
    gm: fx.GraphModule,
    hints: SharedHints,
    multiple_of: int,
    ragged: bool | MachineCosts,
    recorder: Recorder,
    timing: dict[str, float],
    examples: list[Any] | None = None,
) -> Survey:
    """Cut until another round finds nothing: what is left of one cut may allow the next (theory: Lemma V5).

    Args:
        gm: a canonical graph that the caller owns.
        hints: one value for each placeholder.
        multiple_of: see `minimize`.
        ragged: see `minimize`; the costs of a machine open what pays there.
        recorder: told of every round.
        timing: gets the time that the opened ports are predicted to save.
        examples: inputs to predict times for; None for ``hints``.

    Returns:
        The survey of the result.
    """
    with on_cpu():
        for _ in range(MAX_ROUNDS):  # each round is exact: to stop early costs channels, not the answer
            is_opened = False
            if ragged:
                machine = ragged if isinstance(ragged, MachineCosts) else None
                grouping = GroupHeadsPass(hints, multiple_of, machine, examples)
                is_opened = _opens(gm, grouping, hints, recorder, timing)
                recorder.moves(grouping.widened, grouping.copied)
                shapes = _shapes(gm, examples) if machine is not None and examples is not None else None
                step = RaggedReadsWrites(hints, multiple_of, machine, shapes)
                is_opened |= _opens(gm, step, hints, recorder, timing)
            found = survey_result(gm, hints)
            cut = CompactChannels(hints, multiple_of, found.values)
            edits = cut(gm).edits
            assert cut.facts is not None
            recorder.compaction(cut.name, edits, cut.facts)
            if not edits and not is_opened:
                break
            hints.forget()
            canonicalise(gm, hints)  # a table that was cut for each head is computed once
        if ragged:
            add_narrow_summands(gm, hints, hints.forget)
    return survey_result(gm, hints)


def _opens(
    gm: fx.GraphModule,
    step: CostedPass,
    hints: SharedHints,
    recorder: Recorder,
    timing: dict[str, float],
) -> bool:
    """Let a pass set readers free to keep channels of their own; whether it found any."""
    opened = step(gm)
    recorder.refusals(step.name, opened.refusals)
    if opened.modified:
        hints.forget()
        if step.machine is not None:
            timing["predicted_saving_ms"] = timing.get("predicted_saving_ms", 0.0) + 1e3 * step.predicted_s
    return opened.modified


def _shapes(gm: fx.GraphModule, inputs: list[Any]) -> dict[str, tuple[int, ...]]:
    values = survey_result(gm, inputs).values
    return {n.name: tuple(v.shape) for n, v in values.items() if isinstance(v, Tensor)}


def canonicalise(gm: fx.GraphModule, hints: Sequence[Any] | None = None) -> PipelineResult:
    """Run the passes of `CANONICALISE` to their common fixpoint, on a graph that the caller owns.

    Args:
        gm: a captured graph.
        hints: one example or fake value for each placeholder, for the passes that need shapes.
    """
    on_change = hints.forget if isinstance(hints, SharedHints) else None
    return Pipeline(_canonical_passes(hints), on_change=on_change).settle(gm)


def _canonical_passes(hints: Sequence[Any] | None) -> list[Pass]:
    hinted = {name for name in CANONICALISE if issubclass(PASSES[name], HintedPass)}
    return [get_pass(name, hints=hints) if name in hinted else get_pass(name) for name in CANONICALISE]


def default_passes(example_inputs: Any = None, *, multiple_of: int = 1) -> list[Pass]:
    """The passes that minimize runs, as instances, to build a pipeline of one's own from.

    Each is a ``torch.fx`` ``PassBase``: hand the list, or a part of it, to torch.fx's ``PassManager`` (with ``steps``
    large enough, as minimize runs every pass to its fixpoint) or to `srfx.passes.Pipeline`.  They change the graph
    module in place, so give them one that you own, captured as you like; minimize works on a clone instead.

    Args:
        example_inputs: one value for each placeholder (a tensor, or a tuple); None reads the graph's metadata, or
            probes common shapes.
        multiple_of: as in `minimize`.

    Example:
        >>> import torch
        >>> from torch import fx, nn
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:].zero_()
        >>> done = PassManager(default_passes(torch.randn(1, 4)), steps=3)(fx.symbolic_trace(net))
        >>> done.graph_module.get_submodule("0").weight.shape
        torch.Size([2, 4])
    """
    hints = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    return [*_canonical_passes(hints), CompactChannels(hints, multiple_of)]


def check_result(
    model: nn.Module, small: fx.GraphModule, args: Any, kwargs: Mapping[str, Any] | None
) -> None:
    """Run both models on the examples, or on generated inputs where there are none with values.

    Raises:
        VerificationError: they disagree.
    """
    has_values = _have_values(args, kwargs)
    found = (
        run_verification(model, small, args, kwargs=kwargs) if has_values else run_verification(model, small)
    )
    if not found.ok:
        raise VerificationError(f"the minimized model computes something else: {found}")


def _have_values(args: Any, kwargs: Mapping[str, Any] | None) -> bool:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def survey_result(gm: fx.GraphModule, inputs: list[Any]) -> Survey:
    """The values of a rewritten graph.

    Raises:
        AssertionError: it does not run on inputs on which the original did; a bug of a pass.
    """
    try:
        return survey(gm, inputs)
    except CaptureError as error:
        raise AssertionError(f"the rewritten graph does not run: {error}") from error


def assert_same_interface(before: Survey, after: Survey) -> None:
    """The result has the outputs of the original: structure, shapes, dtypes.

    Raises:
        AssertionError: it has not; a bug of a pass.
    """
    wanted, got = _output(before), _output(after)
    leaves, spec = pytree.tree_flatten(wanted)
    found, found_spec = pytree.tree_flatten(got)
    assert spec == found_spec, f"outputs were {spec}, are {found_spec}"
    for i, (a, b) in enumerate(zip(leaves, found, strict=True)):
        if a is UNKNOWN or b is UNKNOWN:
            continue
        assert _describe(a) == _describe(b), f"output {i} was {_describe(a)}, is {_describe(b)}"


def _output(found: Survey) -> Any:
    return next(value for node, value in found.values.items() if node.op == "output")


def _describe(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value


def forget_shapes(before: Survey, after: Survey) -> None:
    """Drop metadata that has become wrong: shapes of values that lost channels."""
    for node, value in after.values.items():
        if node.op == "placeholder" or not {"val", "tensor_meta"} & set(node.meta):
            continue
        old = before.values.get(node)
        if pytree.tree_map(_describe, old) != pytree.tree_map(_describe, value):
            for key in ("val", "tensor_meta"):
                node.meta.pop(key, None)
