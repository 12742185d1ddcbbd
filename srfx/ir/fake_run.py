"""One run of a graph on fake tensors."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from srfx.errors import CaptureError
from srfx.ir.clone import clone_structure
from srfx.ir.flops import FlopCounter

_UNKNOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


# What an op raises when it is given shapes that do not fit.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Unknown:
    """The value of a node that depends on data, or that torch cannot compute on fake tensors."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = _Unknown()


@dataclass(frozen=True)
class Survey:
    """What one run of a graph on fake tensors tells.

    Attributes:
        inputs: the value given to each placeholder.
        values: the value of each node, see :func:`propagate`.
        flops: floating-point operations of each call node that has any.
    """

    inputs: list[Any]
    values: dict[fx.Node, Any]
    flops: dict[fx.Node, int]


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch from packing padded sequences into nested tensors, whose shapes depend on data."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Shapes that are only tried may not fit: torch is not to log that as an error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


class _Propagator:
    """Runs the graph once on fake tensors, over a fake copy of the modules."""

    def __init__(self, gm: fx.GraphModule, with_hooks: bool) -> None:
        self.gm = gm
        self.with_hooks = with_hooks
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        self.modules: dict[nn.Module, nn.Module] = {}

    def survey(self, hints: Sequence[Any]) -> Survey:
        given = iter(hints)
        with torch.no_grad(), self.mode, plain_attention(), FlopCounter() as counter:
            for node in self.gm.graph.nodes:
                counter.total = 0
                if node.op == "placeholder":
                    self.values[node] = self.fake_input(next(given))
                elif any(self.values[source] is UNKNOWN for source in node.all_input_nodes):
                    self.values[node] = UNKNOWN
                else:
                    self.values[node] = self.step(node)
                if counter.total:
                    self.flops[node] = counter.total
        return Survey(list(hints), self.values, self.flops)

    def step(self, node: fx.Node) -> Any:
        try:
            if node.op == "get_attr":
                return self.fake_attribute(_fetch(self.gm, str(node.target)))
            args, kwargs = self.load(node.args), self.load(node.kwargs)
            if node.op == "output":
                return args[0]
            if node.op == "call_module":
                module = _fetch(self.gm, str(node.target))
                if _returns_its_input_shape(module, args) and not kwargs:
                    return args[0]
                return self.fake_module(module)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except _UNKNOWABLE:
            return UNKNOWN
        except _MISFITS as error:
            if _is_unknowable(error):
                return UNKNOWN
            operands = [self.values[source] for source in node.all_input_nodes]
            shapes = [tuple(v.shape) for v in operands if isinstance(v, torch.Tensor)]
            raise CaptureError(
                f"{node.name} ({node.target}) cannot run on inputs of shape {shapes}: {error}; "
                "pass example_inputs that the model accepts"
            ) from error

    def load(self, value: Any) -> Any:
        """Arguments with nodes replaced by values, in plain lists (a wrapped function may change its list)."""
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, tuple):
            items = [self.load(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [self.load(item) for item in value]
        if isinstance(value, dict):
            return {key: self.load(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.load(value.start), self.load(value.stop), self.load(value.step))
        return value

    def fake_input(self, value: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, self.fresh, value)

    def fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, _strides(tensor), dtype=tensor.dtype, device=tensor.device)

    def fake_attribute(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.fake_tensor(value)
        if isinstance(value, fx.GraphModule):
            return self.fake_module(value)
        return value

    def fake_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.mode.from_tensor(tensor, static_shapes=True)  # one fake per tensor; a Parameter stays one

    def fake_module(self, module: nn.Module) -> nn.Module:
        if module not in self.modules:
            fake = clone_structure(module, self.fake_tensor)
            if not self.with_hooks:
                for part in fake.modules():
                    part._forward_hooks.clear()
                    part._forward_pre_hooks.clear()
            self.modules[module] = fake
        return self.modules[module]


# Shortcut: calls of exactly these modules are half of a convolutional network, and fake tensors run the batch norm
# of each new shape through a slow decomposition.
_POINTWISE = frozenset(
    {nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU}
    | {nn.Identity, nn.Dropout, nn.Dropout2d}
)


_BATCH_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def _returns_its_input_shape(module: nn.Module, args: tuple[Any, ...]) -> bool:
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return False
    if type(module) in _POINTWISE:
        return True
    n_dims = _BATCH_NORMS.get(type(module))  # type: ignore[arg-type]
    if n_dims is None:
        return False
    tensors = [
        t for t in (*module._parameters.values(), module._buffers.get("running_mean")) if t is not None
    ]
    fits = args[0].dim() in n_dims and args[0].shape[1] == module.num_features
    return fits and all(t.device == args[0].device and t.dtype == args[0].dtype for t in tensors)


def _is_unknowable(error: BaseException) -> bool:
    """Fake tensors also say "depends on data" by exceptions of other types, which name the cause."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"GuardOnDataDependentSymNode", "UnsupportedMutationAliasingException"}:
        return True
    return isinstance(error, NotImplementedError) or (
        error.__cause__ is not None and _is_unknowable(error.__cause__)
    )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else tuple([1] * tensor.dim())


def _fetch(root: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(root)
