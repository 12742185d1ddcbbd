"""The command line: ``srfx minimize``, ``srfx report``, ``srfx explain``, ``srfx diff``.

What a command finds out goes to standard output, its progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import fx

from srfx.completion import bash
from srfx.errors import PlanError, SrfxError, VerificationError
from srfx.explain import explain
from srfx.files import load, save
from srfx.files.exported import export_again, write_program
from srfx.files.sources import ReadModel, read_model
from srfx.minimize import minimize
from srfx.report import report
from srfx.report.diff import diff
from srfx.verify import Verification, verify

OK, FAILED, USAGE, DIFFERENT = 0, 1, 2, 3
"""Exit codes: done; something is wrong with a file or a model; wrong arguments; the two models compute different things."""

MODEL = "file.pt2, file.srfx, or package.module:factory"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else USAGE
    run: Callable[[argparse.Namespace, _Progress], int] = options.run
    try:
        return run(options, _Progress(options.quiet))
    except BrokenPipeError:  # `srfx report x.srfx | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (SrfxError, OSError, ImportError) as error:
        if options.debug:
            raise
        print(f"srfx: {error}", file=sys.stderr)
        return DIFFERENT if isinstance(error, VerificationError) else FAILED


class _Progress:
    """One line for each step, with the seconds it took."""

    def __init__(self, is_quiet: bool) -> None:
        self.is_quiet = is_quiet

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        if not self.is_quiet:
            print(f"{what} ...", end="", file=sys.stderr, flush=True)
        try:
            yield
        except BaseException:
            if not self.is_quiet:
                print(file=sys.stderr)
            raise
        if not self.is_quiet:
            print(f" {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="srfx", description="Rewrite a pruned network into a smaller dense one that computes the same."
    )
    parser.add_argument("--version", action="version", version=f"srfx {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = _add(commands, "minimize", _minimize, "make a model smaller")
    command.add_argument(
        "model", help=f"{MODEL}; Python modules are run, .pt2 files are unpickled by PyTorch"
    )
    command.add_argument("output", help="where to: a file ending in .srfx or .pt2")
    command.add_argument("--weights", metavar="FILE", help="state dict for package.module:factory")
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of an input, in order: 1x3x224x224, 2x16:int64, or by keyword mask=2x16:bool",
    )
    command.add_argument(
        "--multiple-of", type=_positive, default=1, metavar="N", help="keep channel counts at multiples of N"
    )
    command.add_argument(
        "--ragged",
        nargs="?",
        const="yes",
        choices=("yes", "auto"),
        help="let each layer read and write channels of its own; auto: where that is not slower",
    )
    command.add_argument("--verify", action="store_true", help="run both models and compare")
    command.add_argument("--report", metavar="FILE", help="write a report as HTML (or JSON, by the ending)")

    command = _add(commands, "report", _report, "what was done to a minimized model, and why not more")
    command.add_argument("file", help="a .srfx file")
    command.add_argument("--html", metavar="FILE", help="write it as HTML instead")

    command = _add(commands, "diff", _diff, "what differs between two models")
    command.add_argument("before", help=MODEL)
    command.add_argument("after", help=MODEL)
    command.add_argument("--verify", action="store_true", help="run both on generated inputs and compare")

    command = _add(commands, "explain", _explain, "why a channel of a minimized model is still there")
    command.add_argument("file", help="a .srfx file")
    command.add_argument("layer", help="name of a layer or of a parameter")
    command.add_argument("channel", type=int, help="which channel, in the numbering of the original")
    command.add_argument(
        "--axis", type=int, default=0, help="0: what the layer gives (default); 1: what it reads"
    )

    command = commands.add_parser("completion", help="print a completion script for bash (and zsh)")
    command.set_defaults(run=_completion, quiet=True, debug=False)
    return parser


def _add(commands: Any, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress")
    command.add_argument("--debug", action="store_true", help="show where an error came from")
    command.set_defaults(run=run)
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _version() -> str:
    try:
        return version("srfx")
    except PackageNotFoundError:
        return "(not installed)"


def _minimize(options: argparse.Namespace, progress: _Progress) -> int:
    target = Path(options.output)
    if target.suffix not in (".srfx", ".pt2"):
        raise SrfxError(f"{target}: the output ends in .srfx or .pt2")
    for path in (target, Path(options.report or target)):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
    for given in filter(None, (options.model, options.weights)):
        if target.exists() and Path(given).exists() and target.samefile(given):
            raise SrfxError(f"{target} would overwrite what it is made from; give the output another name")
    with progress(f"reading {options.model}"):
        source = read_model(options.model, options.weights, options.input)
    with progress("minimizing"):
        small = minimize(
            source.model,
            source.args,
            example_kwargs=source.kwargs,
            multiple_of=options.multiple_of,
            ragged="auto" if options.ragged == "auto" else options.ragged is not None,
        )
    found = None
    if options.verify:
        with progress("verifying"):
            found = verify(source.model, small)
        if not found.ok:
            raise VerificationError(
                f"the minimized model computes something else, nothing was written: {found}"
            )
    with progress(f"writing {target}"):
        _write(small, source, target)
    summary = report(small)
    if options.report:
        with progress(f"writing {options.report}"):
            report(small, source.model, explain=True).save(options.report)
    if options.json:
        print(json.dumps({"report": summary.to_dict(), "verification": _numbers(found)}, sort_keys=True))
    else:
        print(summary)
        if found is not None:
            print(f"verified    {found}")
    return OK


def _write(small: fx.GraphModule, source: ReadModel, target: Path) -> None:
    if target.suffix == ".srfx":
        save(small, target)
    else:
        write_program(export_again(small, source.axes), target)


def _report(options: argparse.Namespace, progress: _Progress) -> int:
    if not options.file.endswith(".srfx"):
        raise PlanError(
            f"{options.file}: only .srfx files keep a report; `srfx minimize --report` writes one for .pt2"
        )
    with progress(f"reading {options.file}"):
        found = report(load(options.file), explain=bool(options.html))
    if options.html:
        found.save(options.html)
    else:
        print(found.to_json() if options.json else found)
    return OK


def _explain(options: argparse.Namespace, progress: _Progress) -> int:
    if not options.file.endswith(".srfx"):
        raise PlanError(
            f"{options.file}: only .srfx files keep a plan; `srfx minimize MODEL FILE.srfx` writes one"
        )
    with progress(f"reading {options.file}"):
        small = load(options.file)
    with progress("explaining"):
        found = explain(small, options.layer, options.channel, options.axis)
    print(json.dumps(found.to_dict(), sort_keys=True) if options.json else found)
    return OK


def _completion(options: argparse.Namespace, progress: _Progress) -> int:
    print(bash(_parser()))
    return OK


def _diff(options: argparse.Namespace, progress: _Progress) -> int:
    models = []
    for source in (options.before, options.after):
        with progress(f"reading {source}"):
            models.append(read_model(source).model)
    found = diff(*models)
    verified = None
    if options.verify:
        with progress("verifying"):
            verified = verify(*models)
    if options.json:
        print(json.dumps({"diff": found.to_dict(), "verification": _numbers(verified)}, sort_keys=True))
    else:
        print(found)
        if verified is not None:
            print(f"verified    {verified}")
    return OK if verified is None or verified.ok else DIFFERENT


def _numbers(found: Verification | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "ok": found.ok,
        "error": found.error,
        "error_bound": found.error_bound,
        "native_before": found.native_before,
        "native_after": found.native_after,
        "native_bound": found.native_bound,
        "n_mismatches": found.n_mismatches,
        "dtype": str(found.dtype).removeprefix("torch."),
    }
