"""Attention: what of queries, keys, values and heads goes, in every spelling, and what has to stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srfx
from srfx.ir.plan import Reason
from tests.helpers import check, count, kill, masked, randomized, relative_error

C, H, D, T = 20, 4, 6, 5
W = H * D
X = torch.randn(2, T, C)
MEMORY = torch.randn(2, 7, C)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WHOLE = {"q.weight": (W, C), "k.weight": (W, C), "v.weight": (W, C), "o.weight": (C, W)}


def lanes(*which: int, heads: Iterable[int] = range(H)) -> list[int]:
    return [h * D + lane for h in heads for lane in which]


def sdpa(mask: Tensor | None = None, **options: Any) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def eager(mask: Tensor | None = None, scale: float | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(D) if scale is None else scale)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        return scores.softmax(-1) @ v

    return attend


def by_matmul_and_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / D**0.5
    return torch.matmul(F.softmax(scores, dim=-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (t.reshape(-1, t.shape[2], t.shape[3]) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(D**-0.5).softmax(2), v).view(shape[0], H, -1, D)


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[0]
    q, k, v = (t.reshape(-1, t.shape[2], t.shape[3]) for t in (q, k, v))
    zero = torch.zeros(1, 1, 1, dtype=q.dtype)
    return torch.bmm(torch.baddbmm(zero, q, k.transpose(1, 2), alpha=D**-0.5).softmax(-1), v).view(
        n, H, -1, D
    )


SPELLINGS: dict[str, Attend] = {
    "sdpa": sdpa(),
    "eager": eager(),
    "division": by_matmul_and_division,
    "causal": sdpa(is_causal=True),
    "scaled": sdpa(scale=0.3),
    "bool mask": sdpa(torch.ones(T, T).tril().bool()),
    "float mask": sdpa(torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -1e38).double()),
    "eager mask": eager(torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -1e38)),
}


class Attention(nn.Module):
    """o(attend(q(x), k(y), v(y))); ``n_kv`` heads of keys and values, repeated by ``repeat``."""

    def __init__(
        self,
        attend: Attend,
        n_kv: int = H,
        repeat: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(C, W, bias), nn.Linear(W, C, bias)
        self.k, self.v = nn.Linear(C, n_kv * D, bias), nn.Linear(C, n_kv * D, bias)
        self.attend, self.n_kv, self.repeat = attend, n_kv, repeat
        randomized(self)

    def turn(self, t: Tensor) -> Tensor:
        return t

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, x)

    def read(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.turn(self.q(x).view(x.shape[0], -1, H, D).transpose(1, 2))
        k = self.turn(self.k(y).view(x.shape[0], -1, self.n_kv, D).transpose(1, 2))
        v = self.v(y).view(x.shape[0], -1, self.n_kv, D).transpose(1, 2)
        if self.repeat is not None:
            k, v = self.repeat(k), self.repeat(v)
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


def sizes(**changed: int) -> dict[str, tuple[int, ...]]:
    """Shapes with this many lanes of q, k, v and o."""
    rows = {name: (changed.get(name, W), C) for name in "qkv"}
    return {f"{n}.weight": s for n, s in rows.items()} | {"o.weight": (C, changed.get("o", W))}


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("bias", [True, False], ids=["zero", "constant"])
def test_value_lanes(name: str, bias: bool) -> None:
    model = Attention(SPELLINGS[name])
    kill(model.v, lanes(1, 4), bias=bias)
    check(model, (X,), kept=sizes(v=16, o=16))


def test_constant_value_stays_where_a_query_may_see_no_key() -> None:
    mask = torch.ones(T, T).tril().bool()
    mask[2] = False  # torch gives 0 here, not the constant
    model = Attention(sdpa(mask))
    kill(model.v, lanes(1, 4))
    check(model, (X,), kept=WHOLE)
    kill(model.v, lanes(1, 4), bias=True)
    check(model, (X,), kept=sizes(v=16, o=16))


@pytest.mark.parametrize("is_training", [False, True])
def test_constant_value_leaves_where_weights_may_be_dropped_later(is_training: bool) -> None:
    """Dropout that is off drops nothing, as everywhere; that which is on lets only zeros pass."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.back = nn.MultiheadAttention(W, H, dropout=0.5, batch_first=True), nn.Linear(W, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.mha(x, x, x)[0])

    model = randomized(Layer()).double()
    model.mha.in_proj_weight.data[2 * W :][lanes(1, 4)] = 0
    model.train(is_training)
    x = torch.randn(2, T, W).double()
    small = srfx.minimize(model, (x,))
    assert small.get_parameter("mha.v_proj.weight").shape == ((W, W) if is_training else (16, W))
    assert relative_error(model.eval()(x), small.eval()(x)) < 1e-9


def test_constant_value_leaves_under_a_learnt_bias() -> None:
    class Biased(Attention):
        def __init__(self) -> None:
            super().__init__(sdpa())
            self.table = nn.Parameter(torch.randn(H, T, T))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.attend = sdpa(self.table)
            return super().forward(x)

    model = Biased()
    kill(model.v, lanes(1, 4))
    check(model, (X,), kept=sizes(v=16, o=16))
    with torch.no_grad():
        model.table[:, 2] = -torch.inf  # torch gives no number here, and nothing is known
    assert srfx.minimize(model.double(), (X.double(),)).get_parameter("v.weight").shape == (W, C)


def test_constant_value_stays_under_a_mask_that_is_an_input() -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            self.attend = sdpa(mask)
            return super().forward(x)

    mask = torch.ones(2, 1, T, T).bool()
    mask[0, :, 1] = False
    model = Masked(sdpa())
    kill(model.v, lanes(0))
    check(model, (X, mask), kept=WHOLE, reasons={Reason.MASKED})


def test_value_lanes_of_some_heads_only_keep_equally_many() -> None:
    model = Attention(sdpa())
    kill(model.v, [*lanes(0, 1, 2, heads=[0]), *lanes(5, heads=[1, 2, 3])])
    check(model, (X,), kept=sizes(v=20, o=20))


# ---------------------------------------------------------------------- queries and keys
@pytest.mark.parametrize("name", SPELLINGS)
def test_key_that_is_constant_over_keys_shifts_all_scores_alike(name: str) -> None:
    model = Attention(SPELLINGS[name])
    kill(model.k, lanes(0, 3))
    check(model, (X,), kept=sizes(q=16, k=16))


@pytest.mark.parametrize("is_spelled", [True, False])
def test_a_key_that_is_another_constant_at_each_token_stays(is_spelled: bool) -> None:
    class Placed(nn.Module):
        """Keys of two tokens come from one layer, all of whose rows are dead."""

        def __init__(self) -> None:
            super().__init__()
            self.places, self.k = nn.Linear(C, 8), nn.Linear(4, D)
            self.q, self.v, self.o = nn.Linear(C, D), nn.Linear(C, D), nn.Linear(D, C)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            k = self.k(self.places(x[:, 0]).reshape(-1, 2, 4))
            q, v = self.q(x), self.v(x)[:, :2]
            if is_spelled:
                return self.o((q @ k.mT).softmax(-1) @ v)
            return self.o(F.scaled_dot_product_attention(q, k, v))

    model = Placed()
    kill(model.places, range(8))
    check(model, (X,), kept={"q.weight": (D, C)})


@pytest.mark.parametrize("name", SPELLINGS)
def test_query_lanes(name: str) -> None:
    model = Attention(SPELLINGS[name])
    kill(model.q, lanes(0, 3), bias=True)
    check(model, (X,), kept=sizes(q=16, k=16))
    model = Attention(SPELLINGS[name])
    kill(model.q, lanes(0, 3))  # q[d] = b: the score b k[d] differs from key to key
    check(model, (X,), kept=WHOLE)


def test_constant_key_stays_where_scores_are_read_before_softmax() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.tanh(q @ k.transpose(-2, -1) / 3) * 3).softmax(-1) @ v

    model = Attention(capped)
    kill(model.k, lanes(0))
    check(model, (X,), kept=WHOLE)
    kill(model.k, lanes(0), bias=True)
    check(model, (X,), kept=sizes(q=20, k=20))


def test_constant_key_stays_where_softmax_is_over_queries() -> None:
    model = Attention(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-2) @ v)
    kill(model.k, lanes(0))
    check(model, (X,), kept=WHOLE)


def test_constant_value_stays_where_weights_do_not_sum_to_one() -> None:
    model = Attention(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-2) @ v)
    kill(model.v, lanes(0))
    check(model, (X,), kept=WHOLE)


def test_key_and_query_lanes_that_never_meet() -> None:
    model = Attention(sdpa())
    kill(model.k, lanes(0), bias=True)
    kill(model.q, lanes(5), bias=True)
    check(model, (X,), kept=sizes(q=16, k=16))


# ---------------------------------------------------------------------- heads
@pytest.mark.parametrize("name", [*SPELLINGS, "bmm", "baddbmm"])
def test_a_head_nobody_reads(name: str) -> None:
    model = Attention({"bmm": by_bmm, "baddbmm": by_baddbmm}.get(name) or SPELLINGS[name])
    kill(model.o, columns=lanes(*range(D), heads=[1]))
    check(model, (X,), kept=sizes(q=18, k=18, v=18, o=18))


def test_a_head_without_values() -> None:
    model = Attention(sdpa())
    kill(model.v, lanes(*range(D), heads=[3]))
    check(model, (X,), kept=sizes(q=18, k=18, v=18, o=18))


def test_all_heads() -> None:
    model = Attention(sdpa())
    kill(model.v, range(W))
    # nothing varies; one lane of each is left to give the constant output its shape
    check(model, (X,), kept=sizes(q=1, k=1, v=1) | {"o.weight": (1, 1)})


def test_a_head_whose_scores_are_uniform_averages_its_values() -> None:
    """The zero-width case: no lane of q and k is needed, yet the head's mean over keys is."""
    for attend in (sdpa(), eager()):
        model = Attention(attend)
        kill(model.q, range(W), bias=True)
        check(model, (X,), kept={"v.weight": (W, C), "o.weight": (C, W)})


class Cross(Attention):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.read(x, y)


def test_cross_attention() -> None:
    for attend in (sdpa(), eager()):
        model = Cross(attend)
        kill(model.o, columns=lanes(*range(D), heads=[0, 2]))
        kill(model.k, lanes(2))
        check(model, (X, MEMORY), kept=sizes(q=10, k=10, v=12, o=12))


# ---------------------------------------------------------------------- grouped heads
def expanded(n_kv: int) -> Callable[[Tensor], Tensor]:
    def repeat(t: Tensor) -> Tensor:
        n, _, tokens, _ = t.shape
        return t[:, :, None].expand(n, n_kv, H // n_kv, tokens, D).reshape(n, H, tokens, D)

    return repeat


def repeats(n_kv: int) -> dict[str, tuple[Attend, Callable[[Tensor], Tensor] | None]]:
    return {
        "enable_gqa": (sdpa(enable_gqa=True), None),
        "repeat_interleave": (sdpa(), lambda t: t.repeat_interleave(H // n_kv, 1)),
        "expand": (sdpa(), expanded(n_kv)),
        "eager": (eager(), expanded(n_kv)),
    }


@pytest.mark.parametrize("name", repeats(2))
def test_grouped_query_heads(name: str) -> None:
    attend, repeat = repeats(2)[name]
    model = Attention(attend, 2, repeat)
    kill(model.o, columns=lanes(*range(D), heads=[3]))
    kept = {"q.weight": (18, C), "k.weight": (12, C), "v.weight": (12, C), "o.weight": (C, 18)}
    check(model, (X,), kept=kept)
    kill(model.o, columns=lanes(*range(D), heads=[2]))  # now nobody reads the second pair of key and value
    kept = {"q.weight": (12, C), "k.weight": (6, C), "v.weight": (6, C), "o.weight": (C, 12)}
    check(model, (X,), kept=kept)


@pytest.mark.parametrize("name", repeats(1))
def test_multi_query_heads(name: str) -> None:
    attend, repeat = repeats(1)[name]
    model = Attention(attend, 1, repeat)
    kill(model.o, columns=lanes(*range(D), heads=[0]))
    kill(model.k, [2])
    kept = {"q.weight": (15, C), "k.weight": (5, C), "v.weight": (6, C), "o.weight": (C, 18)}
    check(model, (X,), kept=kept)


# ---------------------------------------------------------------------- positions
class Rotary(Attention):
    """Angles of positions on pairs of lanes: halves (j, j + D/2), or neighbours (2j, 2j + 1)."""

    def __init__(self, neighbours: bool, attend: Attend) -> None:
        super().__init__(attend)
        self.neighbours = neighbours
        angles = torch.outer(torch.arange(T).double(), 10.0 ** -torch.arange(D // 2).double())
        wide = angles.repeat_interleave(2, -1) if neighbours else torch.cat([angles, angles], -1)
        self.register_buffer("cos", wide.cos())
        self.register_buffer("sin", wide.sin())

    def turn(self, t: Tensor) -> Tensor:
        if self.neighbours:
            turned = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
        else:
            turned = torch.cat([-t[..., D // 2 :], t[..., : D // 2]], -1)
        return t * self.cos + turned * self.sin


@pytest.mark.parametrize("attend", [sdpa(), eager()], ids=["sdpa", "eager"])
@pytest.mark.parametrize(
    ("neighbours", "pair"), [(False, (0, 3)), (True, (0, 1))], ids=["halves", "neighbours"]
)
def test_rotary_pairs(neighbours: bool, pair: tuple[int, int], attend: Attend) -> None:
    model = Rotary(neighbours, attend)
    kill(model.q, lanes(pair[0]), bias=True)  # the other of the pair still turns into it
    check(model, (X,), kept=WHOLE)
    kill(model.q, lanes(*pair), bias=True)
    check(model, (X,), kept=sizes(q=16, k=16))
    model = Rotary(neighbours, attend)
    kill(model.k, lanes(*pair))  # constant before, but turned by the position it differs from key to key
    check(model, (X,), kept=WHOLE)


class Biased(Attention):
    """A bias for each head on the scores: a learned table, or ALiBi slopes times distances."""

    def __init__(self, alibi: bool, is_mask: bool) -> None:
        super().__init__(sdpa())
        self.is_mask = is_mask
        self.table = nn.Parameter(torch.randn(H, 1, 1) if alibi else torch.randn(H, T, T))
        self.register_buffer("distances", -(torch.arange(T)[:, None] - torch.arange(T)).abs().double())
        self.alibi = alibi
        self.attend = self.biased

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table * self.distances if self.alibi else self.table
        return sdpa(bias)(q, k, v) if self.is_mask else eager(bias)(q, k, v)


@pytest.mark.parametrize("is_mask", [True, False], ids=["sdpa", "eager"])
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "table"])
def test_bias_of_heads_loses_the_heads(alibi: bool, is_mask: bool) -> None:
    model = Biased(alibi, is_mask)
    kill(model.o, columns=lanes(*range(D), heads=[2]))
    kill(model.k, lanes(1))
    small = check(model, (X,), kept=sizes(q=15, k=15, v=18, o=18))["export"].small
    tables = [p.shape[0] for p in small.parameters() if p.dim() == 3]
    assert tables in ([3], [])  # slopes times distances may be stored under another name


def test_relative_positions_looked_up_by_a_constant_index() -> None:
    class Relative(Attention):
        def __init__(self) -> None:
            super().__init__(sdpa())
            self.table = nn.Parameter(torch.randn(2 * T - 1, H))
            self.register_buffer("index", torch.arange(T)[:, None] - torch.arange(T) + T - 1)
            self.attend = self.biased

        def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = self.table[self.index].permute(2, 0, 1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))

    model = Relative()
    kill(model.o, columns=lanes(*range(D), heads=[2]))
    check(model, (X,), kept={**sizes(q=18, k=18, v=18, o=18), "table": (2 * T - 1, 3)})


# ---------------------------------------------------------------------- fused projections
def split_flat(t: Tensor) -> Sequence[Tensor]:
    parts = t.chunk(3, -1)
    return [parts[i].view(t.shape[0], t.shape[1], H, D).transpose(1, 2) for i in range(3)]


def split_by_kind(t: Tensor) -> Sequence[Tensor]:
    return t.reshape(t.shape[0], t.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def split_by_head(t: Tensor) -> Sequence[Tensor]:
    parts = t.view(t.shape[0], t.shape[1], H, 3, D).unbind(3)
    return [parts[i].transpose(1, 2) for i in range(3)]


def split_inside_heads(t: Tensor) -> Sequence[Tensor]:
    parts = t.view(t.shape[0], t.shape[1], H, 3 * D).split(D, -1)
    return [parts[i].transpose(1, 2) for i in range(3)]


ROWS: dict[str, tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[int, int, int], int]]] = {
    "flat": (split_flat, lambda part, h, d: (part * H + h) * D + d),
    "by kind": (split_by_kind, lambda part, h, d: (part * H + h) * D + d),
    "by head": (split_by_head, lambda part, h, d: (h * 3 + part) * D + d),
    "inside heads": (split_inside_heads, lambda part, h, d: (h * 3 + part) * D + d),
}


@pytest.mark.parametrize("name", ROWS)
def test_fused_projection(name: str) -> None:
    split, row = ROWS[name]

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(C, 3 * W), nn.Linear(W, C)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            parts = split(self.qkv(x))
            attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
            return self.o(attended.transpose(1, 2).flatten(2))

    model = Fused()
    kill(model.o, columns=lanes(*range(D), heads=[1]))
    kill(model.qkv, [row(2, h, d) for h in range(H) for d in (0, 5)])  # constant values
    kill(model.qkv, [row(1, h, 3) for h in range(H)])  # constant keys
    q = k = 3 * 5
    v = 3 * 4
    check(model, (X,), parameters=(q + k + v) * (C + 1) + v * C + C)


# ---------------------------------------------------------------------- both spellings, other lengths
@pytest.mark.parametrize("seed", range(4))
def test_eager_gives_the_same_sizes_as_sdpa(seed: int) -> None:
    """Also between one projection in front and one behind, with zeros of every kind."""

    def build(attend: Attend) -> nn.Module:
        inner = Attention(attend)
        model = nn.Sequential(nn.Linear(C, C), nn.GELU(), inner, nn.Linear(C, 7))
        return masked(randomized(model, seed), seed)

    found = [check(build(a), (X,))["export"].small for a in (sdpa(), eager(), by_matmul_and_division)]
    assert len({count(m) for m in found}) == 1


class Block(nn.Module):
    """A causal block with a residual stream and norms in front, as decoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(C), Attention(sdpa(is_causal=True))
        self.norm2, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 37), nn.Linear(37, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.silu(self.up(self.norm2(x))))


def test_any_number_of_tokens() -> None:
    model = nn.Sequential(nn.Linear(11, C), Block(), Block(), nn.LayerNorm(C), nn.Linear(C, 5))
    masked(randomized(model), 1).double()
    n, tokens = torch.export.Dim("n", min=2), torch.export.Dim("tokens", min=2, max=99)
    x = torch.randn(3, 7, 11).double()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: n, 1: tokens},))
    small = srfx.minimize(program)
    assert count(small) < 0.7 * count(model)
    for shape in ((3, 7, 11), (2, 2, 11), (5, 31, 11)):
        given = torch.randn(shape).double()
        assert relative_error(model(given), small(given)) < 1e-9


def test_the_scale_is_that_of_the_original_width() -> None:
    model = Attention(sdpa())
    kill(model.q, lanes(0, 1, 2), bias=True)
    small = check(model, (X,), kept=sizes(q=12, k=12))["symbolic"].small
    (call,) = [n for n in small.graph.nodes if n.target is F.scaled_dot_product_attention]
    assert isinstance(call, fx.Node)
    assert call.kwargs["scale"] == pytest.approx(D**-0.5)


@pytest.mark.parametrize(("keys", "values"), [([0, 1], []), ([], [2, 3, 5])])
def test_a_view_that_relied_on_the_layout_of_equal_widths(keys: list[int], values: list[int]) -> None:
    """torch.export drops ``contiguous`` where the kernel for equal widths lays heads out last; for others it does not."""

    class Viewed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(-1, x.shape[1], H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = torch.tanh(F.scaled_dot_product_attention(q, k, v)).permute(0, 2, 1, 3)
            return self.o(y.contiguous().view(-1, x.shape[1], H * D))

    model = Viewed(sdpa())
    kill(model.q, lanes(*keys), bias=True)
    kill(model.v, lanes(*values), bias=True)
    qk, v = W - H * len(keys), W - H * len(values)
    found = check(model, (X,), kept=sizes(q=qk, k=qk, v=v, o=v))
    graph = found["export"].small.graph
    ((last,),) = [
        [u.target for u in n.users] for n in graph.nodes if n.target is torch.ops.aten.permute.default
    ]
    assert last is torch.ops.aten.reshape.default


def test_where_nothing_is_cut_views_stay() -> None:
    small = check(randomized(Attention(sdpa())), (X,))["export"].small
    assert torch.ops.aten.reshape.default not in {n.target for n in small.graph.nodes}


def test_a_key_lane_of_zeros_that_stays_is_zero() -> None:
    """It stays for its query lane, which another layer reads, and is a product with a bias and a literal that cancel."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(C, C)
            self.q, self.k, self.v, self.gate = (nn.Linear(C, D) for _ in range(4))
            self.o, self.r = nn.Linear(D, C), nn.Linear(D, C)
            randomized(self)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.front(x)
            q, k, v = self.q(x), self.k(x), self.v(x)[:, None]
            y = F.scaled_dot_product_attention(q[:, None], (k * (self.gate(x) + 1.0))[:, None], v)
            return self.o(y[:, 0]), self.r(q + k)

    model = Read()
    kill(model.front, [1])  # a constant for the gate to absorb, so that its bias is written anew
    kill(model.gate, [0])
    with torch.no_grad():
        model.gate.bias[0] = -1.0
    check(model, (X,), kept=dict.fromkeys(("q.weight", "k.weight", "gate.weight"), (D, C - 1)))
