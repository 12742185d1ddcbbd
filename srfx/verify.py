"""Run two models side by side, in float64 and in the dtype they have, and say how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from srfx.errors import RUN_FAILURES, VerificationError
from srfx.ir.capture import capture
from srfx.ir.double import copy_for_comparison, float64_mode, to_double
from srfx.ir.generate import Spec, generate
from srfx.ir.shapes import hint_inputs
from srfx.ir.surroundings import plain_attention
from srfx.record.attach import record_of
from srfx.record.record import Record, TensorSpec

EXACT = 1e-9
"""Bound on the float64 error of models that hold float64 weights."""


@dataclass(frozen=True)
class Verification:
    """How far two models are apart.

    All errors are the largest difference of an output tensor divided by the largest absolute value of the
    true one, the maximum over outputs and batches; the truth is ``before`` in float64.

    Attributes:
        error: ``after`` in float64.
        native_before: ``before`` in its own dtype: what rounding costs anyway.
        native_after: ``after`` in its own dtype.
        dtype: the lowest float dtype among the weights.
        error_bound: 1e-9 for float64 models; else the folded biases have been rounded to ``dtype``, and the
            error may be 16 eps or ``native_before``, whichever is more (folding rounds once).
        native_bound: 2 times ``native_before`` plus 16 eps.
        n_mismatches: elements of integer and boolean outputs that differ in float64.
        n_batches: how many batches were compared.
        shapes: shapes of the tensors of each batch.
    """

    error: float
    native_before: float
    native_after: float
    dtype: torch.dtype
    error_bound: float
    native_bound: float
    n_mismatches: int
    n_batches: int
    shapes: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def ok(self) -> bool:
        """Whether all errors are within their bounds."""
        within = self.error <= self.error_bound and self.native_after <= self.native_bound  # false for nan
        return within and self.n_mismatches == 0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        lines = [
            "equal" if self.ok else "NOT equal",
            f"float64 error {self.error:.2g} (bound {self.error_bound:.2g})",
            f"{name} error {self.native_after:.2g} (bound {self.native_bound:.2g}; "
            f"the original's own is {self.native_before:.2g})",
        ]
        if self.n_mismatches:
            lines.append(f"{self.n_mismatches} integer or boolean outputs differ")
        lines.append(f"{self.n_batches} batches")
        return ", ".join(lines)


def verify(
    before: nn.Module | ExportedProgram,
    after: nn.Module | ExportedProgram,
    inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Verification:
    """Compare two models that should compute the same; neither is changed.

    Both run on copies, in the mode they are in (a batch norm in training mode uses the batch), but without
    dropout: modules of dropout are switched off, and models that draw random numbers by other means cannot be
    compared.  The fast path of ``nn.TransformerEncoder`` is off: it writes zeros at padded positions, where the
    layers have values whenever gradients are recorded.

    Args:
        before: the original, in any form that `srfx.minimize` takes.
        after: the rewritten one.
        inputs: positional arguments (a tensor or a tuple); without them and ``kwargs`` some are generated,
            two batches of the shapes that ``after`` was made for and a larger one if ``before`` takes it.
        kwargs: keyword arguments.
        seed: of the generated inputs.

    Returns:
        The numbers, see `Verification`.

    Raises:
        VerificationError: the outputs differ in structure, shape or dtype, or ``before`` cannot run on
            generated inputs (pass ``inputs``).

    Example:
        >>> net = nn.Linear(3, 2)
        >>> verify(net, net, torch.randn(4, 3)).ok
        True
        >>> verify(net, nn.Linear(3, 2), torch.randn(4, 3)).ok
        False
    """
    models = [_module(before), _module(after)]
    native = [copy_for_comparison(m, lambda t: t.detach().clone()) for m in models]
    double = [copy_for_comparison(m, to_double) for m in models]
    dtype = _lowest_dtype(models[0])
    worst = _Worst()
    with torch.no_grad(), torch.random.fork_rng(), plain_attention():
        for args, named, is_optional in _batches(models, inputs, kwargs, seed):
            try:
                truth = _run(double[0], args, named, seed, in_double=True)
                wanted = _run(native[0], args, named, seed)
            except RUN_FAILURES as error:
                if is_optional:
                    continue
                if inputs is not None or kwargs:
                    raise
                raise VerificationError(
                    f"the original model cannot run on generated inputs ({error}): pass inputs"
                ) from error
            exact = _run(double[1], args, named, seed, in_double=True)
            worst.add(truth, wanted, exact, _run(native[1], args, named, seed))
            leaves = pytree.tree_leaves((args, named))
            worst.shapes.append(tuple(tuple(t.shape) for t in leaves if isinstance(t, Tensor)))
    return worst.verdict(dtype)


class _Worst:
    """The largest errors so far."""

    def __init__(self) -> None:
        self.error = self.native_before = self.native_after = 0.0
        self.n_mismatches = 0
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def add(self, truth: Any, wanted: Any, exact: Any, got: Any) -> None:
        """One batch: the original and the other in float64 and natively."""
        outputs = [
            [t for t in pytree.tree_leaves(o) if isinstance(t, Tensor)] for o in (truth, wanted, exact, got)
        ]
        if len({len(o) for o in outputs}) > 1:
            raise VerificationError(
                f"the original has {len(outputs[0])} output tensors, the other {len(outputs[2])}"
            )
        for i, (t, w, e, g) in enumerate(zip(*outputs, strict=True)):
            if w.shape != g.shape or w.dtype != g.dtype:
                raise VerificationError(
                    f"output {i} of the original is {list(w.shape)} {w.dtype}, "
                    f"of the other {list(g.shape)} {g.dtype}"
                )
            if not (t.is_floating_point() or t.is_complex()):
                self.n_mismatches += int((t != e).sum())
                continue
            self.error = _max(self.error, relative_error(t, e))
            self.native_before = _max(self.native_before, relative_error(t, w))
            self.native_after = _max(self.native_after, relative_error(t, g))

    def verdict(self, dtype: torch.dtype) -> Verification:
        eps = torch.finfo(dtype).eps
        base = self.native_before if math.isfinite(self.native_before) else 0.0
        return Verification(
            self.error,
            self.native_before,
            self.native_after,
            dtype,
            EXACT if dtype == torch.float64 else max(16 * eps, base),
            2 * base + 16 * eps,
            self.n_mismatches,
            len(self.shapes),
            tuple(self.shapes),
        )


def relative_error(truth: Tensor, other: Tensor) -> float:
    """Largest difference over the largest finite absolute value of the truth (over 1 where that is 0).

    Where the truth is inf or nan the other has to be the same; else the error is inf.
    """
    if truth.numel() == 0:
        return 0.0
    other = other.to(truth.dtype)
    usual = truth.isfinite()
    strange = ~usual
    if bool(strange.any()) and not torch.equal(
        truth[strange].nan_to_num(7.0), other[strange].nan_to_num(7.0)
    ):
        return math.inf
    if not bool(usual.any()):
        return 0.0
    scale = float(truth[usual].abs().max()) or 1.0
    error = float((truth[usual] - other[usual]).abs().max()) / scale
    return error if not math.isnan(error) else math.inf


def _max(a: float, b: float) -> float:
    return a if a >= b else b


# --- models ------------------------------------------------------------------------------------------


def _module(model: nn.Module | ExportedProgram) -> nn.Module:
    if isinstance(model, ExportedProgram):
        return model.module()
    inner = model._modules.get("_orig_mod")  # torch.compile's wrapper
    return inner if inner is not None else model


def _lowest_dtype(model: nn.Module) -> torch.dtype:
    found = [t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int, in_double: bool = False
) -> Any:
    torch.manual_seed(seed)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, dict(kwargs)))
    if not in_double:
        return model(*args, **kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, to_double, (args, kwargs))
    with float64_mode():
        return model(*args, **kwargs)


# --- inputs ------------------------------------------------------------------------------------------

_Batch = tuple[tuple[Any, ...], dict[str, Any], bool]


def _batches(
    models: list[nn.Module], inputs: Any, kwargs: Mapping[str, Any] | None, seed: int
) -> Iterator[_Batch]:
    """Arguments for both models, and whether the original may refuse them."""
    if inputs is not None or kwargs:
        args = () if inputs is None else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        yield args, dict(kwargs or {}), False
        return
    graph, specs = _signature(models)
    generator = torch.Generator().manual_seed(seed)
    for n_more in (0, 0, 1):
        args, kwargs = call_arguments(graph, generate(graph, specs, generator, n_more))
        yield args, kwargs, n_more > 0


def first_batch(
    model: nn.Module, inputs: Any = None, kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to run a model with: those given, or generated ones that fit it."""
    args, found, _ = next(_batches([model], inputs, kwargs, seed=0))
    return args, found


def _signature(models: list[nn.Module]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph whose placeholders tell the calling convention, and what to give them."""
    for model in reversed(models):
        record = record_of(model)
        if record is not None and isinstance(model, fx.GraphModule):
            return model, generated_specs(record)
    captured = capture(models[0])
    graph = captured.graph_module
    hints = captured.inputs if captured.inputs is not None else hint_inputs(graph)
    return graph, pytree.tree_map_only(Tensor, lambda t: Spec(tuple(t.shape), t.dtype, str(t.device)), hints)


def generated_specs(record: Record) -> list[Any]:
    """What to make up for each placeholder of a minimized model."""

    def spec(found: TensorSpec) -> Spec:
        return Spec(found.shape, found.dtype, found.device)

    return [pytree.tree_map_only(TensorSpec, spec, value) for value in record.inputs]


def call_arguments(graph: fx.GraphModule, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that make ``values`` the values of the placeholders."""
    info = getattr(graph.graph._codegen, "pytree_info", None)
    if info is not None:
        tree = pytree.tree_unflatten(values, info.in_spec)
        is_pair = info.in_spec.type is tuple and len(tree) == 2 and isinstance(tree[1], dict)
        return (tuple(tree[0]), dict(tree[1])) if is_pair else (tuple(tree), {})
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), values, strict=True):
        name = str(node.target)
        if name.startswith("**"):
            kwargs.update(value)
        elif name.startswith("*"):
            args += value
        else:
            args.append(value)
    return tuple(args), kwargs
