"""Errors that a user meets: each says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx.cycle.pruners import prune_weights
from srfx.errors import (
    ApplyError,
    CaptureError,
    CycleError,
    MissingShapesError,
    PlanError,
    ShapeMismatchError,
    SrfxError,
    UnknownChannelError,
    UnsavableError,
    UnsupportedModelError,
)
from srfx.files.exported import FreeSize, export_again
from srfx.ir.live import live_tensor
from srfx.ir.plan import Edit, Plan
from srfx.ir.shapes import hint_inputs
from srfx.nn.compensate import compensate_layer_norm
from srfx.passes.base import Pass
from srfx.passes.pipeline import Pipeline
from srfx.record.keep_plan import KeepPlan
from tests.helpers import kill, randomized

X = torch.randn(2, 3)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    kill(randomized(model)[0], rows=(1, 4))
    return model


class Branches(nn.Module):
    """Neither torch.fx nor torch.export follows numbers of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def cycle(**options: Any) -> Any:
    return srfx.SqueezeRelease(network(), lambda *_: None, lambda _: 0.0, example_inputs=(X,), **options)


def small() -> fx.GraphModule:
    return srfx.minimize(network(), X)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no route": (
        lambda: srfx.minimize(Branches(), X), CaptureError,
        r"Branches can be traced neither by torch\.fx\.symbolic_trace \(.+\) nor by torch\.export \(.+\)",
    ),
    "lazy": (
        lambda: srfx.minimize(nn.Sequential(nn.LazyLinear(3)), X), UnsupportedModelError,
        r"0\.weight is not initialised yet \(lazy module\): run the model on a batch",
    ),
    "too few inputs": (
        lambda: srfx.minimize(fx.symbolic_trace(nn.Bilinear(3, 3, 2)), (X,)), CaptureError,
        "example_inputs give no value for input 'input2'",
    ),
    "too many inputs": (
        lambda: srfx.minimize(fx.symbolic_trace(network()), (X, X)), CaptureError,
        r"hold more than the graph takes \(1 inputs\): 1 positional",
    ),
    "an unknown keyword": (
        lambda: srfx.minimize(fx.symbolic_trace(network()), X, example_kwargs={"y": X}), CaptureError,
        r"hold more than the graph takes \(1 inputs\): y",
    ),
    "no shapes": (
        lambda: hint_inputs(fx.symbolic_trace(network()), probe=False), MissingShapesError,
        "no shape metadata: pass example_inputs",
    ),
    "another model's penalty": (
        lambda: live_tensor(network(), "0.weight", (9, 1)), ShapeMismatchError,
        r"0\.weight is \[8, 3\], expected \[9, 'any'\]: make the penalty again",
    ),
    "a plan of what": (
        lambda: srfx.plan(small()).tensor("9.weight"), UnknownChannelError, r"no tensor named '9\.weight'",
    ),
    "no plan": (lambda: KeepPlan.from_json("{"), PlanError, "a plan is a JSON object, this is not"),
    "half a plan": (
        lambda: KeepPlan.from_json('{"version": 1}'), PlanError, "the plan is damaged: 'tensors'",
    ),
    "nothing to apply": (
        lambda: srfx.apply_(network(), fx.symbolic_trace(network())), PlanError,
        r"carries no record: give a result of srfx\.minimize",
    ),
    "an amount": (
        lambda: prune_weights(network(), "global", 1.5), CycleError, r"a share, 0 <= amount < 1; got 1\.5",
    ),
    "a mode": (lambda: cycle(mode="least"), CycleError, "mode is 'max' or 'min', got 'least'"),
    "a phase": (
        lambda: cycle(penalise=("train", "rest")), CycleError, r"'train' and 'squeeze'; got \['rest'\]",
    ),
    "patience": (lambda: cycle(patience=0), CycleError, "cycles >= 0 and patience >= 1, got .* and 0"),
    "a mask of another width": (
        lambda: compensate_layer_norm(nn.LayerNorm(4), torch.ones(5).bool(), torch.zeros(0)), ValueError,
        r"keep is a mask \[5\], the norm sees \[4\] channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_said(name: str) -> None:
    attempt, kind, said = WRONG[name]
    with pytest.raises(kind, match=said) as raised:
        attempt()
    assert issubclass(kind, (SrfxError, ValueError))
    assert not str(raised.value).endswith(".")


class Halves(nn.Module):
    """The batch has to be two."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).reshape(2, 4)


def test_an_export_that_fixes_a_size_that_was_free() -> None:
    with pytest.raises(UnsavableError, match=r"fixed sizes of inputs \[0\] that were free: save as \.srfx"):
        export_again(srfx.minimize(Halves(), X), [{0: FreeSize("batch", 0, None)}])


class Scale(nn.Module):
    """A layer of torch.nn of a later version, say."""

    __module__ = "torch.nn.modules.later"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_layer_that_is_not_known() -> None:
    model = nn.Sequential(nn.Linear(3, 8), Scale(8), nn.Linear(8, 2))
    kill(randomized(model)[0], rows=(1, 4))
    before = model[0].weight.shape
    program = torch.export.export(model, (X,))
    with pytest.raises(ApplyError, match="1: it is not known how to resize a Scale"):
        srfx.apply_(model, srfx.minimize(program))
    assert model[0].weight.shape == before


def test_a_pass_that_never_ends() -> None:
    """Ours to mend: it names the pass."""

    class Restless(Pass):
        name = "restless"

        def plan(self, gm: fx.GraphModule) -> Plan:
            return Plan([Edit("output")])

        def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
            return None

    with pytest.raises(AssertionError, match="pass 'restless' still plans edits after 2 rounds"):
        Pipeline([Restless()], max_rounds=2)(fx.symbolic_trace(network()))
