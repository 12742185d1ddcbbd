"""Runs for test_checkpoint: python -m tests.srfx.cycle.killed_run FOLDER MOMENT...; writes the last one's history.

For each MOMENT a process is forked that starts or resumes the run in FOLDER and dies by SIGKILL: ``replace:5`` in place
of its fifth ``os.replace``, ``fsync:7`` at its seventh ``os.fsync``, ``step:12`` at its twelfth optimizer step.  One more
process then runs to the end, and writes what came of it to FOLDER.json.  (Forked, since importing torch takes longer
than the runs.)

With ``every:replace`` in place of the moments, one run is killed at its first ``os.replace`` and resumed, the next at its
second, and so on until there is no further one; FOLDER.json then lists what came of each.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import srfx
from srfx.cycle.phase import Phase

torch.set_num_threads(1)


def make(folder: str | None) -> srfx.SqueezeRelease:
    """Everything random there is: dropout, shuffling by torch, Python and a generator; an optimizer that lives on."""
    torch.manual_seed(7)
    x = torch.randn(48, 6)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    shuffle = torch.Generator().manual_seed(3)

    def train(small: nn.Module, phase: Phase) -> None:
        for _ in range(6):
            batch = torch.randperm(48, generator=shuffle)[: 16 + random.randrange(8)]
            optimizer.zero_grad()
            F.cross_entropy(small(x[batch]), y[batch]).backward()
            happens("step")
            optimizer.step()
        scheduler.step()

    def evaluate(small: nn.Module) -> float:
        return -F.cross_entropy(small(x), y).item()

    return srfx.SqueezeRelease(
        model,
        train,
        evaluate,
        x[:2],
        cycles=2,
        pruner="groups",
        amount=0.4,
        penalty=1e-3,
        tolerance=1.0,
        patience=3,
        optimizer=optimizer,
        states={"scheduler": scheduler, "shuffle": shuffle},
        checkpoint=folder,
        progress=False,
    )


counts: Counter[str] = Counter()
moment = ""


def happens(what: str) -> None:
    """Count an event; the process dies at the one it was told."""
    counts[what] += 1
    if moment == f"{what}:{counts[what]}":
        os.kill(os.getpid(), signal.SIGKILL)


def summary(run: srfx.SqueezeRelease) -> dict[str, Any]:
    """The numbers that a resumed run has to repeat, to the last bit."""
    assert run.best is not None
    history = [{k: v for k, v in r.to_json().items() if k != "seconds"} for r in run.history]
    weights = {n: p.detach().double().sum().item().hex() for n, p in run.best.named_parameters()}
    return {"history": history, "weights": weights}


def live(folder: str, until: str) -> None:
    """One process, from its start to its end."""
    global moment
    moment = until
    replace, fsync = os.replace, os.fsync

    def dying_replace(*args: Any, **kwargs: Any) -> None:
        happens("replace")
        replace(*args, **kwargs)

    def dying_fsync(handle: int) -> None:
        happens("fsync")
        fsync(handle)

    os.replace, os.fsync = dying_replace, dying_fsync
    run = make(folder)
    run.run()
    Path(f"{folder}.json").write_text(json.dumps(summary(run)))


def fork(folder: str, until: str) -> int:
    """The status of one process."""
    child = os.fork()
    if not child:
        live(folder, until)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def at_every(folder: str, what: str) -> None:
    """One run for each event of a kind, killed there and resumed."""
    found = []
    while True:
        one = f"{folder}/{len(found)}"
        Path(one).mkdir(parents=True)
        status = fork(one, f"{what}:{len(found) + 1}")
        if status == 0:  # there are no more
            break
        if status != signal.SIGKILL or fork(one, "") != 0:
            sys.exit(f"{what}:{len(found) + 1}: status {status}, and it does not go on")
        found.append(json.loads(Path(f"{one}.json").read_text()))
    Path(f"{folder}.json").write_text(json.dumps(found))


def main(folder: str, moments: list[str]) -> None:
    """Fork a process for each moment; each has to die, the last one must not."""
    if moments[0].startswith("every:"):
        at_every(folder, moments[0].removeprefix("every:"))
        return
    for until in [*moments, ""]:
        status = fork(folder, until)
        expected = signal.SIGKILL if until else 0
        if status != expected:
            sys.exit(f"{until or 'the last process'}: status {status}, expected {expected}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
