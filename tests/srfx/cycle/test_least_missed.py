"""The pruner of the benchmarks: it clears whole groups, those that the loss misses least for their size."""

import torch
from torch import nn

import srfx
from benchmarks.cycle.pruner import LeastMissed

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[:, [2, 5]] *= 1e-3  # what these two compute is hardly heard
    return net


def least_missed(net: nn.Sequential) -> LeastMissed:
    least = LeastMissed(srfx.channel_groups(net, X), net)
    for batch in X.split(8):
        net.zero_grad()
        net(batch).square().mean().backward()
        least.add()
    return least


def test_importance_is_the_squared_slope_summed_over_a_group() -> None:
    net = network()
    least = LeastMissed(srfx.channel_groups(net, X), net)
    net(X).square().mean().backward()
    least.add()
    first, bias, second = net[0].weight, net[0].bias, net[2].weight
    by_hand = (first * first.grad).sum(1) + bias * bias.grad + (second * second.grad).sum(0)
    torch.testing.assert_close(least.importance.sort().values, by_hand.square().sort().values)
    assert least.sizes.tolist() == [6 + 1 + 3] * 8


def test_the_least_missed_go_whole_and_minimize_takes_them() -> None:
    net = network()
    n = sum(p.numel() for p in net.parameters())
    assert least_missed(net).clear(21 / n) == 2
    for zeros in (net[0].weight.detach().abs().sum(1), net[0].bias.detach(), net[2].weight.detach().sum(0)):
        assert (zeros == 0).nonzero().flatten().tolist() == [2, 5]
    small = srfx.minimize(net.eval(), X)
    assert small.get_parameter("0.weight").shape == (6, 6)


def test_an_axis_keeps_its_share_and_loses_one_at_least() -> None:
    net = network()
    assert least_missed(net).clear(0.99, most_of_an_axis=0.25) == 2
    net = network()
    assert least_missed(net).clear(0.99, most_of_an_axis=0.01) == 1
