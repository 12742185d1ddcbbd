"""Norms whose readers take nothing but statistics: no channel comes out at all (theory: Lemmas N6 and N7)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import srfx
from srfx.ir.plan import Reason
from tests.helpers import check, randomized, relative_error
from tests.snapshots import trace

WIDTH, LIVE, HIDDEN = 60, 30, 70
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
}


class Net(nn.Module):
    """A stream whose constants alone are read behind the norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.up = nn.Linear(5, WIDTH), norm, nn.Linear(WIDTH, HIDDEN)
        self.down, self.head = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        return self.head(y + self.down(self.up(self.norm(y)).relu()))  # type: ignore[no-any-return]


def network(norm: nn.Module) -> Net:
    net = randomized(Net(norm)).double()
    with torch.no_grad():
        net.stem.weight[LIVE:] = 0
        net.down.weight[LIVE:] = 0
        net.up.weight[:, :LIVE] = 0
    return net


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_statistics_alone_come_out(name: str, ragged: bool) -> None:
    n_statistics = 2 if name == "layer" else 1
    kept = {
        "stem.weight": (LIVE, 5),
        "up.weight": (HIDDEN, n_statistics),
        "down.weight": (LIVE, HIDDEN),
        "head.weight": (4, LIVE),
    }
    check(network(NORMS[name]()), (torch.randn(4, 5),), kept=kept, ragged=ragged)


@pytest.mark.parametrize("name", NORMS)
def test_minimized_trained_minimized(name: str) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    small = srfx.minimize(network(NORMS[name]()), x)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        small.get_parameter("up.weight")[: HIDDEN // 2] = 0
    again = srfx.minimize(copy.deepcopy(small), x)
    assert again.get_parameter("up.weight").shape[0] == HIDDEN - HIDDEN // 2
    assert relative_error(small(x), again(x)) < 1e-9


@pytest.mark.parametrize("name", NORMS)
def test_exported_and_saved(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(4, 5, dtype=torch.float64)
    net = network(NORMS[name]())
    small = srfx.minimize(trace(net, (x,), "symbolic"), x)
    srfx.save(small, tmp_path / "small.srfx")
    exported = torch.export.export(small, (x,)).module()
    for found in (srfx.load(tmp_path / "small.srfx"), exported, srfx.minimize(exported, x)):
        assert relative_error(net(x), found(x)) < 1e-9


class BiasFree(nn.Module):
    """Two readers without bias of a norm over a stream that keeps its width in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.gate = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        return self.up(y) * torch.tanh(self.gate(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("n_dead", "n_kept"), [(1, 8), (2, 6), (3, 5)])
def test_a_new_bias_counts_as_a_column(n_dead: int, n_kept: int) -> None:
    net = randomized(BiasFree()).double()
    with torch.no_grad():
        net.stem.weight[:n_dead] = 0
        net.stem.bias[:n_dead] = 0  # (0 - mu) r gamma + beta: one statistic, and a constant
    found = check(net, (torch.randn(4, 5),), kept={"stem.weight": (n_kept, 5)})
    for outcome in found.values():
        refused = {r.detail for r in outcome.refusals if r.reason is Reason.GROWS}
        wanted = {"statistics ['mu_r'] and a bias would replace 1 of the channels"}
        assert refused == (wanted if n_dead == 1 else set())
