from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.minimize import canonicalise
from srfx.passes import get_pass
from tests.helpers import assert_equivalent
from tests.snapshots import assert_unchanged, snapshot, trace

N, T, H, G, D = 3, 5, 6, 2, 4
NAME = "repeat-to-index-select"
X = torch.randn(N, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def expand_reshape(x: Tensor, g: int, n: int) -> Tensor:
    return x[:, :, None, :, :].expand(x.shape[0], g, n, T, D).reshape(x.shape[0], g * n, T, D)


def unsqueeze_expand_flatten(x: Tensor, g: int, n: int) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2)


def unit_from_a_view(x: Tensor, g: int, n: int) -> Tensor:
    return x.reshape(-1, g, 1, T, D).expand(-1, -1, n, -1, -1).reshape(-1, g * n, T, D)


def tiled(x: Tensor, g: int, n: int) -> Tensor:
    return x[:, None].expand(-1, n, -1, -1, -1).reshape(-1, n * g, T, D)


def interleave(x: Tensor, g: int, n: int) -> Tensor:
    return torch.repeat_interleave(x, n, dim=1)


def interleave_method(x: Tensor, g: int, n: int) -> Tensor:
    return x.repeat_interleave(n, 1)


class Grouped(nn.Module):
    """Attention with fewer key heads than query heads; ``repeat`` makes them as many."""

    def __init__(self, repeat, n_heads: int = H, n_groups: int = G) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, n_heads * D), nn.Linear(n_heads * D, 8)
        self.k, self.v = nn.Linear(8, n_groups * D), nn.Linear(8, n_groups * D)
        self.repeat, self.n_heads, self.n_groups = repeat, n_heads, n_groups

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(-1, T, self.n_heads, D).transpose(1, 2)
        k, v = (f(x).view(-1, T, self.n_groups, D).transpose(1, 2) for f in (self.k, self.v))
        k = torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1) * 0.5 + k  # as rotary embeddings do
        return self.o(self.attend(q, k, v).transpose(1, 2).reshape(-1, T, self.n_heads * D))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.n_heads // self.n_groups
        k, v = self.repeat(k, self.n_groups, n), self.repeat(v, self.n_groups, n)
        return F.scaled_dot_product_attention(q, k, v)


class Flagged(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def run(model: nn.Module, route: str, x: Tensor = X):
    gm = capture(trace(model, (x,), route), (x,)).graph_module
    get_pass("drop-noops")(gm)
    return gm, get_pass(NAME, hints=[x])(gm)


REPEATS = [expand_reshape, unsqueeze_expand_flatten, unit_from_a_view, tiled, interleave, interleave_method]


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("repeat", "n_groups"), [(r, g) for r in REPEATS for g in (2, 1) if (r, g) != (tiled, 1)]
)
def test_every_spelling(repeat, n_groups, route):
    model = Grouped(repeat, n_groups=n_groups).double().eval()
    before = snapshot(model)
    gm, result = run(model, route)
    assert len(result.edits) == 2
    assert not result.refusals
    n = H // n_groups
    wanted = [i % n_groups for i in range(H)] if repeat is tiled else [i // n for i in range(H)]
    indices = [b for name, b in gm.named_buffers() if name.endswith("index")]
    assert [i.tolist() for i in indices] == [wanted, wanted]
    targets = [str(n.target) for n in gm.graph.nodes if n.op != "get_attr"]
    assert sum("index_select" in t for t in targets) == 2
    assert not [t for t in targets if "expand" in t or "interleave" in t or t.endswith("unsqueeze")]
    assert_equivalent(model, gm, (X,))
    assert_equivalent(model, gm, (torch.cat([X, X[:2]]),))
    assert not get_pass(NAME, hints=[X])(gm).edits
    assert_unchanged(model, before)


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("n_groups", [6, 3, 1])
def test_the_flag_of_attention(n_groups, route):
    model = Flagged(None, n_groups=n_groups).double().eval()
    gm, result = run(model, route)
    assert len(result.edits) == 1
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    flags = ["enable_gqa" in n.kwargs for n in calls if "scaled_dot_product_attention" in str(n.target)]
    assert flags == [False]
    assert sum("index_select" in str(n.target) for n in calls) == (0 if n_groups == 6 else 2)
    assert_equivalent(model, gm, (X,))
    assert not get_pass(NAME, hints=[X])(gm).modified


def test_a_reshape_that_merges_more_stays_behind_it():
    def with_batch(x: Tensor, g: int, n: int) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, n, -1, -1).reshape(-1, T, D).view(-1, g * n, T, D)

    model = Grouped(with_batch).double().eval()
    gm, result = run(model, "export")
    assert [e.is_operand for e in result.edits] == [True, True]
    assert_equivalent(model, gm, (X,))


# ---------------------------------------------------------------------- what stays
class Plain(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.fc(x))


def batch(y: Tensor) -> Tensor:
    return torch.repeat_interleave(y, 2, dim=0)


def tokens(y: Tensor) -> Tensor:
    return y.unsqueeze(2).expand(-1, -1, 3, -1).reshape(-1, 3 * T, 8)


def read_twice(y: Tensor) -> Tensor:
    z = y.unsqueeze(-1).expand(-1, -1, -1, 2)
    return z.reshape(-1, T, 16).sum(-1) + z.sum((-1, -2))


def not_merged(y: Tensor) -> Tensor:
    return y.unsqueeze(-1).expand(-1, -1, -1, 2).reshape(-1, 8, 2)


def by_a_tensor(y: Tensor) -> Tensor:
    return torch.repeat_interleave(y, torch.arange(8), dim=2)


def flattened_first(y: Tensor) -> Tensor:
    return torch.repeat_interleave(y, 2)


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("body", [batch, tokens, read_twice, not_merged, by_a_tensor, flattened_first])
def test_left_alone(body, route):
    _, result = run(Plain(body).double().eval(), route)
    assert not result.edits


def test_heads_that_come_from_an_input_are_refused():
    class Foreign(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    q, k = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 3, 5)
    gm = capture(fx.symbolic_trace(Foreign()), (q, k)).graph_module
    result = get_pass(NAME, hints=[q, k])(gm)
    assert not result.edits
    assert [r.reason for r in result.refusals] == [Reason.UNTRACKED_AXIS]


def test_canonicalise_runs_it_and_the_plan_is_deterministic():
    gm = capture(fx.symbolic_trace(Grouped(expand_reshape).double()), (X,)).graph_module
    first, second = (get_pass(NAME, hints=[X]).plan(gm) for _ in range(2))
    assert first == second
    assert first.edits[0].to_json()["index"] == [0, 0, 0, 1, 1, 1]
    assert any(name == NAME for name, _ in canonicalise(gm, [X]).edits)
