"""A run on disk: after each phase a complete set of files, and one that names them, replaced last.

    state.json                    history, options, names of the files below; replaced atomically
    NNNN-model.srfx               the model after phase NNNN (`srfx.save`)
    NNNN-best.srfx                the best accepted model, written when it changes
    NNNN-rankR.safetensors        of each process: masks, optimizer, random generators, the user's own states

A process that is killed leaves either the old state.json or the new one, and all files that it names.  Files that it does
not name are removed with the next phase.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from srfx.cycle import agree
from srfx.cycle.history import PhaseRecord
from srfx.cycle.state import pack, unpack
from srfx.errors import CycleError, MissingArchitectureError
from srfx.files import load, save
from srfx.files.atomic import replacing

VERSION = 1


@dataclass
class Snapshot:
    """Everything that a run needs to go on."""

    history: list[PhaseRecord]
    options: dict[str, Any]
    model: fx.GraphModule
    best: fx.GraphModule | None
    masks: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)  # of this process


class Checkpoint:
    """The checkpoint folder of one run.

    Args:
        folder: made when it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.best_file: str | None = None

    @property
    def state_file(self) -> Path:
        """The file that says that a phase is complete."""
        return self.folder / "state.json"

    def write(self, snapshot: Snapshot, is_new_best: bool) -> None:
        """Called by every process after each phase.

        Raises:
            CycleError: a state that is no plain data.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        number = f"{len(snapshot.history):04d}"
        tensors: dict[str, Tensor] = {}
        data = pack({"masks": snapshot.masks, "states": snapshot.states}, tensors)
        own = f"{number}-rank{agree.rank()}.safetensors"
        with replacing(self.folder / own) as file:
            file.write(safetensors.torch.save(tensors, {"json": json.dumps(data)}))
        if agree.rank() == 0:
            save(snapshot.model, self.folder / f"{number}-model.srfx")
            if is_new_best and snapshot.best is not None:
                self.best_file = f"{number}-best.srfx"
                save(snapshot.best, self.folder / self.best_file)
        agree.barrier()
        if agree.rank() == 0:
            state = {
                "version": VERSION,
                "number": number,
                "n_processes": agree.n_processes(),
                "best": self.best_file,
                "options": snapshot.options,
                "history": [record.to_json() for record in snapshot.history],
            }
            with replacing(self.state_file) as file:
                file.write(json.dumps(state, indent=1).encode())
            self._clean(number)
        agree.barrier()

    def read(self, original: nn.Module | None) -> Snapshot | None:
        """The last complete phase, None when there is none.

        Args:
            original: for models that need code of their own, see `srfx.load`.

        Raises:
            CycleError: the folder is damaged, of another version, or of another number of processes.
        """
        if not self.state_file.exists():
            return None
        try:
            state = json.loads(self.state_file.read_text())
            if state["version"] != VERSION:
                raise CycleError(f"{self.state_file} is of version {state['version']}, expected {VERSION}")
            if state["n_processes"] != agree.n_processes():
                raise CycleError(
                    f"{self.folder} is the checkpoint of {state['n_processes']} processes, now there are "
                    f"{agree.n_processes()}"
                )
            self.best_file = state["best"]
            number, history = state["number"], [PhaseRecord(**record) for record in state["history"]]
            own = self.folder / f"{number}-rank{agree.rank()}.safetensors"
            with safe_open(own, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator
                found = unpack(json.loads(file.metadata()["json"]), tensors)
            options = state["options"]
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise CycleError(f"the checkpoint in {self.folder} is damaged: {error}") from error
        best = None if self.best_file is None else self._load(self.best_file, original)
        model = self._load(f"{number}-model.srfx", original)
        return Snapshot(history, options, model, best, found["masks"], found["states"])

    def _load(self, name: str, original: nn.Module | None) -> fx.GraphModule:
        try:
            return load(self.folder / name)
        except MissingArchitectureError:
            return load(self.folder / name, original)

    def _clean(self, number: str) -> None:
        for path in sorted(self.folder.iterdir()):
            is_ours = path.name[:4].isdigit() and path.name[4:5] == "-"
            is_part = path.name.startswith(".") and path.name.endswith(".part")
            if (is_ours and not path.name.startswith(number) and path.name != self.best_file) or is_part:
                path.unlink(missing_ok=True)
