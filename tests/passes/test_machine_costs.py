"""ragged="auto": decided by the costs of a machine, which are measured once and cached."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import fx

import srfx
from srfx import MachineCosts
from srfx.minimize import minimize
from srfx.passes import _machine_costs
from tests.helpers import assert_equivalent, shapes
from tests.passes.test_ragged_reads_writes import residual, two_readers

FREE = MachineCosts(0.0, 1e-11, 1e-11, 1e-10, 1e-10, 1e-10, 0.0, 0.0, 0.0, 0.0)
"""Copies take no time."""
SLOW = MachineCosts(1.0, 1e-11, 1e-11, 1e-10, 1e-10, 1e-10, 1.0, 1.0, 1.0, 1.0)
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
    """Selections along the last axis may be dear while those of planes are cheap."""
    dear_last = MachineCosts(0.0, 1e-11, 1e-11, 1e-10, 1e-10, 1e-10, 0.0, 1.0, 0.0, 1.0)
    rows = minimize(fx.symbolic_trace(two_readers()), torch.randn(3, 5), ragged=dear_last)
    assert shapes(rows)["a.weight"] == (16, 16)
    planes = minimize(fx.symbolic_trace(residual()), torch.randn(2, 3, 6, 6), ragged=dear_last)
    assert shapes(planes)["conv1.weight"] == (12, 12, 3, 3)


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
