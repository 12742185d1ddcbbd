"""Heads of different width: a few groups of one width, each with calls of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn

import srfx
from srfx.ir.plan import Reason
from srfx.minimize import minimize
from srfx.passes._head_costs import MAX_GROUPS, HeadCosts, sort_into_groups
from tests.helpers import check, count, randomized, shapes

D = 16  # lanes of a head
T = 24  # tokens
Widths = Sequence[tuple[int, int]]  # of q and k, and of v, for each head


class Heads(nn.Module):
    """One attention on a residual stream.

    Args:
        n_heads: of the queries.
        n_kv: of keys and values.
        kind: "fused", "rotary", "spelled", "slopes", "masked" or "normed".
    """

    def __init__(
        self, n_heads: int = 6, n_kv: int | None = None, kind: str = "fused", width: int = 24
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.kind = n_heads, n_kv or n_heads, kind
        self.q = nn.Linear(width, n_heads * D)
        self.k, self.v = (nn.Linear(width, self.n_kv * D) for _ in range(2))
        if kind == "fused":
            self.qkv = nn.Linear(width, 3 * n_heads * D)
            del self.q, self.k, self.v
        self.o, self.head = nn.Linear(n_heads * D, width), nn.Linear(width, 3)
        self.q_norm, self.k_norm = (nn.RMSNorm(D) if kind == "normed" else nn.Identity() for _ in range(2))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, n_heads + 1))
        self.register_buffer("angles", torch.outer(torch.arange(1.0 * T), 100 ** -(torch.arange(D / 2) / D)))

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[0], x.shape[1] if self.kind in ("fused", "spelled") else T
        if self.kind == "fused":
            q, k, v = self.qkv(x).view(n, t, 3, self.n_heads, D).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                p(x).view(n, t, h, D).transpose(1, 2)
                for p, h in ((self.q, self.n_heads), (self.k, self.n_kv), (self.v, self.n_kv))
            )
        if self.kind == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        if self.kind == "normed":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.n_kv < self.n_heads:
            k, v = (self.repeated(y) for y in (k, v))
        y = self.attend(q, k, v).transpose(1, 2).reshape(n, t, -1)
        z: Tensor = self.head(torch.tanh(x + self.o(y)))
        return z

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.cat([self.angles, self.angles], -1)
        halves = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
        return x * angles.cos() + halves * angles.sin()

    def repeated(self, x: Tensor) -> Tensor:
        n, h, t, d = x.shape
        times = self.n_heads // self.n_kv
        return x[:, :, None].expand(n, h, times, t, d).reshape(n, h * times, t, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "spelled":
            scores = q @ k.transpose(-2, -1) / D**0.5
            return torch.softmax(scores, -1) @ v
        places = torch.arange(T)
        if self.kind == "slopes":
            mask = self.slopes[:, None, None] * (places[None, None] - places[None, :, None])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.kind == "masked":
            far = (places[:, None] - places[None]).abs() > 6
            mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(far, -torch.inf)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def narrowed(model: Heads, widths: Widths, seed: int = 0) -> Heads:
    """Zero lanes of heads of keys and values, and of the queries that read them, at random, with their biases.

    Rotary lanes go in pairs.
    """
    randomized(model)
    g = torch.Generator().manual_seed(seed)
    times = model.n_heads // model.n_kv
    with torch.no_grad():
        for h, (n_qk, n_v) in enumerate(widths):
            if model.kind == "rotary":
                some = torch.randperm(D // 2, generator=g)[: (D - n_qk) // 2]
                lanes = torch.cat([some, some + D // 2])
            else:
                lanes = torch.randperm(D, generator=g)[: D - n_qk]
            for part, first in (("q", h * times), ("k", h)):
                for head in range(first, first + (times if part == "q" else 1)):
                    _zero(model, part, head * D + lanes)
            _zero(model, "v", h * D + torch.randperm(D, generator=g)[: D - n_v])
    return model


def _zero(model: Heads, part: str, rows: Tensor) -> None:
    layer = model.qkv if model.kind == "fused" else getattr(model, part)
    assert isinstance(layer, nn.Linear)
    if model.kind == "fused":
        rows = rows + "qkv".index(part) * model.n_heads * D
    layer.weight[rows] = 0
    layer.bias[rows] = 0


def tokens(t: int = T, width: int = 24, n: int = 2) -> tuple[Tensor]:
    return (torch.randn(n, t, width, generator=torch.Generator().manual_seed(1)).double(),)


def products(gm: fx.GraphModule) -> list[fx.Node]:
    names = ("scaled_dot_product_attention", "softmax")
    return [n for n in gm.graph.nodes if any(name in str(n.target) for name in names)]


def rows_of(gm: nn.Module, layer: str) -> list[int]:
    """Rows of a projection and of its copies for further groups."""
    return [s[0] for name, s in shapes(gm).items() if name.startswith(layer) and name.endswith("weight")]


@pytest.fixture
def calls_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups pay whatever they save, so that small models have them."""
    monkeypatch.setattr(HeadCosts, "of", classmethod(lambda cls, machine: cls(call_s=1e-9)))


HALF: Widths = [(16, 16), (4, 6), (16, 16), (4, 6), (4, 6), (16, 16)]


@pytest.mark.parametrize(
    ("kind", "q"), [("fused", "qkv_q"), ("rotary", "q"), ("spelled", "q"), ("slopes", "q"), ("masked", "q")]
)
def test_two_groups(calls_are_free: None, kind: str, q: str) -> None:
    """Three heads of 16 lanes and three of 4 (v: 6): two calls, with nothing to fill up, by every route."""
    model = narrowed(Heads(kind=kind), HALF).double()
    other = tokens(T + 9 if kind in ("fused", "spelled") else T, n=3)
    found = check(model, tokens(), others=[other], ragged=True)
    for outcome in found.values():
        small = outcome.small
        assert len(products(small)) == 2
        assert sorted(rows_of(small, q)) == [3 * 4, 3 * 16]
        assert sorted(rows_of(small, q.replace("q", "v") if q == "q" else "qkv_v")) == [3 * 6, 3 * 16]
        assert shapes(small)["o.weight"][1] == 3 * 16 + 3 * 6
        assert not any("spread" in str(n.target) for n in small.graph.nodes)


def test_a_norm_over_the_lanes_of_a_head_is_each_groups_own(calls_are_free: None) -> None:
    model = narrowed(Heads(kind="normed"), [(16, w) for _, w in HALF]).double()
    found = check(model, tokens(), ragged=True)
    for outcome in found.values():
        assert len(products(outcome.small)) == 2
        assert sorted(rows_of(outcome.small, "v")) == [18, 48]
        assert rows_of(outcome.small, "q.") == rows_of(outcome.small, "q_1.") == [48]
        norms = {name for name, _ in outcome.small.named_parameters() if "_norm" in name}
        assert len(norms) == 4


def test_query_heads_stay_with_their_keys(calls_are_free: None) -> None:
    """Four heads of keys and values, two of them narrow, each read by two heads of queries."""
    widths: Widths = [(16, 16), (4, 6), (16, 16), (4, 6)]
    model = narrowed(Heads(8, 4, "rotary"), widths).double()
    found = check(model, tokens(), others=[tokens(n=3)], ragged=True)
    for outcome in found.values():
        small = outcome.small
        assert len(products(small)) == 2
        assert sorted(rows_of(small, "q")) == [16, 64]
        assert sorted(rows_of(small, "k")) == [8, 32]
        assert sorted(rows_of(small, "v")) == [12, 32]


def test_the_scale_is_that_of_the_original_head(calls_are_free: None) -> None:
    small = minimize(narrowed(Heads(), HALF).double(), tokens(), ragged=True)
    wide, narrow = sorted(products(small), key=lambda n: "scale" in n.kwargs)
    assert "scale" not in wide.kwargs
    assert narrow.kwargs["scale"] == 0.25


def test_heads_that_nobody_reads_go_from_every_group(calls_are_free: None) -> None:
    model = narrowed(Heads(), HALF).double()
    with torch.no_grad():
        model.o.weight[:, :D] = 0
        model.o.weight[:, 4 * D : 5 * D] = 0
    found = check(model, tokens(), ragged=True)
    for outcome in found.values():
        assert sorted(rows_of(outcome.small, "qkv_q")) == [2 * 4, 2 * 16]


def test_few_tokens_stay_in_one_call() -> None:
    """Five tokens: a call of its own takes longer than the multiplications by zeros."""
    model = narrowed(Heads(), HALF).double()
    found = check(model, tokens(5), ragged=True, reasons=[Reason.GROWS])
    assert all(len(products(outcome.small)) == 1 for outcome in found.values())
    assert len(products(minimize(model, tokens(512), ragged=True))) == 2
    assert len(products(minimize(model, tokens(512)))) == 1


def test_at_most_four_groups(calls_are_free: None) -> None:
    model = narrowed(Heads(8), [(2 * i, 2 * i) for i in range(1, 9)]).double()
    found = check(model, tokens(), ragged=True)
    for outcome in found.values():
        assert len(products(outcome.small)) == MAX_GROUPS


def test_after_training_a_group_is_sorted_again(calls_are_free: None) -> None:
    small = minimize(narrowed(Heads(), HALF).double(), tokens(), ragged=True)
    name = next(n for n in ("qkv_v", "qkv_v_1") if shapes(small)[f"{n}.weight"][0] == 48)
    layer = small.get_submodule(name)
    with torch.no_grad():
        layer.weight[:9] = 0
        layer.bias[:9] = 0
    again = minimize(small, tokens(), ragged=True)
    assert len(products(again)) == 3
    assert shapes(again)["o.weight"][1] == 7 + 2 * 16 + 3 * 6
    torch.testing.assert_close(again(*tokens()), small(*tokens()), rtol=1e-9, atol=1e-9)


def test_two_attentions_side_by_side(calls_are_free: None) -> None:
    """One projection reads both, joined: each has its groups, and its columns stay its own."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (narrowed(Heads(4), HALF[:4], seed) for seed in (0, 1))
            self.o = randomized(nn.Linear(8 * D + 5, 7))

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            parts = []
            for m in (self.a, self.b):
                q, k, v = m.qkv(x).view(n, t, 3, 4, D).permute(2, 0, 3, 1, 4).unbind(0)
                parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))
            y: Tensor = self.o(torch.cat([parts[0], x[..., :5], parts[1]], -1))
            return y

    found = check(Twice(), tokens(), ragged=True)
    for outcome in found.values():
        assert len(products(outcome.small)) == 3  # five parts would be too many
        assert shapes(outcome.small)["o.weight"][1] == 2 * (2 * 16 + 2 * 6) + 5


def test_a_shared_projection_is_refused(calls_are_free: None) -> None:
    class Tied(Heads):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + self.k(x * 2)[..., :3]
            return y

    model = narrowed(Tied(kind="masked"), HALF).double()
    found = check(model, tokens(), ragged=True, reasons=[Reason.SHARED_WEIGHT])
    assert all(len(products(outcome.small)) == 1 for outcome in found.values())


def test_queries_and_keys_of_one_projection_have_one_in_each_group(calls_are_free: None) -> None:
    model = Heads(kind="masked")
    model.k = model.q
    narrowed(model, [(4, 6) if h % 2 else (16, 16) for h in range(6)])
    with torch.no_grad():  # the lanes of queries and keys are drawn one after the other
        for h in (1, 3, 5):
            _zero(model, "q", h * D + torch.arange(4, D))
    found = check(model, tokens(), routes=("symbolic",), ragged=True)
    small = found["symbolic"].small
    assert len(products(small)) == 2
    assert {n.split(".")[0] for n in shapes(small)} == {"q", "q_1", "v", "v_1", "o", "head"}


def test_a_head_that_others_read_too_is_left(calls_are_free: None) -> None:
    """The keys are an output of the network: no group may have its own."""

    class Cached(Heads):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(q, k, v) * k.mean()

    model = narrowed(Cached(kind="masked"), HALF).double()
    found = check(model, tokens(), ragged=True)
    for outcome in found.values():
        assert count(outcome.small) < count(model)


def test_dropout_follows_the_training_flag(calls_are_free: None) -> None:
    attention = randomized(nn.MultiheadAttention(96, 6, dropout=0.5, batch_first=True)).double()
    with torch.no_grad():
        for part, n_kept in ((0, 4), (1, 4), (2, 6)):
            for h in (1, 3, 4):
                rows = slice(part * 96 + h * D + n_kept, part * 96 + (h + 1) * D)
                attention.in_proj_weight[rows] = 0
                attention.in_proj_bias[rows] = 0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    model = Model().eval()
    x = tokens(T, 96)
    small = minimize(model, x, ragged=True)
    called = [n for n in small.graph.find_nodes(op="call_module") if "q_proj" in str(n.target)]
    assert len(called) == 2
    torch.testing.assert_close(small(*x), model(*x), rtol=1e-9, atol=1e-9)
    small.train()
    assert not torch.equal(small(*x), small(*x))


def test_gradients_and_a_step(calls_are_free: None) -> None:
    model = narrowed(Heads(), HALF).double()
    small, x = minimize(model, tokens(), ragged=True), tokens()
    for m in (model, small):
        m(*x).square().sum().backward()
    kept = srfx.plan(small).kept("o.weight", 1)
    assert kept.numel() == 3 * 16 + 3 * 6
    torch.testing.assert_close(small.get_parameter("o.weight"), model.o.weight[:, kept])
    torch.testing.assert_close(
        small.get_parameter("o.weight").grad, model.o.weight.grad[:, kept], rtol=1e-9, atol=1e-9
    )
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    srfx.plan(small).apply_to_optimizer(optimizer, model, small)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in small.parameters()} <= held
    tensors = list(small.parameters())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_files_reports_and_compilers(calls_are_free: None, tmp_path: Path) -> None:
    small, x = minimize(narrowed(Heads(kind="rotary"), HALF).double(), tokens(), ragged=True), tokens()
    wanted = small(*x)
    srfx.save(small, tmp_path / "small.safetensors")
    assert torch.equal(srfx.load(tmp_path / "small.safetensors")(*x), wanted)
    assert "q_1.weight" in str(srfx.report(small).created)
    assert str(srfx.explain(small, "o", channel=0))
    exported = torch.export.export(small, x)
    torch.testing.assert_close(exported.module()(*x), wanted, rtol=1e-9, atol=1e-12)
    compiled = torch.compile(copy.deepcopy(small), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), wanted, rtol=1e-9, atol=1e-12)


def test_costs_of_a_machine_decide() -> None:
    """A machine on which a call takes a second has one call; one on which it takes nothing has two."""
    model, x = narrowed(Heads(), HALF).double(), tokens(64)
    numbers = dict.fromkeys(srfx.machine_costs().__dataclass_fields__, 1e-10)
    dear, cheap = (srfx.MachineCosts(**{**numbers, "call_s": call_s}) for call_s in (1.0, 0.0))
    assert len(products(minimize(model, x, ragged=dear))) == 1
    small = minimize(model, x, ragged=cheap)
    assert len(products(small)) == 2
    assert srfx.report(small).timing["predicted_saving_ms"] > 0
    torch.testing.assert_close(small(*x), model(*x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- sorting
@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7),
    call_s=st.sampled_from([0.0, 0.5, 3.0, 1e3]),
    room=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_groups_are_a_partition_that_cannot_be_split_further(
    counts: list[tuple[int, int]], call_s: float, room: int
) -> None:
    lanes, each = torch.tensor(counts).t(), [1.0, 0.5]

    def cost(groups: list[list[int]]) -> float:
        found = sum(float(lanes[:, g].amax(1).float() @ torch.tensor(each)) * len(g) for g in groups)
        return found + call_s * len(groups)

    groups = sort_into_groups(lanes, each, call_s, room)
    assert sorted(h for g in groups for h in g) == list(range(len(counts)))
    assert len(groups) <= room
    assert cost(groups) <= cost([list(range(len(counts)))]) + 1e-9
    if len(groups) < room:
        for g in groups:
            assert len(sort_into_groups(lanes[:, g], each, call_s, 2)) == 1


# ---------------------------------------------------------------------- random masks


@given(
    kind=st.sampled_from(["fused", "rotary", "spelled", "slopes", "masked", "normed"]),
    widths=st.lists(
        st.tuples(st.sampled_from([0, 2, 4, 8, 16]), st.sampled_from([0, 3, 8, 16])), min_size=4, max_size=4
    ),
    times=st.sampled_from([1, 2]),
    share=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_heads(kind: str, widths: Widths, times: int, share: float, seed: int) -> None:
    """Exact, settled at once, and not larger than with heads of one width."""
    model = narrowed(Heads(4 * (1 if kind == "fused" else times), 4, kind), widths, seed).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.o.weight *= (torch.rand(model.o.weight.shape, generator=g) >= share).any(0)
        rows = torch.rand(model.o.weight.shape[1], generator=g) < share
        model.o.weight[:, rows] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadCosts, "of", classmethod(lambda cls, machine: cls(call_s=1e-9)))
        found = check(model, tokens(), others=[tokens(n=3)], routes=("symbolic",), ragged=True)
    aligned = minimize(fx.symbolic_trace(model), tokens())
    assert count(found["symbolic"].small) <= count(aligned)
