"""Every refusal and every error has a test that provokes it, and says what was found, where, and what to do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx import errors
from srfx.ir.plan import Reason
from srfx.passes.compact_channels import CompactChannels
from srfx.testing import probe
from tests.helpers import kill, randomized

ROOT = Path(__file__).parents[2]
TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
CODE = "\n".join(
    path.read_text() for top in ("srfx", "passes") for path in sorted((ROOT / top).rglob("*.py"))
)
ERRORS = [
    name for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__
]


@pytest.mark.parametrize("reason", Reason, ids=lambda r: r.name)
def test_every_reason_is_given_by_the_code_and_by_a_test(reason: Reason) -> None:
    assert re.search(rf"\bReason\.{reason.name}\b", CODE), f"nothing refuses with {reason.name}"
    assert re.search(rf"\bReason\.{reason.name}\b|\"{reason.name}\"", TESTS), (
        f"no test provokes {reason.name}"
    )


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_raised_by_the_code_and_by_a_test(name: str) -> None:
    """A base class may be raised through the classes below it."""
    cls = getattr(errors, name)
    below = [n for n in ERRORS if issubclass(getattr(errors, n), cls)]
    assert any(re.search(rf"\b{n}\(", CODE) for n in below), f"nothing raises {name}"
    assert any(re.search(rf"raises\(\s*\(?[^)]*\b{n}\b", TESTS) for n in below), f"no test provokes {name}"
    assert inspect.getdoc(cls)


def test_every_reason_reads_as_a_sentence() -> None:
    for reason in Reason:
        assert reason.value[0].islower() or reason.value.split()[0].isupper()
        assert not reason.value.endswith(".")


# ---------------------------------------------------------------------- reasons that no other test provokes
def _pins(model: nn.Module, x: Tensor) -> dict[str, set[str]]:
    """Sites of pins, by reason."""
    compact = CompactChannels([x])
    compact.plan(fx.symbolic_trace(model))
    assert compact.facts is not None
    found: dict[str, set[str]] = {}
    for pin in compact.facts.labeller.table.pins:
        found.setdefault(pin.reason, set()).add(pin.site)
    return found


def test_an_output_whose_channels_spread_over_axes_stays() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(5, 6)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.front(x).unflatten(1, (2, 3))

    model = Spread()
    kill(model.front, rows=[1, 4])
    assert _pins(model, torch.randn(4, 5))[Reason.OUTPUT_LAYOUT.name] == {"unflatten"}
    assert srfx.minimize(model, (torch.randn(4, 5),)).get_parameter("front.weight").shape == (6, 5)


def test_a_table_stays_whole_and_its_readers_pick_from_it() -> None:
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(5, 6), nn.Linear(6, 2)
            randomized(self)
            self.register_buffer("table", torch.arange(1.0, 7.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.front(x) * self.table)

    model = Tabled()
    kill(model.back, columns=[1, 4])
    assert Reason.CONSTANT_TABLE.name in _pins(model, torch.randn(4, 5))
    small = srfx.minimize(model, (torch.randn(4, 5),))
    assert small.get_parameter("front.weight").shape == (4, 5)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("softmax", lambda y: torch.softmax(y, -1)),
        ("cumsum", lambda y: torch.cumsum(y, 2)),
        ("avg_pool1d", lambda y: torch.nn.functional.avg_pool1d(y, 3, 1, 1)),
        ("amax", lambda y: y - y.amax(-1, keepdim=True)),
    ],
)
def test_an_axis_whose_channels_an_op_mixes_is_pinned_there(
    name: str, op: Callable[[Tensor], Tensor]
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(5, 6), nn.Linear(6, 2)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(op(self.front(x)))

    model = Mixed()
    kill(model.front, rows=[1, 4])
    x = torch.randn(2, 3, 5)
    assert _pins(model, x)[Reason.CHANNEL_MIXING.name] == {name}
    assert srfx.minimize(model, (x,)).get_parameter("front.weight").shape == (6, 5)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_constant_that_meets_the_border_of_a_grouped_convolution_stays(groups: int) -> None:
    """Each group would need a carrier of its own; the groups keep equally many channels, so one carrier saves none."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ).eval()
    randomized(model)
    dead = list(range(0, 8, 8 // groups))  # the first of each group
    kill(model[0], rows=dead)
    x = torch.randn(2, 3, 8, 8)
    found = probe(model, x)
    assert found.reasons == {Reason.BORDER.name: groups}
    assert [(left.site, left.members[0]) for left in found.leftovers] == [("_2", ("_0", 1, c)) for c in dead]
    assert srfx.minimize(model, x).get_parameter("0.weight").shape == (8, 3, 3, 3)
    model[2].padding = (0, 0)
    assert probe(model, x).reasons == {}
    assert srfx.minimize(model, x).get_parameter("0.weight").shape == (8 - groups, 3, 3, 3)
