"""Planted structure in every kind of attention: one dead head, dead lanes of values, queries and keys all go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import check, kill, randomized
from tests.srfx.ops.test_attention import (
    WHOLE,
    Attention,
    C,
    D,
    H,
    Rotary,
    T,
    W,
    X,
    eager,
    expanded,
    lanes,
    sdpa,
    sizes,
)


# ---------------------------------------------------------------------- rotary heads
@pytest.mark.parametrize("neighbours", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("attend", [sdpa(), eager()], ids=["sdpa", "eager"])
def test_dead_head_goes_where_heads_keep_different_pairs(attend: object, neighbours: bool) -> None:
    """A half of the lanes is cut off by a slice: the rule that all heads keep equally many asks only heads that stay."""
    model = Rotary(neighbours, attend)  # type: ignore[arg-type]
    kill(model.o, columns=lanes(*range(D), heads=[0]))
    pairs = [(0, 3), (1, 4), (2, 5)] if not neighbours else [(0, 1), (2, 3), (4, 5)]
    for head, pair in zip((1, 2, 3), pairs, strict=True):
        kill(model.q, lanes(*pair, heads=[head]), bias=True)
    check(model, (X,), kept=sizes(q=12, k=12, v=18, o=18), idempotent=False)


def test_dead_rotary_head_of_a_group() -> None:
    class Grouped(Rotary):
        def __init__(self) -> None:
            super().__init__(False, sdpa())
            self.n_kv, self.repeat = 2, expanded(2)
            self.k, self.v = nn.Linear(20, 2 * D), nn.Linear(20, 2 * D)

    model = Grouped()
    kill(model.o, columns=lanes(*range(D), heads=[3]))
    kill(model.q, lanes(0, 3, heads=[0, 1]), bias=True)  # the pair of key head 0
    kill(model.q, lanes(1, 4, heads=[2]), bias=True)  # the pair of key head 1
    kept = {"q.weight": (12, 20), "k.weight": (8, 20), "v.weight": (12, 20), "o.weight": (20, 18)}
    check(model, (X,), kept=kept, idempotent=False)


# ---------------------------------------------------------------------- slopes made from literals
class Slopes(Attention):
    """ALiBi as BLOOM, MPT and Falcon build it: slopes are powers of a literal, distances are an arange."""

    def __init__(self, spelling: str) -> None:
        super().__init__(sdpa())
        self.spelling = spelling
        self.attend = self.biased

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.pow(torch.full((), 0.5, dtype=q.dtype), torch.arange(1, H + 1))
        bias = slopes[:, None, None] * torch.arange(T)
        if self.spelling == "mask":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        if self.spelling == "sum":
            return ((q @ k.transpose(-2, -1)) * D**-0.5 + bias).softmax(-1) @ v
        n = q.shape[0]  # heads and batch in one axis
        q, k, v = (t.reshape(n * H, T, D) for t in (q, k, v))
        scores = torch.baddbmm(bias.repeat(n, 1, 1), q, k.transpose(-1, -2), beta=1.0, alpha=D**-0.5)
        return torch.bmm(scores.view(n, H, T, T).softmax(-1).view(n * H, T, T), v).view(n, H, T, D)


@pytest.mark.parametrize("spelling", ["mask", "sum", "merged"])
def test_slopes_lose_the_dead_head(spelling: str) -> None:
    model = Slopes(spelling)
    kill(model.o, columns=lanes(*range(D), heads=[1]))
    kill(model.v, lanes(2), bias=True)
    kill(model.q, lanes(4), bias=True)
    kept = sizes(q=15, k=15, v=15, o=15)
    check(model, (X,), kept=kept, idempotent=spelling != "sum")  # slopes that were picked from go later


# ---------------------------------------------------------------------- norms of queries and keys
def by_normalize(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1)


def by_norm(t: Tensor) -> Tensor:
    return t / t.norm(dim=-1, keepdim=True).clamp_min(1e-9).expand_as(t)


def by_vector_norm(t: Tensor) -> Tensor:
    return t / (torch.linalg.vector_norm(t, ord=2, dim=-1, keepdim=True) + 1e-9)


def by_mean_of_squares(t: Tensor) -> Tensor:
    return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6)


def by_sum_of_squares(t: Tensor) -> Tensor:
    return t / (t * t).sum(-1, keepdim=True).sqrt().add(1e-9)


class Normed(Attention):
    """Cosine attention (Swin V2), norms of queries and keys for each head (Qwen3, ViT-22B, OLMo)."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__(sdpa(scale=0.7))
        self.norm = norm

    def turn(self, t: Tensor) -> Tensor:
        return self.norm(t)


NORMS = [by_normalize, by_norm, by_vector_norm, by_mean_of_squares, by_sum_of_squares]


@pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)
def test_norms_of_queries_and_keys_absorb_zeros(norm: Callable[[Tensor], Tensor]) -> None:
    model = Normed(norm)
    kill(model.o, columns=lanes(*range(D), heads=[1]))
    kill(model.v, lanes(2), bias=True)
    kill(model.q, lanes(4), bias=True)  # a key lane counts in the length of the key
    check(model, (X,), kept=sizes(q=18, k=18, v=15, o=15))
    kill(model.k, lanes(4), bias=True)
    check(model, (X,), kept=sizes(q=15, k=15, v=15, o=15))
    kill(model.k, lanes(1, heads=[0]), bias=True)  # other heads keep this lane, and lose one of their own
    kill(model.q, lanes(1, heads=[0]), bias=True)
    kill(model.k, lanes(0, heads=[2, 3]), bias=True)
    kill(model.q, lanes(0, heads=[2, 3]), bias=True)
    check(model, (X,), kept=sizes(q=12, k=12, v=15, o=15))


@pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)
def test_norms_of_queries_and_keys_keep_other_constants(norm: Callable[[Tensor], Tensor]) -> None:
    model = Normed(norm)
    kill(model.k, lanes(4))
    kill(model.q, lanes(4))
    check(model, (X,), kept=WHOLE)


@pytest.mark.parametrize("order", [0, -1, -2.0])
@pytest.mark.parametrize("is_keyword", [True, False])
def test_norm_that_counts_zeros_keeps_them(order: float, is_keyword: bool) -> None:
    def length(t: Tensor) -> Tensor:
        if is_keyword:
            return torch.linalg.vector_norm(t, ord=order, dim=-1, keepdim=True)
        return torch.linalg.vector_norm(t, order, -1, True)

    model = Normed(lambda t: t / (length(t) + 1.0))
    kill(model.q, lanes(4), bias=True)
    kill(model.k, lanes(4), bias=True)
    check(model, (X,), kept=WHOLE)


# ---------------------------------------------------------------------- queries, keys and values of several widths
class MultiQuery(nn.Module):
    """One projection of H query heads, one key head and one value head, as Falcon has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(C, (H + 2) * D), nn.Linear(W, C)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], x.shape[1], H + 2, D)
        q, k, v = heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = (q @ k.transpose(-2, -1) * D**-0.5).softmax(-1) @ v  # one head of keys for all
        return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], W))


def test_multi_query_projection() -> None:
    model = MultiQuery()
    kill(model.o, columns=lanes(*range(D), heads=[2]))
    kill(model.qkv, [H * D + 1, (H + 1) * D + 3], bias=True)
    q, k, v = 3 * 5, 5, 5
    check(model, (X,), parameters=(q + k + v) * (C + 1) + 3 * 5 * C + C)


class Disentangled(nn.Module):
    """Scores of contents and relative positions, gathered by one index for all heads, heads and batch in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(C, W), nn.Linear(C, W), nn.Linear(C, W), nn.Linear(W, C)
        self.positions = nn.Linear(C, W)
        self.table = nn.Parameter(torch.randn(2 * T, C))
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        q, k, v = (
            f(x).view(n, T, H, D).permute(0, 2, 1, 3).reshape(n * H, T, D) for f in (self.q, self.k, self.v)
        )
        far = self.positions(self.table).view(2 * T, H, D).permute(1, 0, 2).repeat(n, 1, 1)
        index = (torch.arange(T)[:, None] - torch.arange(T) + T).unsqueeze(0).expand(n * H, T, T)
        scores = torch.bmm(q, k.transpose(1, 2)) + torch.gather(torch.bmm(q, far.transpose(1, 2)), -1, index)
        y = torch.bmm((scores * D**-0.5).softmax(-1), v)
        return self.o(y.view(n, H, T, D).permute(0, 2, 1, 3).reshape(n, T, W))


def test_gathered_relative_positions_lose_the_dead_head() -> None:
    model = Disentangled()
    kill(model.o, columns=lanes(*range(D), heads=[2]))
    kill(model.v, lanes(3), bias=True)
    kill(model.q, lanes(0), bias=True)
    found = check(model, (X,), kept=sizes(q=15, k=15, v=15, o=15), routes=["export"])["export"]
    assert (2 * T, 15) in [tuple(p.shape) for p in found.small.parameters()]  # positions, projected once
