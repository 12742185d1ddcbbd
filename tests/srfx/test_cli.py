"""The command line, mostly called in this process; a few times as a user calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import srfx
from srfx.cli import DIFFERENT, FAILED, OK, USAGE, main
from srfx.files.exported import dynamic_axes, read_program
from tests.helpers import kill, randomized

ROOT = Path(__file__).parents[2]
X = torch.randn(2, 6, 4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def pruned() -> nn.Sequential:
    net = randomized(network())
    kill(net[0], rows=range(10))
    return net


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an exported model whose batch may be 1 to 64 and whose second axis is free."""
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens")}
    program = torch.export.export(pruned(), (X,), dynamic_shapes=(axes,))
    torch.export.save(program, tmp_path / "in.pt2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def limits(program: torch.export.ExportedProgram) -> list[dict[int, tuple[int, int | None]]]:
    return [{axis: (s.lower, s.upper) for axis, s in axes.items()} for axes in dynamic_axes(program)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


def test_from_pt2_to_pt2_with_the_same_dynamic_sizes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "minimize", "in.pt2", "out.pt2", "--verify", "--report", "report.html")
    assert code == OK
    assert "parameters  131 -> 51" in out
    assert "verified    equal" in out
    assert [line.split(" ...")[0] for line in err.splitlines() if " ..." in line] == [
        "reading in.pt2",
        "minimizing",
        "verifying",
        "writing out.pt2",
        "writing report.html",
    ]
    before, after = read_program("in.pt2"), read_program("out.pt2")
    assert limits(after) == limits(before) == [{0: (0, 64), 1: (0, None)}]
    for shape in ((2, 6, 4), (5, 3, 4), (1, 1, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(after.module()(x), before.module()(x))
    assert "<html" in (folder / "report.html").read_text()
    assert {p.name for p in folder.iterdir()} == {"in.pt2", "out.pt2", "report.html"}


def test_from_pt2_to_srfx_then_report_and_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "minimize", "in.pt2", "out.srfx", "--multiple-of", "4", "--quiet")[::2] == (OK, "")
    assert srfx.load("out.srfx").get_parameter("0.weight").shape == (8, 4)
    code, out, _ = run(capsys, "report", "out.srfx")
    assert code == OK
    assert "revived" in out
    code, out, _ = run(capsys, "report", "out.srfx", "--json")
    assert json.loads(out)["after"]["params"] == 8 * 4 + 8 + 3 * 8 + 3
    code, out, _ = run(capsys, "diff", "in.pt2", "out.srfx", "--verify")
    assert code == OK
    assert "0.weight" in out
    assert "3 tensors changed, 1 have the same shape" in out
    assert "verified    equal" in out
    code, out, _ = run(capsys, "diff", "in.pt2", "in.pt2", "--json")
    assert json.loads(out)["diff"]["changes"] == []
    assert run(capsys, "report", "out.srfx", "--html", "page.html")[0] == OK
    assert "<table" in Path("page.html").read_text()


def test_diff_tells_different_functions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = srfx.minimize(randomized(network(), seed=5), X)
    srfx.save(other, "other.srfx")
    code, out, _ = run(capsys, "diff", "in.pt2", "other.srfx", "--verify", "--json")
    assert code == DIFFERENT
    assert json.loads(out)["verification"]["ok"] is False


FACTORY = """
from torch import nn
width = 16
def make(): return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
class Space:
    make = staticmethod(make)
number = lambda: 3
def broken(): raise ImportError("this model needs gcc 2.95")
"""


def test_from_a_function_in_a_module(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "factories_of_this_test"
    Path(f"{name}.py").write_text(FACTORY)
    save_file(pruned().state_dict(), "w.safetensors")
    torch.save(pruned().state_dict(), "w.pt")
    for weights, source in (("w.safetensors", "make"), ("w.pt", "Space.make")):
        code, out, _ = run(
            capsys,
            "minimize",
            f"{name}:{source}",
            "out.pt2",
            "--weights",
            weights,
            "--input",
            "1x6x4",
            "--json",
        )
        assert code == OK
        assert json.loads(out)["report"]["after"]["params"] == 51
        assert limits(read_program("out.pt2")) == [{0: (0, None)}]
    code, _, err = run(capsys, "minimize", f"{name}:nothing", "out.pt2")
    assert (code, "has no 'nothing'" in err) == (FAILED, True)
    code, _, err = run(capsys, "minimize", f"{name}:number", "out.pt2")
    assert (code, "gives a int, not an nn.Module" in err) == (FAILED, True)
    code, _, err = run(capsys, "minimize", f"{name}:broken", "out.pt2")
    assert (code, "gcc 2.95" in err) == (FAILED, True)
    code, _, err = run(capsys, "minimize", "no_such_module_at_all:x", "out.pt2")
    assert (code, "there is no module 'no_such_module_at_all'" in err) == (FAILED, True)
    save_file({"x": torch.ones(1)}, "odd.safetensors")
    code, _, err = run(capsys, "minimize", f"{name}:make", "out.pt2", "--weights", "odd.safetensors")
    assert (code, "do not fit the model" in err) == (FAILED, True)
    code, _, err = run(capsys, "minimize", f"{name}:make", "out.pt2", "--weights", "gone.safetensors")
    assert (code, "there is no file gone.safetensors" in err) == (FAILED, True)
    torch.save(pruned(), "whole.pt")  # a pickled module, which would run code
    for odd in ("whole.pt", f"{name}.py"):
        code, _, err = run(capsys, "minimize", f"{name}:make", "out.pt2", "--weights", odd)
        assert (code, f"{odd} is no state dict" in err) == (FAILED, True)


def test_explain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "minimize", "in.pt2", "out.srfx", "--quiet")[0] == OK
    code, out, _ = run(capsys, "explain", "out.srfx", "0", "12")
    assert code == OK
    assert out.startswith("0.weight, axis 0, channel 12 (now 2) stays:")
    assert "it is an output of the model" in out
    code, out, _ = run(capsys, "explain", "out.srfx", "2.weight", "3", "--axis", "1", "--json")
    assert json.loads(out)["position"] is None
    code, out, err = run(capsys, "explain", "out.srfx", "nothing", "3")
    assert (code, out, "nothing" in err) == (FAILED, "", True)
    code, out, err = run(capsys, "explain", "out.srfx", "0", "16")
    assert (code, out, "there is no 16" in err) == (FAILED, "", True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("srfx mi", ["minimize"]),
        ("srfx ", ["minimize", "report", "diff", "explain", "completion", "--help", "--version"]),
        ("srfx explain x.srfx --a", ["--axis"]),
        ("srfx minimize --r", ["--ragged", "--report"]),
        ("srfx minimize in", []),  # files: the shell's own completion
    ],
)
def test_shell_completion(capsys: pytest.CaptureFixture[str], line: str, found: list[str]) -> None:
    code, script, _ = run(capsys, "completion")
    assert code == OK
    words = line.split(" ")
    script += f"\nCOMP_WORDS=({' '.join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}"
    script += '\n_srfx; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(found)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], USAGE, "usage"),
        (["minimize"], USAGE, "required: model, output"),
        (["minimize", "in.pt2", "out.srfx", "--multiple-of", "0"], USAGE, "not at least 1"),
        (["minimize", "missing.pt2", "out.srfx"], FAILED, "there is no file missing.pt2"),
        (["minimize", "in.pt2", "out.onnx"], FAILED, "ends in .srfx or .pt2"),
        (["minimize", "in.pt2", "nowhere/out.srfx"], FAILED, "no folder nowhere"),
        (["minimize", "in.pt2", "in.pt2"], FAILED, "in.pt2 would overwrite what it is made from"),
        (["minimize", "in.pt2", "out.pt2", "--report", "nowhere/x.html"], FAILED, "no folder nowhere"),
        (["explain", "in.pt2", "0", "1"], FAILED, "only .srfx files keep a plan"),
        (["explain", "missing.srfx", "0", "1"], FAILED, "missing.srfx"),
        (["minimize", "in.onnx", "out.srfx"], FAILED, "none of file.pt2"),
        (["minimize", "text.pt2", "out.srfx"], FAILED, "no zip archive"),
        (["minimize", "zip.pt2", "out.srfx"], FAILED, "cannot be read as an exported program"),
        (["minimize", "in.pt2", "out.srfx", "--weights", "x"], FAILED, "weights of its own"),
        (["minimize", "in.pt2", "out.srfx", "--input", "2y3"], FAILED, "'2y3' is no shape"),
        (["report", "in.pt2"], FAILED, "only .srfx files keep a report"),
        (["report", "text.srfx"], FAILED, "no safetensors file"),
        (["diff", "in.pt2", "missing.srfx"], FAILED, "missing.srfx"),
    ],
)
def test_errors(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    for name in ("text.pt2", "text.srfx"):
        Path(name).write_text("hello")
    torch.save({"a": 1}, "zip.pt2")
    before = sorted(folder.iterdir())
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert sorted(folder.iterdir()) == before


def test_a_wrong_result_is_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = srfx.minimize

    def wrong(*args: Any, **kwargs: Any) -> nn.Module:
        small = real(*args, **kwargs)
        with torch.no_grad():
            small.get_parameter("2.bias").add_(1)
        return small

    monkeypatch.setattr("srfx.cli.minimize", wrong)
    code, _, err = run(capsys, "minimize", "in.pt2", "out.srfx", "--verify")
    assert code == DIFFERENT
    assert "computes something else, nothing was written" in err
    assert not Path("out.srfx").exists()


def test_as_a_user_calls_it(folder: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "srfx", *arguments]
        return subprocess.run(
            command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )

    done = call("minimize", "in.pt2", "out.srfx", "--json", "--quiet")
    assert (done.returncode, done.stderr) == (OK, "")
    assert json.loads(done.stdout)["report"]["after"]["params"] == 51
    done = call("report", "in.pt2")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.startswith("srfx: in.pt2: only .srfx files")
