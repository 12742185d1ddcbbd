"""The concrete value of every node, computed without touching data: fake tensors with plain int sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)

from srfx.errors import CaptureError, MissingShapesError
from srfx.ir.fake_run import Survey, _Propagator, quiet_fakes
from srfx.ir.hints import _bind, _from_metadata
from srfx.ir.probing import candidates


def hint_inputs(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    probe: bool = True,
) -> list[Any]:
    """One concrete value per placeholder, to be handed to :func:`propagate`.

    Taken from example inputs when given, else from ``meta["val"]`` (a symbolic size becomes the size it had at
    export, at least 2), else from defaults of optional arguments, else by probing common input shapes.

    Args:
        gm: a captured graph.
        example_inputs: positional arguments as the model takes them.
        example_kwargs: keyword arguments as the model takes them.
        probe: whether to try common shapes when nothing else is known.

    Returns:
        Tensors (real or fake; only shape, dtype and device count) and plain values, in placeholder order.

    Raises:
        CaptureError: the example inputs do not match the graph's signature.
        MissingShapesError: nothing is known and no common shape fits.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if example_inputs is not None or example_kwargs:
        return _bind(gm, placeholders, list(example_inputs or ()), dict(example_kwargs or {}))
    hints = _from_metadata(placeholders)
    if hints is not None:
        return hints
    if not probe:
        raise MissingShapesError("the graph has no shape metadata: pass example_inputs")
    return _probe(gm, placeholders).inputs


def propagate(gm: fx.GraphModule, hints: Sequence[Any] | None = None) -> dict[fx.Node, Any]:
    """The value of every node for the given inputs: FakeTensors with int sizes, ints, tuples, torch.Size ...

    Parameters and buffers are replaced by fake ones, so nothing real is read or written (batch norm in training
    mode updates nothing) and nothing is computed.  User hooks on submodules are not run, unless the shapes do not
    fit without them.  What depends on data is ``UNKNOWN``, and so is all that is computed from it.

    Args:
        gm: a captured graph.
        hints: from :func:`hint_inputs`; None takes them from there.

    Raises:
        CaptureError: an op cannot run on these shapes; the node is named.
        MissingShapesError: hints were not given and nothing fits.

    Cost: about 0.2 ms a node the first time torch meets an op with these shapes, a quarter of it later.
    """
    return survey(gm, hints).values


class SharedHints(list[Any]):
    """Inputs for :func:`propagate` and :func:`survey` that remember the last result, for passes in a row.

    Whoever changes the graph calls :meth:`forget`.
    """

    def __init__(self, known: Survey) -> None:
        super().__init__(known.inputs)
        self.known: Survey | None = known

    def forget(self) -> None:
        """The graph has changed."""
        self.known = None


def survey(gm: fx.GraphModule, hints: Sequence[Any] | None = None) -> Survey:
    """:func:`propagate`, which also says what the inputs were and counts FLOPs; same arguments and errors."""
    if isinstance(hints, SharedHints):
        if hints.known is None:
            hints.known = survey(gm, list(hints))
        return hints.known
    if hints is None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        hints = _from_metadata(placeholders)
        if hints is None:
            return _probe(gm, placeholders)
    try:
        return _Propagator(gm, with_hooks=False).survey(hints)
    except CaptureError:
        if not any(_has_hooks(module) for name, module in gm.named_modules() if name):
            raise
        return _Propagator(gm, with_hooks=True).survey(hints)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _probe(gm: fx.GraphModule, placeholders: Sequence[fx.Node]) -> Survey:
    """Try likely input shapes until the whole graph runs."""
    n_tried = 0
    last: CaptureError | None = None
    for guess in candidates(gm, placeholders):
        n_tried += 1
        with FakeTensorMode(allow_non_fake_inputs=True):
            hints = [value() if callable(value) else value for value in guess]
        try:
            with quiet_fakes():
                return _Propagator(gm, with_hooks=False).survey(hints)
        except CaptureError as error:
            last = error
    names = ", ".join(str(node.target) for node in placeholders)
    raise MissingShapesError(
        f"none of {n_tried} common shapes fits the inputs ({names}): pass example_inputs to say what the model takes"
    ) from last


def is_fake(value: Any) -> bool:
    """Whether a propagated value is a tensor."""
    return isinstance(value, FakeTensor)
