"""Any order of a stream's channels gives the same network."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

import srfx.analysis.order
from srfx.analysis.order import Wanted
from tests.helpers import check, kill, masked, randomized
from tests.property import test_norm_stacks as norm_stacks
from tests.property.test_random_networks import Network, mask_of


@pytest.fixture(autouse=True)
def n_shuffled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every stream that a port touches gets a random order; how many there were."""
    found: list[int] = []

    def shuffled(sets: Sequence[Wanted]) -> Tensor:
        n = sets[0].channels.numel()
        found.append(n)
        return torch.randperm(n, generator=torch.Generator().manual_seed(len(found)))

    monkeypatch.setattr(srfx.analysis.order, "arranged", shuffled)
    return found


quiet = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@given(st.data())
@quiet
def test_convolutional_networks(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 3))
    torch.manual_seed(seed)
    model = masked(randomized(Network(data.draw), seed), seed, **mask_of(data.draw)).double()
    x, other = (torch.randn(2, 3, 12, 12).double(),), (torch.randn(1, 3, 14, 13).double(),)
    check(model, x, others=[other], idempotent=False, ragged=True)


@given(norm_stacks.stacks)
@quiet
def test_norm_stacks(stack: norm_stacks.Stack) -> None:
    x = torch.randn(2, norm_stacks.N_TOKENS, 5, generator=torch.Generator().manual_seed(stack.seed)).double()
    net = norm_stacks.Network(stack).double()
    if bool(net(x).isfinite().all()):
        check(net, (x,), idempotent=False, ragged=True)


class Stream(nn.Module):
    """Blocks on a stream with norms, one of them with heads."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(width, 16) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(16, width) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.tanh(up(norm(x))))
        y: Tensor = self.head(self.norms[3](x))
        return y


def stream(seed: int, bias: bool) -> nn.Module:
    model, g = randomized(Stream()), torch.Generator().manual_seed(seed)
    for up, down in zip(model.up, model.down, strict=True):
        kill(up, columns=torch.randperm(24, generator=g)[:8].tolist())
        kill(down, rows=torch.randperm(24, generator=g)[:10].tolist(), bias=bias)
    return model.double()


@pytest.mark.parametrize("bias", [True, False])
def test_streams_with_norms(n_shuffled: list[int], bias: bool) -> None:
    check(stream(0, bias), (torch.randn(2, 3, 6).double(),), ragged=True, idempotent=False)
    assert n_shuffled
