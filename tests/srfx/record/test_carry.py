"""An optimizer that is carried over takes the step that the masked model would have taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import srfx
from srfx.errors import PlanError
from srfx.record.carry import cut

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-plain": lambda p: torch.optim.SGD(p, 0.1),
    "sgd-foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam-foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


class Net(nn.Module):
    """A convolution with batch norm, a residual stream with layer norm, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.into = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.q, self.v = nn.Linear(12, 12), nn.Linear(12, 12)
        self.k = nn.Linear(12, 12, bias=False)  # softmax is shift invariant: the bias would have no gradient
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        x = self.into(x)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def masked_net() -> Net:
    net = Net().double().eval()
    with torch.no_grad():
        net.conv.weight[[1, 4, 5]] = 0
        net.conv.bias[[1, 4, 5]] = 0.25  # positive constants, folded into the bias of `into`
        net.into.weight[:, [2]] = 0
        for weight in (net.into.weight, net.out.weight):
            weight[[0, 7, 9]] = 0
        net.norm.weight[[0, 7, 9]] = 0  # the norm needs no statistics then
        net.v.weight[4:8] = 0  # one head
        net.v.bias[4:8] = 0
    return net


X = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zeros_of(net: nn.Module) -> dict[str, Tensor]:
    """Masks of everything that was pruned."""
    return {n: (p != 0).to(p) for n, p in net.named_parameters() if p.dim() > 1 or n == "norm.weight"}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, masks: dict[str, Tensor]) -> None:
    """One step that keeps what is pruned at zero."""
    optimizer.zero_grad()
    net(X).square().mean().backward()
    for name, mask in masks.items():
        p = net.get_parameter(name)
        if p.grad is not None:
            p.grad.mul_(mask)
    optimizer.step()
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)


def groups_of(net: Net) -> list[dict[str, Any]]:
    """Three groups; a bias that takes up constants has another value, so decay would treat it otherwise."""
    decayed = [net.conv.weight, net.into.weight, net.q.weight, net.k.weight, net.v.weight]
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    rest = [p for p in net.parameters() if not any(p is q for q in (*decayed, *biases))]
    return [{"params": decayed, "lr": 0.02}, {"params": rest}, {"params": biases, "weight_decay": 0.0}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_the_masked_model(name: str) -> None:
    net = masked_net()
    masks = zeros_of(net)
    optimizer = OPTIMIZERS[name](groups_of(net))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(3):
        step(net, optimizer, masks)
        scheduler.step()
    small, other = srfx.minimize(net, X), copy.deepcopy(net)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in net.parameters())
    theirs = OPTIMIZERS[name](groups_of(other))  # the masked model goes on with this one
    theirs.load_state_dict(optimizer.state_dict())

    plan = srfx.plan(small)
    plan.apply_to_optimizer(optimizer, net, small)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in theirs.param_groups]
    small_masks = {n: cut(plan.tensor(n), m) for n, m in masks.items() if plan.tensor(n).kept_shape}
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    start = {n: p.detach().clone() for n, p in other.named_parameters()}
    step(other, theirs, masks)
    step(small, optimizer, small_masks)
    assert {n for n in before if n not in start} == {"k.bias"}, "created; it has no counterpart"
    for n, p in small.named_parameters():
        if n not in start:
            continue
        wanted = cut(plan.tensor(n), (other.get_parameter(n) - start[n]).detach())
        assert bool(wanted.any()), n
        torch.testing.assert_close(
            p.detach() - before[n], wanted, rtol=1e-8, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}"
        )
    rate = optimizer.param_groups[0]["lr"]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2, "the scheduler goes on"


def test_groups_hyperparameters_and_foreign_parameters_stay() -> None:
    net, foreign = masked_net(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW(
        [{"params": [net.v.weight, foreign], "lr": 1.0}, {"params": [net.conv.weight], "betas": (0.5, 0.6)}]
    )
    masks = zeros_of(net)
    (net(X).sum() + foreign.sum()).backward()
    optimizer.step()
    with torch.no_grad():
        for n, m in masks.items():
            net.get_parameter(n).mul_(m)
    kept = optimizer.state[foreign]
    group = optimizer.param_groups[0]
    small = srfx.minimize(net, X)
    srfx.plan(small).apply_to_optimizer(optimizer, net, small)
    assert optimizer.param_groups[0] is group
    assert optimizer.param_groups[0]["params"][0] is small.get_parameter("v.weight")
    assert optimizer.param_groups[0]["params"][1] is foreign
    assert optimizer.state[foreign] is kept
    assert [p.shape for p in optimizer.param_groups[1]["params"]] == [(4, 2, 3, 3)]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert len(optimizer.state) == 3
    for p, state in optimizer.state.items():
        assert state["exp_avg"].shape == p.shape
    names = {
        n
        for n, p in small.named_parameters()
        if any(p is q for g in optimizer.param_groups for q in g["params"])
    }
    assert names == {"v.weight", "conv.weight"}, "what the optimizer did not hold it does not get"


def test_created_bias_joins_its_layer() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        net[0].weight[0] = 0  # sigmoid of its bias has to be added behind
    optimizer = torch.optim.Adam(
        [
            {"params": net[0].parameters()},
            {"params": net[2].parameters(), "lr": 0.5},
            {"params": net[4].parameters()},
        ]
    )
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        net[0].weight[0] = 0
    small = srfx.minimize(net.eval(), torch.randn(1, 3))
    srfx.plan(small).apply_to_optimizer(optimizer, net, small)
    bias = small.get_parameter("2.bias")
    assert any(p is bias for p in optimizer.param_groups[1]["params"])
    assert bias not in optimizer.state
    small(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[bias]["step"] == 1
    assert optimizer.state[small.get_parameter("2.weight")]["step"] == 2


def test_pruning_hooks_and_named_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    optimizer = torch.optim.SGD(list(net.named_parameters()), 0.1, momentum=0.9)
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[net[0].weight_orig]["momentum_buffer"].clone()
    rows = net[0].weight_mask.any(1)
    small = srfx.minimize(net.eval(), torch.randn(1, 3))
    srfx.plan(small).apply_to_optimizer(optimizer, net, small)
    weight = small.get_parameter("0.weight")
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum[rows])
    if "param_names" in optimizer.param_groups[0]:
        assert set(optimizer.param_groups[0]["param_names"]) == {n for n, _ in small.named_parameters()}


def test_columns_that_now_read_a_statistic_start_afresh() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    net(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        net[0].weight[[1, 3, 6]] = 0
    small = srfx.minimize(net, x)
    weight = small.get_parameter("2.weight")
    n_statistics = weight.shape[1] - small.get_parameter("0.weight").shape[0]
    assert n_statistics > 0
    srfx.plan(small).apply_to_optimizer(optimizer, net, small)
    moment = optimizer.state[weight]["exp_avg"]
    assert (moment == 0).all(0).tolist() == [False] * (weight.shape[1] - n_statistics) + [True] * n_statistics


def test_errors_leave_everything_as_it_is() -> None:
    net = masked_net()
    small = srfx.minimize(net, X)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(PlanError, match="no parameter of the model"):
        srfx.plan(small).apply_to_optimizer(other, net, small)
    optimizer = torch.optim.LBFGS(net.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        loss = net(X).square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(PlanError, match="make a new optimizer"):
        srfx.plan(small).apply_to_optimizer(optimizer, net, small)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))


class TwoBranches(nn.Module):
    """Two branches of one stream, each of which reads and writes only a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 12), nn.Linear(12, 3)
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 12, bias=False)
        self.c, self.d = nn.Linear(12, 8), nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.b(torch.tanh(self.a(x)))
        return self.out(x + self.d(torch.tanh(self.c(x))))


def test_ragged_results() -> None:
    net, x = TwoBranches().double().eval(), torch.randn(8, 6, dtype=torch.float64)
    with torch.no_grad():
        net.a.weight[:, :7] = 0
        net.b.weight[:4] = 0
        net.c.weight[:, 5:] = 0
        net.d.weight[6:] = 0
        net.into.weight[:, :2] = 0
    masks = zeros_of(net)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, held: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in held.items():
                model.get_parameter(name).mul_(mask)

    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    steps(net, optimizer, masks)
    small, other = srfx.minimize(net, x, ragged=True), copy.deepcopy(net)
    plan = srfx.plan(small)
    assert [small.get_parameter(f"{n}.weight").shape for n in "abcd"] == [(8, 5), (8, 8), (8, 5), (6, 8)]
    theirs = torch.optim.AdamW(other.parameters(), 0.01)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan.apply_to_optimizer(optimizer, net, small)
    for _ in range(3):  # nothing was folded, so the two stay together
        steps(other, theirs, masks)
        steps(small, optimizer, {})
    for name, p in small.named_parameters():
        wanted = cut(plan.tensor(name), other.get_parameter(name).detach())
        torch.testing.assert_close(
            p.detach(), wanted, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
