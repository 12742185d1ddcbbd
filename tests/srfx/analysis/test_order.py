"""The order of channels: which sets become slices, and that only free channels move."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from srfx.analysis.order import Wanted, arranged
from srfx.minimize import minimize
from srfx.nn.selection import add_at, select, spread
from tests.helpers import assert_equivalent, check, kill, randomized, shapes


def sets(n: int, *members: tuple[int, ...], costs: tuple[float, ...] = ()) -> list[Wanted]:
    found = []
    for i, m in enumerate(members):
        channels = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(m), True)
        cost = costs[i] if costs else 1.0
        found.append(Wanted(channels, torch.ones(n, dtype=torch.bool), cost))
    return found


def runs(found: list[Wanted]) -> list[int]:
    order = arranged(found)
    assert order is not None
    assert order.sort().values.tolist() == list(range(order.numel()))
    return [s.n_runs(order) for s in found]


def test_two_sets_are_always_slices() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        two = [tuple(torch.randperm(40, generator=g)[:k].tolist()) for k in (25, 11)]
        assert runs(sets(40, *two)) == [1, 1]


def test_a_chain_of_overlapping_sets_in_any_sequence() -> None:
    at = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    chain = [tuple(at[i : i + 4]) for i in (0, 2, 4, 6, 8)]
    assert runs(sets(12, *chain)) == [1] * 5
    assert runs(sets(12, *reversed(chain))) == [1] * 5


def test_nested_and_disjoint_sets() -> None:
    assert runs(sets(9, (0, 2, 4, 6, 8), (2, 6), (1, 5), (0, 2, 6))) == [1, 1, 1, 1]


def test_the_most_expensive_sets_come_first() -> None:
    """Three sets that cross each other in every way: no order makes slices of all."""
    crossing = ((0, 5, 2, 7), (2, 7, 1, 6), (0, 2, 1, 4))
    for costly in range(3):
        costs = tuple(5.0 if i == costly else 1.0 for i in range(3))
        found = runs(sets(8, *crossing, costs=costs))
        assert found[costly] == 1
        assert found.count(1) == 2


def test_what_stands_well_already_keeps_its_order() -> None:
    assert arranged(sets(8, (0, 1, 2), (5, 6))) is None


class Reader(nn.Module):
    """One value, read by linear layers, in ways that ``use`` adds."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(5, 16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        kill(randomized(self).a, columns=range(0, 16, 2))
        kill(self.b, columns=range(5, 14))

    def use(self, y: Tensor) -> Tensor:
        return y * self.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.use(self.front(x).relu())
        return self.a(y), self.b(y)


def selections(gm: fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.target in (torch.index_select, select, torch.narrow)]


def test_readers_take_slices_and_optimizers_follow() -> None:
    model, x = Reader(), torch.randn(3, 5)
    found = check(model, (x,), kept={"a.weight": (16, 8), "b.weight": (16, 7)}, ragged=True)
    small = found["symbolic"].small
    assert selections(small) == [torch.narrow, torch.narrow]
    assert not list(small.named_buffers())


def test_channels_in_heads_stay_in_place() -> None:
    class Heads(Reader):
        def use(self, y: Tensor) -> Tensor:
            return (y.view(-1, 4, 4) * self.scale.view(4, 4)).cumsum(1).flatten(1)

    found = check(Heads(), (torch.randn(3, 5),), routes=("symbolic",), ragged=True)
    assert torch.index_select in selections(found["symbolic"].small)


def test_the_outputs_order_is_the_users() -> None:
    class Shown(Reader):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            y = self.front(x).relu()
            return self.a(y), self.b(y), y

    found = check(Shown(), (torch.randn(3, 5),), routes=("symbolic",), ragged=True)
    assert torch.index_select in selections(found["symbolic"].small)


class Sum(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 16)
        self.head = nn.Linear(16, 4)
        kill(randomized(self).down, rows=(0, 3, 6, 9, 12), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head((x + self.down(self.up(x).tanh())).tanh())
        return y


def test_a_branch_writes_a_slice() -> None:
    x = torch.randn(3, 5).double()
    for bias, target in ((True, add_at), (False, spread)):
        model = Sum(bias).double()
        small = minimize(fx.symbolic_trace(model), x, ragged=True)
        (node,) = (n for n in small.graph.nodes if n.target in (add_at, spread))
        assert node.target is target
        assert node.args[2] == 0 or isinstance(node.args[2], int)
        assert shapes(small)["down.weight"] == (11, 12)
        assert_equivalent(fx.symbolic_trace(model), small, (x,))
        exported = torch.export.export(small, (x,)).module()
        torch.testing.assert_close(exported(x), small(x))
        again = minimize(small, x, ragged=True)
        assert [n.target for n in again.graph.nodes] == [n.target for n in small.graph.nodes]
        kill(small.get_submodule("down"), rows=(2,), bias=True)
        more = minimize(small, x, ragged=True)
        assert shapes(more)["down.weight"] == (10, 12)
        torch.testing.assert_close(more(x), small(x))


def test_selecting_along_the_last_axis_of_a_large_tensor() -> None:
    x, index = torch.randn(2, 3, 7, 9), torch.tensor([8, 0, 3], dtype=torch.int32)
    for value in (x, x.transpose(1, 2), x[..., ::1][:, :2]):
        assert torch.equal(select(value, -1, index), value.index_select(-1, index))
    assert torch.equal(select(x, -3, index[1:2]), x.index_select(-3, index[1:2]))


def test_spreads_and_sums_at_a_number() -> None:
    x, y, template = torch.randn(2, 7, 3), torch.randn(2, 4, 3), torch.randn(7)
    template[2:6] = 0
    at = torch.arange(2, 6)
    assert torch.equal(spread(y, -2, 2, 7, template), spread(y, -2, at, 7, template))
    assert torch.equal(spread(y, -2, 2, 7), spread(y, -2, at, 7))
    assert torch.equal(add_at(x, -2, 2, y), add_at(x, -2, at, y))
    compiled = torch.func.vmap(lambda v: spread(v, -1, 1, 9, torch.arange(9.0)))(y)
    assert compiled.shape == (2, 4, 9)
