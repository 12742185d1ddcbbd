"""Do the tests notice when a rule, an analysis or a pass is wrong?  Breaks one line at a time and runs them.

For every entry of `mutations.py`, srfx, passes and tests are copied, one line is changed, and the tests that mirror it
run until one fails; the file that fails has to pass on the unbroken tree. A mutant that survives all of them is
printed: a test is missing. Each mutant runs in a forked process, so that torch is loaded once.
Run: make mutants, or python -m benchmarks.mutants [--only TEXT] [--list] [--again]
What was found goes to benchmarks/results/mutants.json after each; a run goes on with those that it does not name.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401 - loaded before the fork
import pytest
import torch
import torch.export
import torch.fx

from benchmarks.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
LIMIT_S = 420
"""A test file that takes more of the processor's time hangs: a rule that never settles."""
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"


def changed(mutation: Mutation) -> str:
    """The source with the one line changed.

    Raises:
        SystemExit: the line is not there, or there twice; the list has to follow the code.
    """
    text = (ROOT / mutation.path).read_text()
    n_found = text.count(mutation.old)
    if n_found != 1 or mutation.old == mutation.new:
        raise SystemExit(
            f"{mutation.path} has {mutation.old!r} {n_found} times: mend benchmarks/mutations.py"
        )
    return text.replace(mutation.old, mutation.new)


def copied(target: Path) -> None:
    """A tree of its own to break."""
    for name in ("passes", "tests", "srfx"):
        shutil.copytree(
            ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "setup.cfg", target)


def noticed_by(mutation: Mutation, place: Path) -> str | None:
    """The first file of tests that fails with this line changed; None when all pass.

    Raises:
        SystemExit: that file fails without the change too, so it shows nothing.
    """
    found = _failing(mutation, place)
    if found is not None and not passes_unbroken(found, place):
        raise SystemExit(f"{found} fails on the unbroken tree: mend that first")
    return found


@functools.cache
def passes_unbroken(path: str, place: Path) -> bool:
    """Whether the tests of one file pass as things are."""
    return run(path, place) == 0


def _failing(mutation: Mutation, place: Path) -> str | None:
    original = (place / mutation.path).read_text()
    (place / mutation.path).write_text(changed(mutation))
    try:
        for path in mutation.tests:
            if run(path, place) != 0:
                return path
        return None
    finally:
        (place / mutation.path).write_text(original)


def run(path: str, place: Path) -> int:
    """The exit code of pytest on one file, in a forked process that reads the broken tree."""
    child = os.fork()
    if child == 0:
        code = 1
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
        try:
            os.chdir(place)
            for name in [n for n in sys.modules if n.split(".")[0] in ("srfx", "tests")]:
                del sys.modules[name]
            sys.path.insert(0, str(place))
            sys.dont_write_bytecode = True
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                code = int(
                    pytest.main(
                        [path, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
                    )
                )
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Try them all; exit 1 when one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose file or line contains this text")
    parser.add_argument("--list", action="store_true", help="check that every line is there, and stop")
    parser.add_argument("--again", action="store_true", help="try those too that were noticed before")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m.path or args.only in m.old]
    for mutation in chosen:
        changed(mutation)
    known = {entry["change"]: entry for entry in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    if not args.again:
        chosen = [m for m in chosen if not known.get(change(m), {}).get("noticed_by")]
    print(f"{len(chosen)} mutants to try of {len(MUTATIONS)}")
    if args.list:
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        copied(place)
        for mutation in chosen:
            start = time.perf_counter()
            found, seconds = noticed_by(mutation, place), round(time.perf_counter() - start, 1)
            known[change(mutation)] = {"change": change(mutation), "noticed_by": found, "seconds": seconds}
            write([known[change(m)] for m in MUTATIONS if change(m) in known])
            print(f"{'noticed' if found else 'SURVIVED':>8} {seconds:6.1f} s  {change(mutation)}", flush=True)
    left = [m for m in MUTATIONS if change(m) in known and not known[change(m)]["noticed_by"]]
    for mutation in left:
        print(f"no test of {', '.join(mutation.tests)} notices {change(mutation)}")
    n_tried = sum(change(m) in known for m in MUTATIONS)
    print(f"{len(MUTATIONS)} mutants, {n_tried} tried, {len(left)} survive")
    sys.exit(1 if left else 0)


def change(mutation: Mutation) -> str:
    """The mutant in one line."""
    return f"{mutation.path}: {mutation.old.strip()} -> {mutation.new.strip() or 'nothing'}"


def write(entries: list[dict[str, object]]) -> None:
    """In one step, so that an interrupted run leaves the last state whole."""
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(entries, indent=1) + "\n")
    part.replace(RESULTS)


if __name__ == "__main__":
    main()
