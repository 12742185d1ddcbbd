from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.capture import capture
from srfx.minimize import canonicalise
from srfx.passes import get_pass
from tests.helpers import assert_equivalent
from tests.snapshots import trace

N, T, E = 3, 5, 8
NAME = "split-parameters"
X = torch.randn(N, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Packed(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * E, E))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.in_proj_weight)


def by_split(x, w):
    a, b = w.split([E, 2 * E])
    return F.linear(x, a) * F.linear(x, b).sum(-1, keepdim=True)


def by_chunk(x, w):
    a, b, c = w.chunk(3)
    return F.linear(x, a) * F.linear(x, b) + F.linear(x, c)


def by_slices(x, w):
    return F.linear(x, w.narrow(0, E, 2 * E)).sum(-1) + F.linear(x, w.narrow(0, 0, E)).sum(-1)


def by_columns(x, w):
    a, b = w.split(E // 2, 1)
    return F.linear(x[..., : E // 2], a) + F.linear(x[..., E // 2 :], b)


def run(body, route):
    model = Packed(body).double()
    gm = capture(trace(model, (X,), route), (X,)).graph_module
    return model, gm, get_pass(NAME, hints=[X])(gm)


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("body", "paths"),
    [
        (by_split, ("q_proj.weight", "in_proj_kv.weight")),
        (by_chunk, ("q_proj.weight", "k_proj.weight", "v_proj.weight")),
        (by_slices, ("q_proj.weight", "in_proj_kv.weight")),
        (by_columns, ("in_proj_0.weight", "in_proj_1.weight")),
    ],
)
def test_pieces_become_parameters(body, paths, route):
    model, gm, result = run(body, route)
    assert [e.paths for e in result.edits] == [paths]
    assert tuple(dict(gm.named_parameters())) == paths
    assert sum(p.numel() for p in gm.parameters()) == model.in_proj_weight.numel()
    assert_equivalent(model, gm, (X,))
    assert not get_pass(NAME, hints=[X])(gm).modified


def also_whole(x, w):
    return by_chunk(x, w) + w.sum()


def two_ways(x, w):
    return by_chunk(x, w) + F.linear(x, w.split([E, 2 * E])[0])


def a_piece_is_unread(x, w):
    return F.linear(x, w.narrow(0, 0, E))


def with_steps(x, w):
    return F.linear(x, w[::2]) + F.linear(x, w[1::2])


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("body", [also_whole, two_ways, a_piece_is_unread, with_steps])
def test_left_alone(body, route):
    assert not run(body, route)[2].edits


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attn(x, y, y, need_weights=False)[0]


class Transposed(nn.Module):
    """Cross attention of queries whose channels come before their positions."""

    def __init__(self, cross: Cross) -> None:
        super().__init__()
        self.cross = cross

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cross(x.transpose(1, 2), y)


def test_exported_cross_attention_gets_three_projections():
    model, y = Cross().double().eval(), torch.randn(N, 7, E, dtype=torch.float64)
    with torch.no_grad():
        model.attn.in_proj_bias.normal_()
    shapes = ({0: torch.export.Dim.AUTO},) * 2
    program = torch.export.export(model, (X, y), dynamic_shapes=shapes, strict=False)
    gm = capture(program.module(), (X, y)).graph_module
    canonicalise(gm, [X, y])
    named = {name: tuple(p.shape) for name, p in gm.named_parameters()}
    wanted = {f"attn.{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert set(named) == wanted
    assert_equivalent(model, gm, (X, y))


def test_decomposed_cross_attention_of_a_transposed_query_gets_linear_layers() -> None:
    # torch decomposes a projection of what is not contiguous into a bmm with the repeated piece of the weight
    model, x, y = Cross().double().eval(), torch.randn(N, E, 5, dtype=torch.float64), X
    program = torch.export.export(
        Transposed(model), (x, y), dynamic_shapes=({0: torch.export.Dim.AUTO},) * 2, strict=False
    ).run_decompositions()
    assert torch.ops.aten.bmm.default in {n.target for n in program.graph.nodes}
    gm = capture(program.module(), (x, y)).graph_module
    canonicalise(gm, [x, y])
    named = dict(gm.named_parameters())
    assert {f"cross.attn.{p}_proj.weight" for p in "qkv"} <= named.keys()
    assert not canonicalise(gm, [x, y]).modified
    assert_equivalent(Transposed(model), gm, (x, y))
