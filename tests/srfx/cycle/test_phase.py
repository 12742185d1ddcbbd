"""Penalty and masks reach a training loop through the optimizer's hooks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import srfx
from srfx.cycle.phase import Phase

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def by_hooks(model: nn.Module, phase: Phase, make: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = make(model.parameters())
    with phase.attached():
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()


@pytest.mark.parametrize("kind", [srfx.GroupPenalty, srfx.L1Penalty])
def test_the_penalty_is_that_of_a_loss(kind: type) -> None:
    ours, theirs = net(), net()
    penalty = kind(ours, X)
    phase = Phase(1, "train", ours, penalties=[(0.1, penalty)])
    by_hooks(ours, phase, lambda p: torch.optim.SGD(p, 0.1))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(theirs) + 0.1 * penalty(theirs)).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert phase.n_steps == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p: torch.optim.Adam(p, 0.1, fused=True),
    ],
)
def test_pruned_weights_stay_zero_and_hooks_go(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    optimizer.step()  # momentum that would move the weights that are pruned now
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    phase = Phase(1, "squeeze", model, masks={"0.weight": mask})
    seen = []
    with phase.attached():
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            seen.append(bool((model[0].weight[~mask] == 0).all()))
    assert seen == [True] * 3
    assert bool((model[0].weight[mask] != 0).all())
    loss_of(model).backward()
    optimizer.step()
    assert bool((model[0].weight[~mask] != 0).any()), "the hooks are gone"


def test_closures_and_other_optimizers() -> None:
    ours, theirs, foreign = net(), net(), nn.Linear(2, 2)
    penalty = srfx.GroupPenalty(ours, X)
    phase = Phase(1, "train", ours, penalties=[(0.1, penalty)])

    def run(model: nn.Module, extra: bool) -> None:
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss_of(model)
            (value + 0.1 * penalty(model) if extra else value).backward()
            return value.detach()

        for _ in range(2):
            optimizer.step(closure)

    before = foreign.weight.detach().clone()
    with phase.attached():
        run(ours, extra=False)
        other = torch.optim.SGD(foreign.parameters(), 1.0)
        other.step()
    run(theirs, extra=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(foreign.weight, before)
    assert phase.n_steps == 2


def test_a_scaled_gradient_gets_a_scaled_penalty() -> None:
    model = net()
    phase = Phase(1, "train", model, penalties=[(0.1, srfx.GroupPenalty(model, X))])
    loss_of(model).backward()
    plain = model[0].weight.grad.clone()
    phase.add_gradients()
    once = model[0].weight.grad - plain
    phase.add_gradients(scale=torch.tensor(8.0))
    torch.testing.assert_close(model[0].weight.grad - plain, 9 * once)


def test_watching_another_module() -> None:
    model, copy = net(), net()
    mask = torch.zeros(6, 4, dtype=torch.bool)
    phase = Phase(1, "squeeze", model, masks={"0.weight": mask})
    with phase.attached():
        phase.watch(nn.DataParallel(copy))
        assert not bool(copy[0].weight.any())
        optimizer = torch.optim.SGD(copy.parameters(), 0.1)
        loss_of(copy).backward()
        optimizer.step()
    assert not bool(copy[0].weight.any())
    assert phase.n_steps == 1
