"""What has to hold of the minimized form of any model; each property is a function that raises AssertionError."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srfx.analysis.why import CARRIER, IMPLIED, RELATED, RESTORED, STATISTIC, STEPS, SUSTAINED
from srfx.ir.plan import Reason
from srfx.minimize import minimize
from srfx.testing.probe import probe

RTOL = 1e-9
BARRIERS = (
    Reason.UNKNOWN_OP, Reason.OPAQUE_HOOK, Reason.TRAINING_MODE, Reason.NON_FINITE, Reason.UNSUPPORTED_DTYPE,
    Reason.UNTRACKED_AXIS, Reason.CHANNEL_MIXING, Reason.NOT_LINEAR_IN_NORM, Reason.OUTPUT_LAYOUT, Reason.MUTATION,
    Reason.DATA_DEPENDENT, Reason.COMPUTED_WEIGHT, Reason.UNRECOGNISED_CALL,
)  # fmt: skip
ROUTES = ("symbolic", "export", "decomposed")

Inputs = Callable[[int], tuple[Any, ...]]


class Skip(Exception):
    """The example says nothing: the model itself is not finite, or cannot be traced this way."""


class OtherNumbers(AssertionError):
    """An output has the right shape, finite values, and others than it should have."""


@dataclass
class Case:
    """A model, its inputs by batch size, and what was found of it so far."""

    model: nn.Module
    inputs: Inputs
    route: str = "symbolic"
    ragged: bool = False
    traced: fx.GraphModule = field(init=False)
    small: fx.GraphModule = field(init=False)

    def __post_init__(self) -> None:
        self.traced = trace(self.model, self.inputs(2), self.route)
        self.small = minimize(self.traced, self.inputs(2), ragged=self.ragged)


def trace(model: nn.Module, inputs: tuple[Any, ...], route: str) -> fx.GraphModule:
    """Trace a model; the exported forms have a dynamic batch.

    Raises:
        Skip: torch cannot export it.
    """
    if route == "symbolic":
        try:
            return fx.symbolic_trace(model)
        except (fx.proxy.TraceError, TypeError) as error:
            raise Skip(f"no trace: {error}") from error
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
            if route == "decomposed":
                program = program.run_decompositions()
            traced = program.module()
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        torch._dynamo.exc.TorchDynamoException,
    ) as error:
        raise Skip(f"no export: {error}") from error
    assert isinstance(traced, fx.GraphModule)
    return traced


def run(model: nn.Module, given: tuple[Any, ...]) -> list[Any]:
    """Leaves of the output of a copy of the model (a norm in training mode changes its statistics)."""
    torch.manual_seed(0)
    with torch.no_grad():
        return pytree.tree_leaves(copy.deepcopy(model)(*copy.deepcopy(given)))


def same_function(case: Case) -> None:
    """Structure, dtypes and values agree, to 1e-9 of the largest entry, at two batch sizes.

    A size at which what torch traced does not run is no example: torch.export may fix the batch, or decompose into
    views that its own strides do not allow.
    """
    for n in (2, 3):
        given = case.inputs(n)
        wanted = run(case.model, given)
        if not all(_is_finite(t) for t in wanted):
            raise Skip("the model is not finite")
        if case.route != "symbolic":
            try:
                run(case.traced, given)
            except (RuntimeError, AssertionError) as error:  # the latter: a guard on sizes
                if n == 2:
                    raise Skip("the traced model does not run") from error
                continue
        found = run(case.small, given)
        try:
            _compare(wanted, found, f"batch of {n}")
        except OtherNumbers:
            if not _is_steady(case.traced, given):
                raise Skip("an output hangs on rounding") from None
            raise


class _Shaken(fx.Interpreter):
    """Every number that is computed is a little off, as another order of summation may have it."""

    def __init__(self, traced: fx.GraphModule, amount: float) -> None:
        super().__init__(copy.deepcopy(traced))
        self.amount = amount

    def run_node(self, n: fx.Node) -> Any:
        """Run, and shake."""
        value = super().run_node(n)
        if n.op.startswith("call") and isinstance(value, Tensor) and value.is_floating_point():
            return value * (1 + self.amount * torch.randn_like(value))
        return value


def _is_steady(traced: fx.GraphModule, given: tuple[Any, ...]) -> bool:
    """Whether rounding alone leaves the outputs of the model as they are: when all numbers are a little off.

    Integers (the largest of some, what is above zero) are asked with 1e-12.  Floats with a few units in the last place:
    a model that makes 1e-9 of those has no better defined result (an RMS norm of what a norm left of a constant).
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for amount, is_asked in ((1e-12, _is_integer), (1e-15, torch.is_floating_point)):
            runs = [
                [
                    t
                    for t in pytree.tree_leaves(_Shaken(traced, amount).run(*copy.deepcopy(given)))
                    if _is(t, is_asked)
                ]
                for _ in range(4)
            ]
            if any(
                difference(a, b) > RTOL for other in runs[1:] for a, b in zip(runs[0], other, strict=True)
            ):
                return False
    return True


def _is(value: Any, is_asked: Callable[[Tensor], bool]) -> bool:
    return isinstance(value, Tensor) and is_asked(value)


def _is_integer(t: Tensor) -> bool:
    return not t.is_floating_point()


def _compare(wanted: Sequence[Any], found: Sequence[Any], what: str) -> None:
    assert len(wanted) == len(found), f"{what}: {len(wanted)} outputs, then {len(found)}"
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if not isinstance(a, Tensor):
            assert a == b, f"{what}, output {i}: {a}, then {b}"
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"{what}, output {i}: {a.shape} {a.dtype}, then {b.shape} {b.dtype}"
        )
        error = difference(a, b)
        if error > RTOL:
            is_finite = bool(b.isfinite().all())
            raise (OtherNumbers if is_finite else AssertionError)(
                f"{what}, output {i}: relative error {error:.1e}"
            )


def difference(wanted: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest entry, or to 1e-3 if all are smaller; inf for other integers."""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(wanted, found) else float("inf")
    if wanted.numel() == 0:
        return 0.0
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-3))


def _is_finite(t: Any) -> bool:
    return not isinstance(t, Tensor) or bool(t.isfinite().all())


def count(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def never_more(case: Case) -> None:
    """The result has no more parameters than the model."""
    assert count(case.small) <= count(case.model), f"{count(case.model)} parameters, then {count(case.small)}"


def idempotent(case: Case) -> None:
    """Minimized again it has the same parameters.

    Of an output that is one constant only a shape is left to compute, by what is left of its layers; a second run
    may find less of them to be enough.  Such models are no examples.
    """
    assert_varies(case)
    again = minimize(case.small, case.inputs(2), ragged=case.ragged)
    assert shapes(again) == shapes(case.small), f"{shapes(case.small)}, then {shapes(again)}"


def assert_varies(case: Case) -> None:
    """Every output depends on the input.

    Raises:
        Skip: one is a constant.
    """
    one, two = run(case.model, case.inputs(2)), run(case.model, case.inputs(3))
    for a, b in zip(one, two, strict=True):
        if (
            isinstance(a, Tensor)
            and a.dim()
            and torch.equal(a[:1], a[1:2])
            and difference(a[:1], b[:1]) < 1e-6
        ):
            raise Skip("an output is constant")


DOCUMENTED = frozenset(
    {"LAST_CHANNEL", RESTORED, CARRIER, STATISTIC, "BLOCK_COUNT", "MULTIPLE_OF", IMPLIED, SUSTAINED}
    | {"SHARED_WEIGHT", "BORDER", "GROWS", "WHOLE", "MASKED", STEPS, RELATED}
    | {reason.name for reason in BARRIERS}
)
"""Reasons for which a class may stay that the probe calls removable; docs/testing.md says why each is one."""


def complete(case: Case) -> Counter[str]:
    """Nothing stays that the probe calls removable, except for documented reasons; how often for each.

    A model with a constant output is no example, as for `idempotent`.
    """
    assert_varies(case)
    found = probe(case.traced, case.inputs(2))
    lost = [str(left) for left in found.leftovers if left.reason not in DOCUMENTED]
    assert not lost, f"{len(lost)} of {found.n_removable} removable classes stay: {lost[0]}"
    return Counter(found.reasons)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the parameters, in order."""
    return sorted(tuple(p.shape) for p in model.parameters())
