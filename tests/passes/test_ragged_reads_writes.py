"""Ragged reads and writes: what is removed where neighbours disagree, and that the result is the same."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srfx
from srfx.ir.plan import Plan, Reason
from srfx.minimize import minimize
from srfx.nn.selection import spread
from srfx.passes import get_pass
from srfx.passes.ragged_reads_writes import OpenPort, RaggedReadsWrites
from tests.helpers import assert_equivalent, check, kill, randomized, relative_error, shapes


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.front(x).relu()
        return self.a(y), self.b(y)


def two_readers() -> nn.Module:
    model = randomized(TwoReaders())
    kill(model.a, columns=range(6))
    kill(model.b, columns=range(10, 16))
    return model


def test_each_reader_selects() -> None:
    check(two_readers(), (torch.randn(3, 5),), kept={"front.weight": (16, 5), "a.weight": (16, 10), "b.weight": (16, 10)},
          ragged=True)  # fmt: skip
    check(two_readers(), (torch.randn(3, 5),), kept={"a.weight": (16, 16), "b.weight": (16, 16)})


def test_each_expert_reads_through_its_own_index() -> None:
    class Mixture(TwoReaders):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            y = self.front(x).relu()
            share = self.router(y).softmax(-1)
            z: Tensor = share[:, :1] * self.a(y) + share[:, 1:] * self.b(y)
            return z

    model = randomized(Mixture())
    kill(model.a, columns=(0, 3, 5, 7, 9, 12), rows=(1, 4, 5), bias=True)
    kill(model.b, columns=(1, 2, 3, 8, 13, 15), rows=(0, 6, 9), bias=True)
    kept = {"front.weight": (16, 5), "router.weight": (2, 16), "a.weight": (13, 10), "b.weight": (13, 10)}
    check(model, (torch.randn(3, 5),), kept=kept, ragged=True)


def test_input_features_nobody_reads() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 2))
    kill(randomized(model)[0], columns=range(0, 40, 2))
    found = check(model, (torch.randn(3, 40),), kept={"0.weight": (8, 20)}, ragged=True)
    small = found["symbolic"].small
    (index,) = (b for n, b in small.named_buffers() if n.endswith("selected"))
    assert index.dtype == torch.int32
    assert index.tolist() == list(range(1, 40, 2))


def test_features_left_out_later_shorten_the_index_that_is_there() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 2))
    kill(randomized(model)[0], columns=range(0, 40, 2))
    first = minimize(model, torch.randn(3, 40), ragged=True)
    kill(first.get_submodule("0"), columns=[3])  # one column saves 32 bytes; a new index would take 76
    second = minimize(first, torch.randn(3, 40), ragged=True)
    (index,) = (b.tolist() for _, b in second.named_buffers())
    assert index == [i for i in range(1, 40, 2) if i != 7]
    assert len(second.graph.find_nodes(op="call_function", target=torch.index_select)) == 1
    assert shapes(second)["0.weight"] == (8, 19)
    x = torch.randn(3, 40)
    torch.testing.assert_close(second(x), first(x))


def test_a_selection_with_another_reader_stays_beside_the_shorter_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.tensor([5, 19, 2, 0, *range(6, 20)]))
            self.layer = nn.Linear(18, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.index_select(1, self.index)
            return y, self.layer(y)

    model = randomized(Both())
    kill(model.layer, columns=range(2, 18))
    check(model, (torch.randn(3, 20),), kept={"layer.weight": (8, 2)}, ragged=True)


def test_input_planes_nobody_reads() -> None:
    model = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    kill(randomized(model)[0], columns=range(5))
    check(model, (torch.randn(2, 12, 6, 6),), kept={"0.weight": (8, 7, 3, 3)}, ragged=True)


class Residual(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        z: Tensor = self.head((x + y).relu())
        return z


def residual() -> nn.Module:
    model = randomized(Residual())
    kill(model.conv1, columns=range(4))
    kill(model.conv2, rows=range(8, 14))
    return model


def test_branch_writes_its_own_channels() -> None:
    """Rows of the branch that are dead leave a constant (the shift of the norm), which the sum still gets."""
    found = check(residual(), (torch.randn(2, 3, 6, 6),), others=[(torch.randn(1, 3, 7, 5),)], ragged=True,
                  kept={"conv1.weight": (12, 12, 3, 3), "conv2.weight": (10, 12, 3, 3), "bn2.weight": (10,),
                        "stem.weight": (16, 3, 3, 3)})  # fmt: skip
    small = found["symbolic"].small
    assert [n.target for n in small.graph.nodes if n.target is spread] == [spread]
    check(residual(), (torch.randn(2, 3, 6, 6),), kept={"conv2.weight": (16, 12, 3, 3)})


def test_constants_of_a_depthwise_convolution_are_stored() -> None:
    """Padding makes more than a constant of a nonzero constant, so the channel stays, but not what computed it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.deep, self.down = (
                nn.Conv2d(20, 24, 1),
                nn.Conv2d(24, 24, 3, padding=1, groups=24),
                nn.Conv2d(24, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.deep(self.up(x)).relu())
            return y

    model = randomized(Net())
    kill(model.up, rows=range(9))
    kept = {"up.weight": (15, 20, 1, 1), "deep.weight": (24, 1, 3, 3), "down.weight": (4, 24, 1, 1)}
    check(model, (torch.randn(2, 20, 6, 6),), others=[(torch.randn(1, 20, 5, 8),)], kept=kept, ragged=True)


class Embedded(nn.Module):
    def __init__(self, is_tied: bool = False) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(30, 16), nn.Embedding(8, 16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 30, bias=False)
        if is_tied:
            self.head.weight = self.word.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.place(torch.arange(tokens.shape[1]))
        x = x + self.down(self.up(self.norm(x)).relu())
        y: Tensor = self.head(self.last(x))
        return y


def test_columns_of_embeddings_and_readers_of_norms() -> None:
    model = randomized(Embedded())
    with torch.no_grad():
        model.place.weight[:, :10] = 0
    kill(model.up, columns=range(3, 12))
    kill(model.down, rows=range(5))
    kill(model.head, columns=range(8))
    tokens = (torch.randint(0, 30, (2, 8)),)
    kept = {"word.weight": (30, 16), "place.weight": (8, 6), "up.weight": (24, 7), "down.weight": (11, 24),
            "head.weight": (30, 8)}  # fmt: skip
    check(model, tokens, routes=("symbolic",), ragged=True, kept=kept)


def test_a_tied_weight_is_cut_for_both_sites() -> None:
    model = randomized(Embedded(is_tied=True))
    with torch.no_grad():
        model.word.weight[:, :6] = 0
    tokens = (torch.randint(0, 30, (2, 8)),)
    check(model, tokens, kept={"word.weight": (30, 10)}, routes=("symbolic",), ragged=True)


class Attention(nn.Module):
    def __init__(self, width: int = 32, n_heads: int = 4) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).view(x.shape[0], x.shape[1], self.n_heads, -1).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z: Tensor = self.out(y)
        return z


def test_heads_of_unequal_width_are_filled_up_behind_the_projections() -> None:
    """Head 0 has lost 5 of its 8 channels, head 1 has lost 2: no projection computes what only fills a head up."""
    model = randomized(Attention())
    for layer in (model.q, model.k):
        kill(layer, rows=(0, 1, 2, 3, 4, 8, 9), bias=True)
    kill(model.v, rows=(16, 17, 18), bias=True)
    kept = {"q.weight": (25, 32), "k.weight": (25, 32), "v.weight": (29, 32), "out.weight": (32, 29)}
    check(model, (torch.randn(2, 5, 32),), kept=kept, ragged=True)
    check(model, (torch.randn(2, 5, 32),), kept={"q.weight": (32, 32), "v.weight": (32, 32)})


class ConstantQueries(nn.Module):
    """Attention to whose queries no input comes: two heads of four lanes, all one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_reader_of_constants_alone_takes_the_shape_of_one_channel(bias: bool) -> None:
    model = randomized(ConstantQueries())
    kill(model.q, range(8), bias=bias)
    x = torch.randn(2, 3, 5)
    found = check(model, (x,), others=[(torch.randn(4, 6, 5),)], ragged=True)
    small = found["symbolic"].small
    if not bias:
        assert small.get_submodule("q").weight.shape[0] == 1
    again = minimize(small, (x.double(),), ragged=True)
    assert shapes(again) == shapes(small)
    exported = torch.export.export(small, (x.double(),)).module()
    assert torch.allclose(exported(x.double()), model.double()(x.double()))


def test_rows_of_a_view_keep_the_order_of_its_lanes() -> None:
    """Channels in pairs: the pairs are numbered by the view, so that no order of theirs is free."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(5, 12), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.front(x).unflatten(1, (-1, 2)).unbind(2)
            return self.back(torch.nn.functional.hardtanh(a + torch.tanh(b)))

    model = randomized(Pairs())
    kill(model.front, [0, 2, 3, 4, 7])
    check(model, (torch.randn(4, 5),), ragged=True)


def test_an_operand_that_is_written_in_place_is_refused() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.front(x))
            y.diagonal(0, 0, 1).add_(1)  # has no functional form here
            return self.back(y.unsqueeze(1).flatten(1))

    model = randomized(Written())
    kill(model.back, columns=range(6))
    x = torch.randn(4, 5).double()
    small = minimize(model.double(), x, ragged=True)
    assert relative_error(model(x), small(x)) < 1e-9
    assert any(
        r.reason == "MUTATION" and "is written in place" in r.detail for r in srfx.plan(small).refusals
    )


def test_channels_that_a_view_puts_side_by_side_several_times_are_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.front(x).reshape(-1, 12).reshape(-1, 2, 6)
            return y * (1 - y)

    model = randomized(Rows())
    kill(model.front, [0])
    x = torch.randn(2, 4, 5)
    check(model, (x,), others=[(torch.randn(3, 4, 5),)], ragged=True)
    refused = srfx.plan(minimize(model, x.double(), ragged=True)).refusals
    assert any(r.reason == "BLOCK_COUNT" and "has blocks" in r.detail for r in refused)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.attention = nn.Linear(5, 6), nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.front(x)
        return y + self.attention(y, y, y, need_weights=False)[0]


@pytest.mark.parametrize("route", ["export", "decomposed"])
def test_heads_on_the_axis_of_the_batch_are_no_channels_to_select(route: str) -> None:
    """torch.export puts heads and batch into one axis, which is longer where the batch is."""
    model = randomized(Attends())
    with torch.no_grad():
        model.attention.in_proj_weight[[0, 1, 2, 3, 11, 13]] = 0
        model.attention.in_proj_bias[[0, 1, 2, 3, 11, 13]] = 0
    check(model, (torch.randn(2, 4, 5),), others=[(torch.randn(3, 4, 5),)], ragged=True, routes=[route])


def test_spread_of_no_channel() -> None:
    x, nothing, template = torch.randn(2, 3, 1), torch.tensor([], dtype=torch.int32), torch.arange(4.0)
    assert torch.equal(spread(x, -1, nothing, 4, template), template.expand(2, 3, 4))
    assert torch.equal(spread(x, -1, nothing, 4), torch.zeros(2, 3, 4))
    assert torch.equal(spread(x.transpose(1, 2), -2, nothing, 4, template), template[:, None].expand(2, 4, 3))


def test_heads_with_blocks_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = (layer(x).view(-1, 5, 3, 4) for layer in (self.a, self.b))
            y: Tensor = self.out((a + b).flatten(2))
            return y

    model = randomized(Net())
    kill(model.a, rows=(0, 4, 8))
    check(model, (torch.randn(2, 5, 8),), reasons=[Reason.BLOCK_COUNT], routes=("symbolic",), ragged=True)


def test_an_index_that_takes_more_than_it_saves_is_refused() -> None:
    """Where the order of the channels is the user's; else a slice does without an index."""

    class Shown(TwoReaders):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            y = self.front(x).relu()
            return self.a(y), self.b(y), y

    for make, n_read in ((Shown, 16), (TwoReaders, 15)):
        model = randomized(make())
        model.b = nn.Linear(16, 1)
        kill(randomized(model).b, columns=(3,))
        reasons = [Reason.GROWS] if make is Shown else []
        kept = {"b.weight": (1, n_read)}
        found = check(model, (torch.randn(3, 5),), kept=kept, reasons=reasons, ragged=True)
        refused = {r.node for r in found["symbolic"].refusals if r.reason is Reason.GROWS}
        assert ("b" in refused) == (make is Shown)


def test_the_plan_is_data_and_settles() -> None:
    x = torch.randn(2, 3, 6, 6)
    gm = fx.symbolic_trace(residual())
    step = get_pass("ragged-reads-writes", hints=[x])
    before = [n.name for n in gm.graph.nodes]
    plan = step.plan(gm)
    assert [n.name for n in gm.graph.nodes] == before
    assert plan.edits == [OpenPort("conv1", "relu", 1, False), OpenPort("add", "bn2", 1, True)]
    assert plan.edits[0].to_json()["operand"] == "relu"
    assert step.plan(fx.symbolic_trace(randomized(Residual()))).edits == []


def test_more_zeros_after_training() -> None:
    """A ragged model is cut further, and by itself: a second index follows the first."""
    x = torch.randn(3, 5).double()
    model = two_readers().double()
    kill(model.a, columns=(8,))
    small = minimize(fx.symbolic_trace(model), x, ragged=True)
    kill(small.a, columns=range(2))
    again = minimize(small, x, ragged=True)
    assert shapes(again)["a.weight"] == (16, 7)
    assert shapes(again)["b.weight"] == (16, 10)
    assert_equivalent(small, again, (x,))
    assert shapes(minimize(small, x))["a.weight"] == (16, 9)  # a slice keeps what another reader needs


def test_the_result_trains_pickles_and_exports() -> None:
    x = torch.randn(2, 3, 6, 6)
    small = minimize(fx.symbolic_trace(residual()), x, ragged=True)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), small(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))
    exported = torch.export.export(small, (x,)).module()
    assert torch.allclose(exported(x), small(x), atol=1e-6)
    assert shapes(minimize(exported, x)).keys() == shapes(small).keys()
    assert set(srfx.report(small).created) == {n for n, _ in small.named_buffers() if "port" in n}


def test_ragged_is_a_flag() -> None:
    with pytest.raises(ValueError, match="ragged"):
        minimize(two_readers(), torch.randn(3, 5), ragged="yes")  # type: ignore[arg-type]


def test_what_is_opened_is_what_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged beside ports that come to nothing, one of a norm was opened and closed again a hundred times."""

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.norm, self.up, self.down = (
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 12),
                nn.Linear(12, 8),
            )
            self.last, self.back = nn.LayerNorm(8), nn.Linear(8, 3)
            with torch.no_grad():
                self.norm.weight[[1, 3, 5]] = 0
                self.norm.bias.normal_()
                self.down.weight[[2, 4, 5]] = 0

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.front(x)
            z: Tensor = self.back(self.last(y + self.down(F.silu(self.up(self.norm(y))))))
            return z

    rounds, plan = [0], RaggedReadsWrites.plan

    def counted(self: RaggedReadsWrites, gm: fx.GraphModule) -> Plan:
        rounds[0] += 1
        return plan(self, gm)

    monkeypatch.setattr(RaggedReadsWrites, "plan", counted)
    torch.manual_seed(0)
    model, x = PreNorm().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    small = srfx.minimize(fx.symbolic_trace(model), (x,), ragged=True)
    assert rounds[0] <= 4
    assert relative_error(model(x), small(x)) <= 1e-9
