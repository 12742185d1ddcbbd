"""Turn every form in which a model may be given into one: an owned, plain ``torch.fx.GraphModule``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from srfx.errors import RUN_FAILURES, CaptureError, MissingShapesError
from srfx.ir.attrs import drop_unused_attributes
from srfx.ir.checks import check_graph, check_tensors
from srfx.ir.clone import clone_structure, copy_call_hooks
from srfx.ir.exported import strip_export
from srfx.ir.masks import bake_all
from srfx.ir.shapes import hint_inputs, propagate

# What running the user's forward under a tracer can raise.
_TRACE_FAILURES = (*RUN_FAILURES, ImportError, NameError)


@dataclass(frozen=True)
class Captured:
    """An owned graph and where it came from.

    Attributes:
        graph_module: plain ``fx.GraphModule``; tensors are shared with the user's model, nothing else is.
        inputs: one hint per placeholder (from metadata or example inputs); None when neither was there.
        source: ``"graph"``, ``"exported program"``, ``"symbolic_trace"`` or ``"torch.export"``.
    """

    graph_module: fx.GraphModule
    inputs: list[Any] | None
    source: str


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Captured:
    """Capture a model as a graph that later passes may change freely; the model itself is never changed.

    Accepted: a GraphModule of torch.fx.symbolic_trace; a GraphModule of
    ``torch.export.export(...).module()``, also decomposed; an ExportedProgram; a plain nn.Module, whose masks
    are baked on a clone, then traced by torch.fx.symbolic_trace, and when that fails exported (which needs
    ``example_inputs``).  Wrappers (DataParallel, DistributedDataParallel, torch.compile) are taken off.

    Args:
        model: what to capture, in training or eval mode (both are kept as they are).
        example_inputs: positional arguments (a tensor, or a tuple/list of arguments).
        example_kwargs: keyword arguments.

    Returns:
        The captured graph; dead ``get_attr`` nodes, attributes nobody reads, export guards and metadata
        asserts are gone, torch.no_grad regions are inlined, keyword inputs and structured outputs are as
        before.

    Raises:
        CaptureError: not a module, not traceable, the graph fails lint, or tensors without values.
        UnsupportedModelError: lazy, quantized, sparse or wrapped tensors among parameters and buffers.
    """
    args = _as_args(example_inputs)
    kwargs = dict(example_kwargs or {})
    source = "graph"
    if isinstance(model, ExportedProgram):
        model, source = model.module(), "exported program"
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"expected an nn.Module, a GraphModule or an ExportedProgram, got {type(model).__name__}"
        )
    model = unwrap(model)
    check_tensors(model)
    if isinstance(model, fx.GraphModule):
        check_graph(model)
        gm = clone_structure(model)
        assert isinstance(gm, fx.GraphModule)
    else:
        gm, source = _trace(model, args, kwargs)
    strip_export(gm)
    drop_unused_attributes(gm)
    gm.graph._tracer_cls = None  # export's tracer class is local and cannot be pickled
    gm._tracer_cls = None
    for node in gm.graph.nodes:
        if isinstance(
            node.type, str
        ):  # a postponed annotation: torch 2.13 cannot pickle a graph that has one
            node.type = None
    check_graph(gm)
    gm.recompile()
    try:
        inputs = hint_inputs(gm, args, kwargs, probe=False)
    except MissingShapesError:
        inputs = None
    return Captured(gm, inputs, source)


def _as_args(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule
            inner = model._modules["_orig_mod"]
            assert inner is not None
            model = inner
        else:
            return model


def _trace(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, str]:
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "a TorchScript module has no Python code to trace: give the nn.Module it was made from"
        )
    owned = clone_structure(model)
    bake_all(owned)
    try:
        gm = fx.symbolic_trace(owned)
        check_graph(gm)
        if args is not None or kwargs:  # `if mask is None` on a proxy silently takes the wrong branch
            propagate(gm, hint_inputs(gm, args, kwargs))
    except (*_TRACE_FAILURES, CaptureError) as error:
        return _export(model, args, kwargs, error), "torch.export"
    copy_call_hooks(owned, gm)  # fx calls forward, not __call__: the hooks of the root were not traced
    return gm, "symbolic_trace"


def _export(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any], reason: BaseException
) -> fx.GraphModule:
    if args is None and not kwargs:
        raise CaptureError(
            f"torch.fx.symbolic_trace cannot trace {type(model).__name__} ({_first_line(reason)}): "
            "pass example_inputs, so that torch.export can be used, or give an exported program"
        ) from reason
    failure: BaseException = reason
    for attempt_args, attempt_kwargs, dynamic in _attempts(args or (), kwargs):
        owned = clone_structure(model)  # a failed attempt may leave proxies behind
        bake_all(owned)
        shapes: Any = None
        if dynamic:
            shapes = _dynamic_batch(attempt_args, attempt_kwargs)
        try:
            with torch.no_grad():
                program = torch.export.export(
                    owned, attempt_args, attempt_kwargs, dynamic_shapes=shapes, strict=False
                )
            gm = clone_structure(program.module())
            assert isinstance(gm, fx.GraphModule)
            return gm
        except (*_TRACE_FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
            failure = error
    failure.__context__ = reason
    raise CaptureError(
        f"{type(model).__name__} can be traced neither by torch.fx.symbolic_trace ({_first_line(reason)}) "
        f"nor by torch.export ({_first_line(failure)})"
    ) from failure


def _attempts(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any], bool]]:
    """First with a dynamic batch axis (a batch of 1 is doubled, or export would freeze it), then static."""
    attempts = [(args, kwargs, True), (args, kwargs, False)]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if tensors and all(t.dim() > 0 and t.shape[0] == 1 for t in tensors):
        double = pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]), (args, kwargs))
        attempts.insert(0, (*double, True))
    return attempts


def _dynamic_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shapes = torch.export.ShapesCollection()
    n_marked = 0
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] > 1:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
            n_marked += 1
    return shapes if n_marked else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return inspect.cleandoc(text).splitlines()[0][:200]
