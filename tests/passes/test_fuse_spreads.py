"""Sums with a spread among zeros become add_at, which rules follow."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from srfx.minimize import minimize
from srfx.nn.selection import _gathered, add_at, spread
from srfx.passes import get_pass
from tests.helpers import assert_equivalent, check, kill, randomized, shapes


class Stream(nn.Module):
    """Two blocks on a stream; the second summand of the last one is scaled."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.up = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down[0](self.up[0](x).relu())
        x = torch.add(x, self.down[1](self.up[1](x).relu()), alpha=self.scale)
        y: Tensor = self.head(x.relu())
        return y


def stream(scale: float = 1.0) -> nn.Module:
    model = randomized(Stream(scale))
    for i, down in enumerate(model.down):
        kill(down, rows=range(3 * i, 3 * i + 6), bias=True)
    return model


def targets(gm: fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.target in (spread, add_at)]


def test_a_narrow_summand_is_added_in_place_of_zeros() -> None:
    found = check(stream(), (torch.randn(3, 6),), kept={"down.0.weight": (10, 12), "down.1.weight": (10, 12)},
                  ragged=True, routes=("symbolic",))  # fmt: skip
    assert targets(found["symbolic"].small)[0] is add_at


def test_a_scaled_sum_keeps_its_spread() -> None:
    found = check(
        stream(0.5), (torch.randn(3, 6),), kept={"down.1.weight": (10, 12)}, ragged=True, routes=("symbolic",)
    )
    assert targets(found["symbolic"].small) == [add_at, spread]


def test_constants_keep_their_spread() -> None:
    model = randomized(Stream())
    kill(model.down[0], rows=range(6))
    small = minimize(fx.symbolic_trace(model), torch.randn(3, 6), ragged=True)
    assert targets(small) == [spread]


def test_broadcasting_sums_are_left_alone() -> None:
    def f(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return x + spread(y, -1, index, 5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.tensor([0, 3]))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return f(x, y, self.index)

    gm = fx.symbolic_trace(Net())
    assert get_pass("fuse-spreads", hints=[torch.randn(2, 5), torch.randn(2, 2)]).plan(gm).edits
    assert not get_pass("fuse-spreads", hints=[torch.randn(1, 5), torch.randn(2, 2)]).plan(gm).edits


def test_index_add_is_followed() -> None:
    """More zeros on either side of an add_at leave by the ordinary rules; exported it computes the same."""
    x = torch.randn(3, 6).double()
    small = minimize(fx.symbolic_trace(stream().double()), x, ragged=True)
    kill(small.get_submodule("down.0"), rows=(0, 4), bias=True)
    with torch.no_grad():
        small.get_submodule("head").weight[:, 2] = 0
        for i in range(2):
            small.get_submodule(f"up.{i}").weight[:, 2] = 0
    again = minimize(small, x)
    assert shapes(again)["stem.weight"] == (15, 6)
    assert shapes(again)["down.0.weight"] == (7, 12)  # channel 2 is one that this branch writes
    assert_equivalent(small, again, (x,))
    exported = minimize(torch.export.export(small, (x,)), x)
    assert_equivalent(small, exported, (x,))


def test_a_value_selected_alike_is_selected_once() -> None:
    class Net(nn.Module):
        def __init__(self, is_shown: bool) -> None:
            super().__init__()
            self.front = nn.Linear(5, 16)
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
            self.is_shown = is_shown

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.front(x).relu()
            found = self.a(y), self.b(y), self.c(y)
            return (*found, y) if self.is_shown else found

    for is_shown in (False, True):  # the channels of an output keep their order
        model = randomized(Net(is_shown))
        kill(model.a, columns=range(0, 16, 2))
        kill(model.b, columns=range(0, 16, 2))
        kill(model.c, columns=range(10, 16))
        kept = {"a.weight": (16, 8), "b.weight": (16, 8), "c.weight": (16, 10)}
        found = check(model, (torch.randn(2, 5),), kept=kept, ragged=True, routes=("symbolic",))
        ran = [n.target for n in found["symbolic"].small.graph.nodes if n.op == "call_function"]
        assert ran.count(torch.index_select) == is_shown
        assert ran.count(torch.narrow) == (1 if is_shown else 2)


def test_compiled_spreads_compute_the_same() -> None:
    x, index = torch.randn(2, 3, 4, 4), torch.tensor([4, 0, 2], dtype=torch.int32)
    template = torch.tensor([0.0, 1.5, 0.0, -2.0, 0.0])
    assert torch.equal(_gathered(x, -3, index, 5, template), spread(x, -3, index, 5, template))
    assert torch.equal(_gathered(x, -3, index, 5, None), spread(x, -3, index, 5))
