"""Draw models at random and hold minimize against what it promises; go on where the last run stopped.

    python -m benchmarks.fuzz --count 20000 --seed 0        # writes out/fuzz/progress.json and failing programs

A failing program is made smaller and written as Python that runs by itself.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from srfx.testing.check import Case, Skip, idempotent, never_more, run, same_function
from srfx.testing.programs import Program, of_seed, replay, shrink


def verdict(program: Program, route: str, ragged: bool = False) -> str:
    """Empty when all is well; what is wrong, in one line; or what kept a check from being made.

    "skip: ..." when the model tells nothing, "partly: ..." when only idempotence could not be asked.
    """
    try:
        model, inputs = program.build()
        run(model, inputs(2))
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        return f"skip: the program itself fails: {type(error).__name__}: {error}"
    try:
        try:
            case = Case(model, inputs, route, ragged)
        except Skip:
            if route != "symbolic":
                raise
            case = Case(model, inputs, "export", ragged)  # torch.fx does not trace writes by item
        same_function(case)
        never_more(case)
        try:
            idempotent(case)
        except Skip as skip:
            return f"partly: {skip}"
    except Skip as skip:
        return f"skip: {str(skip)[:60]}"
    except Exception as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = str(error).strip().splitlines()
        return f"{type(error).__name__} in {Path(where.filename).name}:{where.name}: {first[0][:160] if first else ''}"
    return ""


def route_of(seed: int, every: int) -> str:
    """Most programs are traced by symbolic_trace, which is quick; those that it cannot trace are exported."""
    if every and seed % every == 0:
        return "export" if seed // every % 3 else "decomposed"
    return "symbolic"


def kind(message: str) -> str:
    """What two failures of one cause have in common."""
    return message.split(":")[0] + (":" + message.split(":")[1] if ":" in message else "")


def main() -> None:
    """Run, and go on where the progress file says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--export-every", type=int, default=10, help="export every n-th program; 0: none")
    parser.add_argument(
        "--ragged-every", type=int, default=7, help="ragged=True for every n-th program; 0: none"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--shrink", type=int, default=0, help="tries to make each failing program smaller")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    progress = args.out / f"progress-{args.seed}.json"
    state: dict[str, Any] = {"next": args.seed, "fine": 0, "skipped": {}, "failed": []}
    if progress.exists():
        state = json.loads(progress.read_text())
    skipped, begun = Counter(state["skipped"]), time.monotonic()
    while state["next"] < args.seed + args.count and time.monotonic() - begun < 60 * args.minutes:
        seed = state["next"]
        route = route_of(seed, args.export_every)
        ragged = bool(args.ragged_every) and seed % args.ragged_every == 0
        message = verdict(of_seed(seed), route, ragged)
        route += ", ragged" if ragged else ""
        if message.startswith(("skip", "partly")):
            skipped[message[:70]] += 1
            state["fine"] += message.startswith("partly")
        elif message:
            state["failed"].append([seed, route, message])
            print(f"seed {seed} ({route}): {message}", flush=True)
            report(args.out, seed, route, message, args.shrink)
        else:
            state["fine"] += 1
        state["next"] = seed + 1
        if seed % 50 == 0 or message:
            state["skipped"] = dict(skipped)
            write(progress, state)
        if seed % 500 == 499:
            rate = (seed + 1 - args.seed) / max(1e-9, time.monotonic() - begun)
            print(
                f"{seed + 1}: {state['fine']} fine, {len(state['failed'])} failed, {rate:.1f}/s", flush=True
            )
    state["skipped"] = dict(skipped)
    write(progress, state)
    print(f"{state['next'] - args.seed} models: {state['fine']} fine, {len(state['failed'])} failed, "
          f"{sum(n for m, n in skipped.items() if m.startswith('skip'))} skipped")  # fmt: skip
    for message, n in skipped.most_common():
        print(f"  {n:5} {message}")


def write(path: Path, state: dict[str, Any]) -> None:
    """In one step, so that an interrupted run leaves the last state whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state))
    part.replace(path)


def report(out: Path, seed: int, route: str, message: str, budget: int) -> None:
    """Write the failing program, made smaller by up to ``budget`` tries."""
    choices = of_seed(seed).choices
    wanted, name, ragged = kind(message), route.split(",")[0], "ragged" in route
    small = (
        choices
        if not budget
        else shrink(choices, lambda c: kind(verdict(replay(c), name, ragged)) == wanted, budget)
    )
    program = replay(small)
    (out / f"failure-{seed}.py").write_text(
        f"# seed {seed}, route {route}: {verdict(program, name, ragged)}\n{program.source}"
    )


if __name__ == "__main__":
    main()
