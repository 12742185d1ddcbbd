"""Norms spelled by other ops become one op, and only where they are that op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srfx
from srfx.ir.plan import Reason
from srfx.minimize import minimize
from srfx.passes.raise_norms import RaiseNorms
from tests.helpers import check, kill, randomized, relative_error, shapes

aten = torch.ops.aten
X = torch.randn(4, 6)


def llama(x: Tensor, w: Tensor) -> Tensor:
    dtype = x.dtype
    y = x.to(torch.float64)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * y.to(dtype)


RMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "llama": llama,
    "t5": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "gemma": lambda x, w: ((x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)) * w).type_as(x),
    "product": lambda x, w: x * (x * x).mean([-1], True).add(1e-5).rsqrt() * w,
    "divided": lambda x, w: x / torch.sqrt(torch.mean(torch.square(x), dim=1, keepdim=True) + 1e-5) * w,
    "constant first": lambda x, w: x * torch.rsqrt(1e-6 + x.pow(2).mean(-1, keepdim=True)) * w,
    "no weight": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "one over root": lambda x, w: w * (x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))),
    "reciprocal": lambda x, w: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).reciprocal() * w,
    "power": lambda x, w: w * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)),
    "divided by power": lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5 * w,
}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


class Model(nn.Module):
    """Behind(norm(front(x))) with eight channels, of which three are constants."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor], values: tuple[float, ...]) -> None:
        super().__init__()
        self.front, self.behind = nn.Linear(6, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.ones(8))
        self.norm = [norm]
        randomized(self)
        kill(self.front, range(len(values)))
        with torch.no_grad():
            self.front.bias[: len(values)] = torch.tensor(values)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.norm[0](self.front(x), self.weight))
        return y


LAYER: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "variance": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, False, True) + 1e-6) * w + b,
    "correction": lambda x, w, b: (
        b + centred(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-6) * w
    ),
    "in two steps": lambda x, w, b: (
        centred(x) / (centred(x).pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w + b
    ),
    "no bias": lambda x, w, b: w * (centred(x) / (centred(x).pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5),
    "no weight": lambda x, w, b: centred(x) * torch.rsqrt(centred(x).square().mean(-1, keepdim=True) + 1e-6),
    "bias alone": lambda x, w, b: centred(x) * torch.rsqrt(x.var(-1, False, keepdim=True) + 1e-6) + b,
}


class WithBias(Model):
    """The same with a layer norm, which has a bias too."""

    def __init__(self, name: str, values: tuple[float, ...]) -> None:
        super().__init__(lambda x, w: x, values)
        self.name, self.shift = name, nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(LAYER[self.name](self.front(x), self.weight, self.shift))
        return y


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (1.0, -2.0, 0.5)])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norms(name: str, values: tuple[float, ...]) -> None:
    """Constants go: zeros for one statistic, others for two."""
    width = 6 + (values[0] != 0)
    check(WithBias(name, values), (X,), kept={"front.weight": (5, 6), "behind.weight": (5, width)})


@pytest.mark.parametrize("name", LAYER)
def test_form_of_layer_norms(name: str) -> None:
    gm = fx.symbolic_trace(WithBias(name, (0.0,)).double())
    x = X.double()
    wanted = gm(x)
    assert RaiseNorms([x])(gm).modified
    assert [n.target for n in gm.graph.nodes if n.op.startswith("call")] == ["front", F.layer_norm, "behind"]
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (1.0, -2.0, 0.5)])
@pytest.mark.parametrize("name", RMS)
def test_rms_norms(name: str, values: tuple[float, ...]) -> None:
    """Constants go, whatever they are: zeros for nothing, others for one channel of 1/rms."""
    width = 5 + (values[0] != 0)
    check(Model(RMS[name], values), (X,), kept={"front.weight": (5, 6), "behind.weight": (5, width)})


@pytest.mark.parametrize("name", RMS)
def test_form(name: str) -> None:
    gm = fx.symbolic_trace(Model(RMS[name], (0.0,)).double())
    x = X.double()
    wanted = gm(x)
    result = RaiseNorms([x])(gm)
    assert result.modified
    assert [n.target for n in gm.graph.nodes if n.op.startswith("call")] == ["front", F.rms_norm, "behind"]
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12, atol=1e-12)
    assert not RaiseNorms([x])(gm).modified


NEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "other axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6) * w,
    "sum": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w,
    "cube": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6) * w,
    "another operand": lambda x, w: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "no keepdim": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + 1e-6) * w,
    "scaled": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * 2 + 1e-6) * w,
    "sqrt": lambda x, w: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "two over root": lambda x, w: x * (2 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w,
    "cube root": lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.33 * w,
    "unbiased": lambda x, w: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) * w,
    "variance of another": lambda x, w: centred(x + 1) / torch.sqrt(x.var(-1, False, True) + 1e-6) * w,
    "not centred": lambda x, w: x / torch.sqrt(x.var(-1, False, True) + 1e-6) * w,
    "centred by another": lambda x, w: (
        (x - w.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, False, True) + 1)
    ),
    "inverse": lambda x, w: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) / x,
    "alpha": lambda x, w: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2)) * w,
    "eps that varies": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[:, 4:5].abs()) * w,
    "detached": lambda x, w: x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-6) * w,
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    gm = fx.symbolic_trace(Model(NEAR[name], (0.0,)).double())
    assert not RaiseNorms([X.double()])(gm).modified
    check(Model(NEAR[name], (0.0, 1.0)), (X,))


def test_the_statistics_are_read_too() -> None:
    """1/rms has two readers: the product is left, and so is the rest."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * r * w + r

    assert not RaiseNorms([X])(fx.symbolic_trace(Model(norm, (0.0,)))).modified
    check(Model(norm, (0.0, 1.0)), (X,))


def test_the_normalised_value_is_read_too() -> None:
    """Then the weight stays apart."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * w + y

    gm = fx.symbolic_trace(Model(norm, (0.0,)))
    assert RaiseNorms([X])(gm).modified
    assert next(n for n in gm.graph.nodes if n.target is F.rms_norm).args[2] is None
    check(Model(norm, (0.0, 1.0)), (X,))


def test_less_precision_than_the_operand() -> None:
    """A float64 model that normalises in float32 keeps doing so."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    model = Model(norm, (0.0,))
    refused = RaiseNorms([X.double()])(fx.symbolic_trace(model.double())).refusals
    assert [r.reason for r in refused] == [Reason.UNSUPPORTED_DTYPE]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, gm = X.to(dtype), fx.symbolic_trace(model.to(dtype))
        wanted, exact = gm(x).double(), model.double()(x.double())
        model.to(dtype)
        assert RaiseNorms([x])(gm).modified
        found = gm(x)
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() <= 2 * (wanted - exact).abs().max() + 1e-6


NATIVE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "layer": lambda x, w: torch.native_layer_norm(x, [8], w, None, 1e-5)[0],
    "aten layer": lambda x, w: aten.native_layer_norm.default(x, [8], w, w, 1e-3)[0],
    "group": lambda x, w: aten.native_group_norm.default(x, w, w, 4, 8, 1, 2, 1e-5)[0],
}


@pytest.mark.parametrize("name", NATIVE)
def test_native(name: str) -> None:
    gm = fx.symbolic_trace(Model(NATIVE[name], (0.0,)).double())
    x = X.double()
    wanted = gm(x)
    assert RaiseNorms([x])(gm).modified
    assert not any(
        n.target in (aten.native_layer_norm.default, torch.native_layer_norm) for n in gm.graph.nodes
    )
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12, atol=1e-12)


def test_native_statistics_are_read_too() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        found = torch.native_layer_norm(x, [8], w, None, 1e-5)
        return found[0] + found[1]

    refused = RaiseNorms([X])(fx.symbolic_trace(Model(norm, (0.0,)))).refusals
    assert [r.reason for r in refused] == [Reason.OTHER_READERS]
    check(Model(norm, (0.0, 1.0)), (X,))


@pytest.mark.parametrize("is_affine", [True, False])
@pytest.mark.parametrize("n_space", [1, 2, 3])
def test_decomposed_instance_norms(n_space: int, is_affine: bool) -> None:
    """Views around a batch norm over [1, N C]: with a dynamic batch too, and nothing of them is left."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n_space - 1]
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n_space - 1]
    model = randomized(
        nn.Sequential(conv(3, 8, 1), norm(8, affine=is_affine), nn.ReLU(), conv(8, 4, 1))
    ).double()
    kill(model[0], [1, 5])
    kill(model[3], columns=[2])
    x = torch.randn(2, 3, *[4] * n_space, dtype=torch.float64)
    for sizes in (None, ({0: torch.export.Dim.DYNAMIC},)):
        exported = torch.export.export(model, (x,), dynamic_shapes=sizes).run_decompositions().module()
        small = minimize(exported, (x,))
        assert shapes(small)["0.weight"][:2] == (5, 3)
        assert not [n for n in small.graph.nodes if n.target is aten._native_batch_norm_legit.no_stats]
        for given in (x, torch.cat([x, 2 * x + 1])) if sizes else (x,):
            torch.testing.assert_close(small(given), model(given), rtol=1e-9, atol=1e-12)


def test_batch_statistics_that_are_no_instance_norm_stay() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = aten._native_batch_norm_legit.no_stats(x.view(1, 32), w.repeat(4), None, True, 0.1, 1e-5)[0]
        return y.view(4, 8)

    assert not RaiseNorms([X])(fx.symbolic_trace(Model(norm, (0.0,)))).modified


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)])
def test_decomposed_exports(norm: nn.Module) -> None:
    """What run_decompositions leaves of a model shrinks as the model itself does."""
    model = randomized(nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 5))).double()
    kill(model[0], [1, 2, 6])
    kill(model[2], columns=[1, 2, 6] if isinstance(norm, nn.GroupNorm) else [])
    x = X.double()
    exported = torch.export.export(model, (x,)).run_decompositions().module()
    small = minimize(exported, (x,))
    assert shapes(small)["0.weight"] == (5, 6)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)
    assert shapes(minimize(small, (x,))) == shapes(small)


def test_a_norm_that_reads_a_norm():
    model = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    small = srfx.minimize(torch.export.export(model, (x,)).run_decompositions())
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)
    assert not any(n.target is torch.ops.aten.native_layer_norm.default for n in small.graph.nodes)


def _into_a_copy(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y.narrow(1, 3, 1).add_(1)
    return w * (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6))


def _between_its_readers(x: Tensor, w: Tensor) -> Tensor:
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    x[:, 2:4].mul_(2)
    return w * (x * scale)


def _into_the_diagonal(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y.diagonal(0, 0, 1).add_(1)  # has no functional form here, so it stays
    return w * (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6))


def _into_the_mean(x: Tensor, w: Tensor) -> Tensor:
    mean = (x * x).mean(-1, keepdim=True)
    mean[1:].add_(1)
    return w * (x * torch.rsqrt(mean + 1e-6))


@pytest.mark.parametrize("norm", [_into_a_copy, _into_the_diagonal, _between_its_readers, _into_the_mean])
def test_a_write_in_place_on_the_way_is_seen(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Model(norm, (0.0, 2.0)).double()
    x = X.double()
    small = minimize(fx.symbolic_trace(model), x)
    assert relative_error(model(x), small(x)) < 1e-9
