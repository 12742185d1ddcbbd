"""Do the tests notice when a rule, an analysis or a pass is wrong?  Breaks one line at a time and runs them.

For every entry of `mutations.py`, srfx, passes and tests are copied, one line is changed, and the tests that mirror it
run until one fails. A mutant that survives all of them is printed: a test is missing. Each mutant runs in a forked
process, so that torch is loaded once.
Run: make mutants, or python -m benchmarks.mutants [--only TEXT] [--list]
"""

from __future__ import annotations

import argparse
import contextlib
import os
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


def survives(mutation: Mutation, place: Path) -> str | None:
    """None when some test fails with this line changed; else what was tried."""
    original = (place / mutation.path).read_text()
    (place / mutation.path).write_text(changed(mutation))
    try:
        for path in mutation.tests:
            if run(path, place) != 0:
                return None
        return ", ".join(mutation.tests)
    finally:
        (place / mutation.path).write_text(original)


def run(path: str, place: Path) -> int:
    """The exit code of pytest on one file, in a forked process that reads the broken tree."""
    child = os.fork()
    if child == 0:
        code = 1
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
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Try them all; exit 1 when one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose file or line contains this text")
    parser.add_argument("--list", action="store_true", help="check that every line is there, and stop")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m.path or args.only in m.old]
    for mutation in chosen:
        changed(mutation)
    print(f"{len(chosen)} mutants")
    if args.list:
        return
    torch.set_num_threads(1)
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        copied(place)
        for mutation in chosen:
            start = time.perf_counter()
            left = survives(mutation, place)
            word = "killed" if left is None else "SURVIVED"
            line = mutation.old.strip().splitlines()[0][:80]
            print(f"{word:>8} {time.perf_counter() - start:6.1f} s  {mutation.path}: {line}", flush=True)
            if left is not None:
                survivors.append((mutation, left))
    for mutation, left in survivors:
        print(
            f"no test of {left} notices, in {mutation.path}:\n- {mutation.old.strip()}\n+ {mutation.new.strip()}"
        )
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
