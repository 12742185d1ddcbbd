"""ragged="auto": decided by the costs of a machine, which are measured once and cached."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx import MachineCosts
from srfx.minimize import minimize
from srfx.passes import _machine_costs
from tests.helpers import assert_equivalent, kill, randomized, shapes
from tests.passes.test_ragged_reads_writes import residual

FREE = MachineCosts(0.0, 1e-11, 1e-11, 1e-10, 1e-10, 0.0, 0.0, 0.0)
"""Copies take no time."""
SLOW = MachineCosts(1.0, 1e-11, 1e-11, 1e-10, 1e-10, 1e-10, 1.0, 1.0)
"""A copy takes a second."""


def test_ports_open_where_copies_are_cheap() -> None:
    x = torch.randn(2, 3, 6, 6).double()
    gm = fx.symbolic_trace(residual().double())
    small = minimize(gm, x, ragged=FREE)
    assert shapes(small) == shapes(minimize(gm, x, ragged=True))
    assert srfx.report(small).timing["predicted_saving_ms"] > 0
    assert "predicted to save" in str(srfx.report(small))
    assert_equivalent(gm, small, (x,))


def test_ports_stay_closed_where_copies_are_dear() -> None:
    x = torch.randn(2, 3, 6, 6).double()
    gm = fx.symbolic_trace(residual().double())
    small = minimize(gm, x, ragged=SLOW)
    assert shapes(small) == shapes(minimize(gm, x))
    assert srfx.report(small).timing == {}


def test_each_kind_of_copy_has_its_price() -> None:
    """A slice copies bytes; an index selects; what a branch writes is spread."""
    x, no_index, no_slice = torch.randn(3, 20), replace(FREE, select_s=1.0), replace(FREE, byte_s=1.0)
    for columns, is_slice in ((range(6), True), (range(0, 20, 2), False)):
        layer = randomized(nn.Sequential(nn.Linear(20, 8)))
        kill(layer[0], columns=columns)
        width = 20 - len(columns)
        for costs, is_cut in ((FREE, True), (no_index, is_slice), (no_slice, not is_slice)):
            small = minimize(fx.symbolic_trace(layer), x, ragged=costs)
            assert shapes(small)["0.weight"] == (8, width if is_cut else 20)
    planes = minimize(
        fx.symbolic_trace(residual()), torch.randn(2, 3, 6, 6), ragged=replace(no_slice, spread_s=1.0)
    )
    assert shapes(planes)["conv2.weight"] == (16, 12, 3, 3)


class Chained(nn.Module):
    """Elementwise ops before, between and behind two layers, one of which does not read all."""

    def __init__(self, n_ops: int) -> None:
        super().__init__()
        self.front, self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.n_ops = n_ops

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for _ in range(self.n_ops):
            x = x.tanh()
        return self.a(x) + self.b(x)


def test_elementwise_ops_save_nothing() -> None:
    """A compiler fuses them, so that a port pays no more often behind a long chain than behind a short one."""

    def predicted(n_ops: int) -> float:
        model = randomized(Chained(n_ops))
        kill(model.a, columns=range(6), rows=range(4), bias=True)
        small = minimize(fx.symbolic_trace(model), torch.randn(3, 5), ragged=replace(FREE, byte_s=1e-13))
        return srfx.report(small).timing["predicted_saving_ms"]

    assert predicted(1) == pytest.approx(predicted(5))


def test_auto_measures_and_keeps_the_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_machine_costs, "measure_costs", lambda device="cpu": FREE)
    x = torch.randn(2, 3, 6, 6).double()
    gm = fx.symbolic_trace(residual().double())
    small = minimize(gm, x, ragged="auto")
    timing = srfx.report(small).timing
    is_ragged = bool(timing["is_ragged"])
    assert not is_ragged or timing["ragged_ms"] <= 0.97 * timing["aligned_ms"]
    assert shapes(small)["conv1.weight"] == (12, 12 if is_ragged else 16, 3, 3)
    assert "measured: aligned" in str(srfx.report(small))
    assert_equivalent(gm, small, (x,))
    assert len(list(tmp_path.glob("srfx/machine-*.json"))) == 1


@pytest.mark.parametrize(
    ("aligned", "ragged", "is_ragged"),
    [
        ([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], True),
        ([1.0, 1.0, 1.0], [0.5, 1.1, 1.1], False),  # one lucky call
        ([1.0, 4.0, 4.0], [1.0, 3.0, 3.0], False),  # others were busy while the aligned one ran
    ],
)
def test_auto_wants_both_the_least_times_and_most_turns(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    aligned: list[float],
    ragged: list[float],
    is_ragged: bool,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_machine_costs, "measure_costs", lambda device="cpu": FREE)
    turns = [list(t) for t in zip(aligned, ragged, strict=True)]
    monkeypatch.setattr(importlib.import_module("srfx.minimize"), "turns_s", lambda *_, **__: turns)
    small = minimize(fx.symbolic_trace(residual()), torch.randn(2, 3, 6, 6), ragged="auto")
    assert srfx.report(small).timing["is_ragged"] == is_ragged
    assert shapes(small)["conv1.weight"] == (12, 12 if is_ragged else 16, 3, 3)


@pytest.mark.parametrize("is_training", [False, True])
def test_exported_models_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_training: bool
) -> None:
    """The training flag of an exported graph says nothing; statistics that a run would update do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_machine_costs, "measure_costs", lambda device="cpu": FREE)
    x = torch.randn(2, 3, 6, 6)
    gm = torch.export.export(residual().train(is_training), (x,)).module()
    assert gm.training
    small = minimize(gm, x, ragged="auto")
    assert ("aligned_ms" in srfx.report(small).timing) == (not is_training)


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dropout in training mode is run, and the user's random numbers are as they were; modules of others are not run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_machine_costs, "measure_costs", lambda device="cpu": FREE)

    class Counter(nn.Module):
        n_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.n_calls += self.training
            return x.tanh()

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Counter) or super().is_leaf_module(m, name)

    for tail in (nn.Dropout(0.5), Counter()):
        layer = randomized(nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 8))).train()
        kill(layer[0], columns=range(6))
        layer.append(tail.train())
        state = torch.get_rng_state()
        Counter.n_calls = 0
        gm = fx.GraphModule(layer, Leaf().trace(layer))
        small = minimize(gm, torch.randn(3, 20, generator=torch.Generator()), ragged="auto")
        assert torch.equal(torch.get_rng_state(), state)
        assert ("aligned_ms" in srfx.report(small).timing) == isinstance(tail, nn.Dropout)


def test_the_cache_is_read_and_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [FREE, SLOW]
    monkeypatch.setattr(_machine_costs, "measure_costs", lambda device="cpu": found.pop())
    assert srfx.machine_costs() == SLOW
    assert srfx.machine_costs() == SLOW
    (path,) = tmp_path.glob("srfx/*")
    path.write_text("{}")
    assert srfx.machine_costs() == FREE
    assert srfx.machine_costs() == FREE


def test_costs_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(_machine_costs, "measure_costs", lambda device="cpu": FREE)
    assert srfx.machine_costs() == FREE


def test_measured_costs_are_numbers() -> None:
    found = srfx.passes._machine_costs.measure_costs()
    assert all(0 < value < 1 for value in vars(found).values())
    with pytest.raises(ValueError, match="expected the numbers"):
        MachineCosts.from_json("{}")
