"""Checkpoints: plain files, refused when they do not fit, and a killed run ends with the numbers of a whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import srfx
from srfx.cycle.state import pack, random_states, set_random_states, unpack
from srfx.errors import CycleError
from tests.srfx.cycle.killed_run import make, summary

ROOT = Path(__file__).parents[3]


def test_a_killed_run_ends_as_a_whole_one(tmp_path: Path) -> None:
    whole = make(str(tmp_path / "whole"))
    whole.run()
    killed = tmp_path / "killed"
    # in the middle of training; while a file is written; between the model and the state; before the state is there
    moments = ("step:9", "fsync:3", "replace:4", "replace:3")
    command = [sys.executable, "-m", "tests.srfx.cycle.killed_run", str(killed), *moments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "killed.json").read_text())
    assert found == json.loads(json.dumps(summary(whole)))
    left = sorted(p.name for p in killed.iterdir())
    number = f"{len(whole.history):04d}"
    assert [n for n in left if not n.endswith("best.srfx")] == [
        f"{number}-model.srfx",
        f"{number}-rank0.safetensors",
        "state.json",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute; on a busy machine many times that
@pytest.mark.parametrize("what", ["replace", "fsync", "step"])
def test_killed_at_every_moment(tmp_path: Path, what: str) -> None:
    """Before each rename, within each write, in each training step: all there is that could be lost or half done."""
    whole = make(None)
    whole.run()
    command = [sys.executable, "-m", "tests.srfx.cycle.killed_run", str(tmp_path / "runs"), f"every:{what}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "runs.json").read_text())
    wanted = json.loads(json.dumps(summary(whole)))
    n_phases = len(whole.history)
    assert len(found) >= (3 * n_phases if what != "step" else sum(r.n_steps for r in whole.history))
    assert [i for i, one in enumerate(found) if one != wanted] == []


def test_leaving_the_loop_and_going_on(tmp_path: Path) -> None:
    whole = make(None)
    whole.run()
    for n_phases in (1, 4):  # one phase, then four more from a fresh start
        part = make(str(tmp_path))
        for _, record in zip(range(n_phases), part, strict=False):
            assert record is part.history[-1]
    again = make(str(tmp_path))
    assert len(again.history) == 5
    again.run()
    assert summary(again) == summary(whole)
    finished = make(str(tmp_path))
    assert finished.upcoming is None
    assert [r.phase for r in finished] == []
    assert summary(finished) == summary(whole)
    assert isinstance(finished.run(), torch.fx.GraphModule)


def test_no_pickle(tmp_path: Path) -> None:
    run = make(str(tmp_path))
    next(iter(run))
    for path in tmp_path.iterdir():
        head = path.read_bytes()[:2]
        assert path.suffix in (".json", ".srfx", ".safetensors")
        assert head not in (b"PK", b"\x80\x02", b"\x80\x04")


def simple(folder: Path, **options: Any) -> srfx.SqueezeRelease:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    given = {"cycles": 1, "progress": False, "checkpoint": folder, "tolerance": 1.0} | options
    return srfx.SqueezeRelease(net, lambda _: None, lambda _: 0.0, torch.zeros(1, 3), **given)


def test_another_run_is_refused(tmp_path: Path) -> None:
    simple(tmp_path, amount=0.4).run()
    with pytest.raises(CycleError, match=r"amount was 0\.4, is 0\.6"):
        simple(tmp_path, amount=0.6)
    with pytest.raises(CycleError, match=r"keeps the states \[\], this run has \['extra'\]"):
        simple(tmp_path, amount=0.4, states={"extra": torch.Generator()})
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"n_processes": 4}))
    with pytest.raises(CycleError, match="of 4 processes"):
        simple(tmp_path, amount=0.4)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CycleError, match="damaged"):
        simple(tmp_path, amount=0.4)


def test_states_round_trip_and_odd_ones_are_refused() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "a": [1, 2.5, None, True, "x", (3, torch.arange(3))],
        4: Counter({2: 3}),
        "inf": float("inf"),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
    }
    back = unpack(json.loads(json.dumps(pack(state, tensors))), tensors)
    assert back["a"][:5] == state["a"][:5]
    assert isinstance(back["a"][5], tuple)
    assert torch.equal(back["a"][5][1], torch.arange(3))
    assert back[4] == Counter({2: 3})
    assert isinstance(back[4], Counter)
    assert back["inf"] == float("inf")
    assert back["bf16"].dtype == torch.bfloat16
    with pytest.raises(CycleError, match=r"state\.a\.0 is a function"):
        pack({"a": [make]}, {})


def test_random_generators_come_back() -> None:
    import random

    import numpy as np

    tensors: dict[str, torch.Tensor] = {}
    data = json.loads(json.dumps(pack(random_states(), tensors)))
    drawn = [(random.random(), float(np.random.rand()), float(torch.rand(()))) for _ in range(3)]
    set_random_states(unpack(data, tensors))
    assert [(random.random(), float(np.random.rand()), float(torch.rand(()))) for _ in range(3)] == drawn
