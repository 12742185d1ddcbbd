from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.minimize import canonicalise, minimize
from srfx.passes import get_pass
from tests.helpers import assert_equivalent
from tests.snapshots import assert_unchanged, snapshot, trace

N, T, H, D = 3, 5, 2, 4
E = H * D
SPLIT = "split-fused-projections"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, T, v.shape[1] * v.shape[-1])


def outer_unbind(qkv: Tensor) -> Tensor:
    q, k, v = qkv.reshape(-1, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v)


def outer_getitem(qkv: Tensor) -> Tensor:
    y = qkv.reshape(qkv.shape[0], qkv.shape[1], 3, H, qkv.shape[2] // (3 * H)).permute(2, 0, 3, 1, 4)
    return attend(y[0], y[1], y[2])


def outer_slices(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, 3, E)
    return attend(*(y[:, :, i].view(-1, T, H, D).transpose(1, 2) for i in range(3)))


def outer_select(qkv: Tensor) -> Tensor:
    y = qkv.unflatten(-1, (3, E)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return attend(*(y.select(0, i).unflatten(-1, (H, D)).transpose(1, 2) for i in range(3)))


def two_views(qkv: Tensor) -> Tensor:
    y = qkv.flatten(0, 1).view(-1, 3, E).view(-1, T, 3, H, D).transpose(1, 3)
    return attend(y[:, :, 0], y[:, :, 1], y[:, :, 2])


def interleaved_chunk(qkv: Tensor) -> Tensor:
    q, k, v = qkv.view(-1, T, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return attend(q, k, v)


def interleaved_split(qkv: Tensor) -> Tensor:
    q, k, v = qkv.view(-1, T, H, 3 * D).transpose(1, 2).split([D, D, D], dim=-1)
    return attend(q, k, v)


def interleaved_select(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, H, 3, D)
    return attend(*(y[..., i, :].transpose(1, 2) for i in range(3)))


def per_group(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, 2, 3, D)  # two groups: one query head, a key, a value
    q, k, v = y[:, :, :, :-2].flatten(2, 3), y[:, :, :, 1:2].flatten(2, 3), y[:, :, :, 2:].flatten(2, 3)
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def narrowed(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, 3, H, D).transpose(1, 3)
    return attend(*(y.narrow(2, i, 1).squeeze(2) for i in range(3)))


LAYOUTS = [
    outer_unbind, outer_getitem, outer_slices, outer_select, two_views,
    interleaved_chunk, interleaved_split, interleaved_select, per_group, narrowed,
]  # fmt: skip


class Fused(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor], bias: bool = True, width: int = 3 * E) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, width, bias=bias)
        self.proj = nn.Linear(E, E)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.body(self.qkv(x)))


X = torch.randn(N, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, route: str, x: Tensor = X):
    gm = capture(trace(model, (x,), route), (x,)).graph_module
    return gm, get_pass(SPLIT, hints=[x])(gm)


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("body", LAYOUTS)
def test_every_layout(body, bias, route):
    model = Fused(body, bias).double().eval()
    before = snapshot(model)
    gm, result = run(model, route)
    assert len(result.edits) == 1
    (edit,) = result.edits
    assert not result.refusals
    assert sorted(row for part in edit.rows for row in part) == list(range(3 * E))
    assert edit.paths == ("qkv_q", "qkv_k", "qkv_v")
    assert_equivalent(model, gm, (X,))
    assert_equivalent(model, gm, (torch.cat([X, X[:2]]),))  # the batch stays dynamic
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in model.parameters())
    again = get_pass(SPLIT, hints=[X])(gm)
    assert not again.edits
    assert not again.refusals
    assert_unchanged(model, before)


def test_the_axis_leaves_no_trace():
    gm, _ = run(Fused(outer_select).double().eval(), "export")
    names = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert not [n for n in names if "select" in n or "squeeze" in n]


def test_zeros_stay_zeros_and_rows_are_gathered():
    model = Fused(interleaved_chunk).double().eval()
    with torch.no_grad():
        model.qkv.weight[torch.rand(3 * E, E) < 0.5] = 0
    gm, result = run(model, "symbolic")
    for rows, path in zip(result.edits[0].rows, result.edits[0].paths, strict=True):
        assert torch.equal(gm.get_submodule(path).weight, model.qkv.weight[list(rows)])
        assert torch.equal(gm.get_submodule(path).bias, model.qkv.bias[list(rows)])
    assert result.edits[0].rows[1] == (*range(D, 2 * D), *range(4 * D, 5 * D))


def test_gradients_reach_the_parts_and_frozen_stays_frozen():
    model = Fused(outer_unbind).double()
    model.qkv.weight.requires_grad_(False)
    gm, _ = run(model, "symbolic")
    gm(X).sum().backward()
    for part in "qkv":
        layer = gm.get_submodule(f"qkv_{part}")
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (E, E)
        assert not layer.weight.requires_grad
        assert layer.bias.grad is not None


class Functional(Fused):
    def __init__(self, how: str) -> None:
        super().__init__(outer_unbind)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.qkv.weight, self.qkv.bias
        if self.how == "F.linear":
            y = F.linear(x, w, b)
        elif self.how == "x @ w.t()":
            y = x @ w.t()
        elif self.how == "matmul":
            y = torch.matmul(x, self.stored)
        elif self.how == "addmm":
            y = torch.addmm(b, x.reshape(-1, E), self.stored).view(-1, T, 3 * E)
        elif self.how == "cat bias":
            y = F.linear(x, w, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        return self.proj(self.body(y))


def functional(how: str) -> nn.Module:
    model = Functional(how)
    model.stored = nn.Parameter(torch.randn(E, 3 * E))
    model.q_bias, model.v_bias = nn.Parameter(torch.randn(E)), nn.Parameter(torch.randn(E))
    model.register_buffer("k_bias", torch.zeros(E))
    return model.double().eval()


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("how", ["F.linear", "x @ w.t()", "matmul", "addmm", "cat bias"])
def test_every_spelling_of_the_projection(how, route):
    model = functional(how)
    gm, result = run(model, route)
    assert len(result.edits) == 1
    assert_equivalent(model, gm, (X,))
    assert not get_pass(SPLIT, hints=[X])(gm).edits


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(E, 3 * E, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 3, H, D, h * w).unbind(1)
        return v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_convolution(route):
    model, x = Conv().double().eval(), torch.randn(N, E, 3, 3, dtype=torch.float64)
    gm, result = run(model, route, x)
    assert len(result.edits) == 1
    assert_equivalent(model, gm, (x,))


class Cross(nn.Module):
    """kv of another sequence, and a head of its own for queries."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(E, 2 * E)
        self.q = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).reshape(-1, T, 2, H, D).permute(2, 0, 3, 1, 4)
        return attend(self.q(x).view(-1, T, H, D).transpose(1, 2), k, v)


def test_key_and_value_by_iteration():
    model = Cross().double().eval()
    gm, result = run(model, "symbolic")
    assert [e.paths for e in result.edits] == [("kv_k", "kv_v")]
    assert_equivalent(model, gm, (X,))


# ---------------------------------------------------------------------- what stays
def flat(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return attend(*(t.view(-1, T, H, D).transpose(1, 2) for t in (q, k, v)))


def rotary(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, 3 * H, D)
    a, b = y[..., : D // 2], y[..., D // 2 :]
    return torch.cat([-b, a], -1).flatten(2)[..., :E]


def gates(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, 3, E)
    return y[:, :, 0] * y[:, :, 1].sigmoid() + y[:, :, 2]


def rows_left_out(qkv: Tensor) -> Tensor:
    y = qkv.view(-1, T, 3, E)
    return y[:, :, 0]


@pytest.mark.parametrize("body", [flat, rotary, gates, rows_left_out])
def test_nothing_to_split(body):
    _, result = run(Fused(body).double().eval(), "symbolic")
    assert not result.edits
    assert not result.refusals


def read_whole(qkv: Tensor) -> Tensor:
    return outer_unbind(qkv) + qkv.sum(-1, keepdim=True)


def view_read_whole(qkv: Tensor) -> Tensor:
    y = qkv.reshape(-1, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return attend(y[0], y[1], y[2]) + y.mean()


@pytest.mark.parametrize("body", [read_whole, view_read_whole])
def test_other_readers(body):
    _, result = run(Fused(body).double().eval(), "symbolic")
    assert not result.edits
    assert [r.reason for r in result.refusals] == [Reason.OTHER_READERS]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        return outer_unbind(self.qkv(outer_unbind(self.qkv(x))))


class Tied(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.qkv.weight[:E])


@pytest.mark.parametrize("model", [Twice(), Tied(outer_unbind)])
def test_shared_weight(model):
    _, result = run(model.double().eval(), "symbolic")
    assert not result.edits
    assert {r.reason for r in result.refusals} == {Reason.SHARED_WEIGHT}


class Scaled(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.linear(x, self.qkv.weight * x.mean(), self.qkv.bias))


def test_computed_weight():
    _, result = run(Scaled(outer_unbind).double().eval(), "symbolic")
    assert not result.edits
    assert [r.reason for r in result.refusals] == [Reason.COMPUTED_WEIGHT]


def test_a_split_that_takes_part_of_the_batch_is_left():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(E, 3 * E)

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x).view(-1, E)  # at a batch of one this looks like a split of the rows
            return torch.stack([y[0], y[1], y[2]]) * 2

    _, result = run(Mixed().double(), "symbolic", X[:1, 0])
    assert not result.edits


def test_a_hook_is_a_barrier():
    model = Fused(outer_unbind).double().eval()
    model.qkv.register_forward_hook(lambda module, args, output: output * 2)
    gm = capture(fx.symbolic_trace(model), (X,)).graph_module
    assert not get_pass(SPLIT, hints=[X])(gm).edits


def test_the_plan_is_the_same_every_time_and_plain():
    gm = capture(fx.symbolic_trace(Fused(outer_unbind).double()), (X,)).graph_module
    first, second = (get_pass(SPLIT, hints=[X]).plan(gm) for _ in range(2))
    assert first == second
    assert first.edits[0].to_json()["paths"] == ["qkv_q", "qkv_k", "qkv_v"]


def test_hints_come_from_metadata():
    gm = capture(trace(Fused(outer_unbind), (X.float(),), "export")).graph_module
    assert len(get_pass(SPLIT)(gm).edits) == 1


def test_float32_and_bfloat16_keep_their_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        model = Fused(interleaved_select).to(dtype).eval()
        gm, _ = run(model, "symbolic", X.to(dtype))
        assert {p.dtype for p in gm.parameters()} == {dtype}
        assert gm(X.to(dtype)).dtype == dtype


def test_canonicalise_runs_it():
    gm = capture(fx.symbolic_trace(Fused(outer_unbind).double().eval()), (X,)).graph_module
    assert SPLIT in [name for name, _ in canonicalise(gm, [X]).edits]
    assert operator.attrgetter("qkv_q.weight")(gm).shape == (E, E)


def test_an_axis_squeezed_by_a_list_of_axes():
    """Decomposed attention squeezes its packed projection with ``squeeze.dims``."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            return self.attention(x, x, x, key_padding_mask=~seen)[0]

    model, x = Words().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        model.attention.in_proj_weight[[10, 11]] = 0
    seen = torch.ones(2, 5, dtype=torch.bool)
    program = torch.export.export(model, (x, seen)).run_decompositions()
    small = minimize(program)
    torch.testing.assert_close(small(x, seen), model(x, seen), rtol=1e-9, atol=1e-12)
    assert len([name for name, _ in small.named_parameters() if name.endswith("weight")]) == 4
