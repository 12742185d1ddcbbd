"""Two processes under torchrun: penalty, masks, records, checkpoints, and plans that differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_two_processes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.srfx.cycle.two_ranks", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for way in ("ddp", "fsdp"):
        assert zero[way] == one[way], "the ranks end with equal weights"
        for name, values in zero["alone"].items():
            torch.testing.assert_close(
                torch.tensor(zero[way][name]),
                torch.tensor(values),
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    assert zero["run"] == one["run"]
    assert [r["phase"] for r in zero["run"]] == ["start", "squeeze", "minimize"]
    assert [r["score"] for r in zero["run"]] == [1.0, None, 0.9]
    assert {p.name for p in (tmp_path / "checkpoint").iterdir()} >= {
        "0003-rank0.safetensors",
        "0003-rank1.safetensors",
    }
    assert zero["disagreement"].startswith(
        "minimize made another plan on rank 1 than on rank 0 (this is rank 0"
    )
    assert "this is rank 1" in one["disagreement"]
