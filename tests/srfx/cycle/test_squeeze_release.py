"""The cycle from the outside: order, acceptance, what acts when, and a real one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import srfx
from srfx.cycle.phase import Phase
from srfx.cycle.progress import CycleProgress
from srfx.errors import CycleError
from tests.helpers import count

G = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=G)
Y = (X[:, 0] > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 2))


def fit(model: nn.Module, n_steps: int = 20, rate: float = 0.02) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    assert not model.training
    return float((model(X).argmax(1) == Y).double().mean())


def trained() -> nn.Sequential:
    model = net()
    fit(model, 60)
    return model


def cycle(model: nn.Module, **options: Any) -> srfx.SqueezeRelease:
    given: dict[str, Any] = {"train": fit, "evaluate": accuracy, "progress": False, "tolerance": 0.05}
    given |= options
    return srfx.SqueezeRelease(model, given.pop("train"), given.pop("evaluate"), X[:4], **given)


def test_a_plain_loop_gets_a_smaller_network() -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    run = cycle(model, cycles=3, penalty=1e-2, amount=0.8, patience=4)
    best = run.run()
    assert count(best) * 5 < count(model)
    assert accuracy(best) >= run.history[0].score - 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
        "the model given is not changed"
    )
    assert min(r.n_parameters for r in run.history if r.accepted) == count(best)
    phases = [r.phase for r in run.history]
    assert phases[:6] == ["start", "train", "squeeze", "minimize", "release", "train"]
    assert phases[-2:] == ["minimize", "finetune"]
    for r in run.history:
        if r.phase == "minimize":
            assert r.plan
        if r.phase == "release":
            assert r.n_zeros <= 3  # of biases at most


def test_a_model_in_training_mode_with_batch_norm() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 2)
    ).train()
    fit(model, 60)
    statistics = copy.deepcopy(model[1].state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run = cycle(model, cycles=1, pruner="groups", optimizer=optimizer, finetune=False, tolerance=0.2)
    assert count(run.run()) * 1.5 < count(model)
    assert model.training
    assert all(torch.equal(v, statistics[k]) for k, v in model[1].state_dict().items())
    assert run.model is not None
    assert {id(p) for p in run.model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


def test_same_seed_same_numbers() -> None:
    runs = [cycle(trained(), cycles=2, penalty=3e-3, seed=5) for _ in range(2)]
    records = [[(r.phase, r.n_parameters, r.score, r.plan) for r in run] for run in runs]
    assert records[0] == records[1]


def test_without_release_zeros_are_held() -> None:
    run = cycle(trained(), cycles=2, noise=None, amount=0.3, patience=2)
    zeros = [r.n_zeros for r in run if r.phase in ("minimize", "train")]
    assert "release" not in {r.phase for r in run.history}
    assert zeros[1] >= zeros[0] > 0, "training does not bring them back"


def test_it_stops_when_the_tolerance_is_broken() -> None:
    scores = iter([1.0, 0.99, 0.5, 0.4])
    run = cycle(trained(), evaluate=lambda _: next(scores), cycles=10, tolerance=0.02, pruner="groups")
    assert [r.accepted for r in run if r.score is not None] == [True, True, False, False]
    assert run.history[-1].cycle == 2
    assert run.best is not None
    assert count(run.best) == run.history[3 - 1].n_parameters


def test_it_stops_when_nothing_more_is_found() -> None:
    run = cycle(trained(), cycles=10, amount=0.0, finetune=False)
    assert [r.phase for r in run] == ["start", "squeeze", "minimize"]


def test_losses_are_better_when_smaller() -> None:
    scores = iter([1.0, 1.2, 0.9])
    run = cycle(trained(), evaluate=lambda _: next(scores), mode="min", tolerance=0.1, cycles=1)
    assert [r.accepted for r in run if r.score is not None] == [True, False, True]
    assert run.history[-1].phase == "finetune"


def test_the_phase_tells_what_goes_on() -> None:
    seen = []

    def train(model: nn.Module, phase: Phase) -> None:
        assert model.training
        seen.append((phase.cycle, phase.name, [s for s, _ in phase.penalties], sorted(phase.masks)))
        fit(model, 2)

    run = cycle(
        trained(), train=train, cycles=1, penalty=[0.5], l1=lambda c: 0.1 * c, penalise=("train", "squeeze")
    )
    steps = {r.phase: r.n_steps for r in run}
    assert [(c, n, p) for c, n, p, _ in seen] == [
        (1, "train", [0.5, 0.1]),
        (1, "squeeze", [0.5, 0.1]),
        (1, "finetune", []),
    ]
    assert seen[1][3]
    assert not seen[0][3]
    assert steps["train"] == steps["squeeze"] == steps["finetune"] == 2


def test_ways_to_take_the_phase() -> None:
    seen: list[str] = []

    def second(model: nn.Module, how: Phase) -> None:
        seen.append(how.name)

    def keyword(model: nn.Module, n_steps: int = 3, *, phase: Phase | None = None) -> None:
        assert n_steps == 3
        assert phase is not None
        seen.append(phase.name)

    def neither(model: nn.Module, n_steps: int = 3) -> None:
        assert n_steps == 3
        seen.append("")

    for train in (second, keyword, neither):
        cycle(trained(), train=train, cycles=1, finetune=False).run()
    assert seen == ["squeeze", "squeeze", ""]


def test_an_optimizer_that_lives_on() -> None:
    model = trained()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(small: nn.Module, phase: Phase) -> None:
        assert phase.optimizer is optimizer
        assert {id(p) for p in small.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(small(X), Y).backward()
            optimizer.step()
        scheduler.step()

    run = cycle(model, train=train, optimizer=optimizer, cycles=2, penalty=3e-3, finetune=False, patience=2)
    for record in run:
        if record.phase == "minimize":
            assert run.model is not None
            steps = {int(optimizer.state[p]["step"]) for p in run.model.parameters() if p in optimizer.state}
            assert steps == {20 * record.cycle}, "moments were carried, not made anew"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**4)


def test_wrong_options() -> None:
    for options, text in (
        ({"mode": "best"}, "'max' or 'min'"),
        ({"penalise": ("minimize",)}, "'train' and 'squeeze'"),
        ({"patience": 0}, "patience >= 1"),
    ):
        with pytest.raises(CycleError, match=text):
            cycle(net(), **options)


def test_progress_is_shown_on_a_terminal_only() -> None:
    shown = io.StringIO()
    run = cycle(trained(), cycles=1)
    run._progress = CycleProgress(True, 1, Console(file=shown, force_terminal=True, width=120))
    run.run()
    assert "cycle 1 minimize" in shown.getvalue()
    assert "steps" in shown.getvalue()
    silent = io.StringIO()
    run = cycle(trained(), cycles=1)
    run._progress = CycleProgress(True, 1, Console(file=silent))
    run.run()
    assert not silent.getvalue()


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x.unflatten(0, (-1, 4)))).flatten(0, 1))


def test_a_transformer_loses_stream_and_heads() -> None:
    torch.manual_seed(0)
    model = Transformer()
    fit(model, 40, 0.005)
    run = cycle(
        model,
        train=lambda m: fit(m, 20, 0.01),
        cycles=2,
        penalty=1e-2,
        pruner="groups",
        patience=3,
        tolerance=0.2,
    )
    best = run.run()
    shapes = {n: tuple(p.shape) for n, p in best.named_parameters()}
    assert count(best) * 3 < count(model)
    assert shapes["embed.weight"][0] < 16
    assert shapes["body.layers.0.self_attn.out_proj.weight"][1] < 16
    assert "body.layers.0.linear1.weight" not in shapes, "the whole branch went"
