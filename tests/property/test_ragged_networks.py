"""Random networks with ragged reads and writes: exact, never larger than aligned, and settled at once."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

from srfx.minimize import minimize
from tests.helpers import check, masked, randomized, size_bytes
from tests.property import test_norm_stacks as norm_stacks
from tests.property.test_random_networks import Network, Perceptron, mask_of
from tests.snapshots import trace


@given(st.data())
@settings(max_examples=10)
def test_convolutional_networks(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 3))
    torch.manual_seed(seed)
    model = masked(randomized(Network(data.draw), seed), seed, **mask_of(data.draw)).double()
    x, other = (torch.randn(2, 3, 12, 12).double(),), (torch.randn(1, 3, 14, 13).double(),)
    found = check(model, x, others=[other], idempotent=False, ragged=True)
    aligned = minimize(trace(model, x, "symbolic"), x)
    assert size_bytes(found["symbolic"].small) <= size_bytes(aligned)


@given(st.data())
@settings(max_examples=10)
def test_perceptrons(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 3))
    model = masked(randomized(Perceptron(data.draw), seed), seed, **mask_of(data.draw)).double()
    x = (torch.randn(4, 5).double(),)
    found = check(model, x, ragged=True)
    aligned = minimize(trace(model, x, "symbolic"), x)
    assert size_bytes(found["symbolic"].small) <= size_bytes(aligned)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(norm_stacks.stacks)
def test_norm_stacks(stack: norm_stacks.Stack) -> None:
    x = torch.randn(2, norm_stacks.N_TOKENS, 5, generator=torch.Generator().manual_seed(stack.seed)).double()
    net = norm_stacks.Network(stack).double()
    y = net(x)
    if bool(y.isfinite().all()):
        has_signal = not torch.equal(y[0], y[1])  # else every tensor is a leftover that only lends its shape
        found = check(net, (x,), idempotent=has_signal, ragged=True)
        aligned = minimize(trace(net, (x,), "symbolic"), (x,))
        assert size_bytes(found["symbolic"].small) <= size_bytes(aligned)
