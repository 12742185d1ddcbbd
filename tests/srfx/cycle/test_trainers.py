"""The cycle around the loops of others: Accelerate, and a Lightning trainer, which hands a closure to the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import srfx

pytestmark = pytest.mark.slow

G = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=G)
Y = (X[:, 0] > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))


def run(train: Any) -> srfx.SqueezeRelease:
    cycle = srfx.SqueezeRelease(
        net(), train, lambda m: float((m(X).argmax(1) == Y).double().mean()), X[:2], cycles=1,
        pruner="groups", penalty=1e-3, tolerance=1.0, finetune=False, progress=False,
    )  # fmt: skip
    cycle.run()
    return cycle


def plain(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def assert_like_plain(cycle: srfx.SqueezeRelease) -> None:
    """The same steps, the same penalty, the same masks."""
    wanted = run(plain)
    assert [(r.phase, r.n_parameters, r.n_zeros, r.n_steps) for r in cycle.history] == [
        (r.phase, r.n_parameters, r.n_zeros, r.n_steps) for r in wanted.history
    ]
    assert cycle.best is not None
    assert wanted.best is not None
    for (n, a), (_, b) in zip(cycle.best.named_parameters(), wanted.best.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=n: f"{n}: {m}")


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def train(model: nn.Module) -> None:
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        for _ in range(5):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(wrapped(X), Y))
            optimizer.step()

    assert_like_plain(run(train))


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=64)

    def train(model: nn.Module) -> None:
        trainer = lightning.Trainer(
            max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Task(model), data)

    assert_like_plain(run(train))
