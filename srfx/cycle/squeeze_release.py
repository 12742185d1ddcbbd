"""The Squeeze-Release cycle around a training loop of the user's.

    start      minimize the model as given; its score is the reference
    cycle      train      under the penalty, so that structure appears
               squeeze    prune, train with the pruned weights held at zero
               minimize   exact; accepted if the score is within the tolerance
               release    zeros that are left become small noise
    finetune   train the best accepted model once more, without penalty

The state of a run is its history, the current and the best model, the masks, and the states of optimizer and random
generators; which phase comes next follows from the history alone.  So a run can be resumed after any phase.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.optim import Optimizer

from srfx.cycle import agree
from srfx.cycle.checkpoint import Checkpoint, Snapshot
from srfx.cycle.history import PhaseRecord, count, fruitless_cycles, smallest_accepted
from srfx.cycle.penalty import GroupPenalty, L1Penalty
from srfx.cycle.phase import Penalty, Phase, Train, call_train, set_mode
from srfx.cycle.progress import CycleProgress
from srfx.cycle.pruners import Pruner, prune_weights, zero_masks
from srfx.cycle.release import release
from srfx.cycle.schedule import Schedule, at
from srfx.cycle.state import (
    group_names,
    load_state,
    random_states,
    rebind,
    seed_all,
    set_random_states,
    state_of,
)
from srfx.errors import CycleError
from srfx.ir.clone import clone_structure
from srfx.minimize import minimize
from srfx.record.attach import record_of
from srfx.record.keep_plan import KeepPlan


class SqueezeRelease:
    """Make a network smaller in cycles: penalise, prune, minimize, release, train.

    Iterate over it for a `PhaseRecord` after each phase, or call `run`.  It stops after ``cycles``, or when
    ``patience`` cycles in a row bring no smaller model within the tolerance.

    Args:
        model: what `srfx.minimize` takes, trained already; never changed.
        train: trains a model in place, in training mode: ``train(model)`` or ``train(model, phase)``.  Any loop of any
            kind; penalty and masks act through the optimizer's step hooks (`srfx.cycle.phase`).
        evaluate: ``evaluate(model) -> float``, called in eval mode and without gradients.
        example_inputs: as for `srfx.minimize`.
        example_kwargs: as for `srfx.minimize`.
        cycles: how many at most.
        pruner: ``"global"``, ``"layer"``, ``"groups"`` or ``pruner(model, amount)``: see `srfx.cycle.pruners`.
        amount: share of the weights that is zero after pruning; a `Schedule`.
        prunable: which parameters are pruned, by name; default all that train and have two axes or more.
        penalty: strength of the group penalty; a `Schedule`.
        l1: strength of the L1 penalty; a `Schedule`.
        inputs: the group penalty counts input columns too, see `srfx.channel_groups`.
        penalise: phases in which the penalties act, of ``train`` and ``squeeze``.
        noise: allowed relative change of each layer when zeros are released, see `srfx.release`; None: they are never
            released, but held at zero from then on.
        release_inputs: real data to measure that change on; None bounds the weights' norms.
        tolerance: how much worse than the reference a score may be and still be accepted (in units of the score).
        mode: ``"max"`` if a larger score is better, ``"min"`` for losses.
        patience: cycles in a row without a smaller accepted model after which it stops.
        finetune: whether the best model is trained once more in the end.
        optimizer: an optimizer that lives through the whole run and is carried over by each plan; the training function
            finds it as ``phase.optimizer``.  Default: the training function makes its own.
        states: further objects with ``state_dict`` and ``load_state_dict`` that a checkpoint has to keep, by name:
            schedulers, samplers, a torch.Generator (``get_state``).
        checkpoint: folder to write after each phase and to resume from; None writes nothing.
        seed: of the release noise; and of all random generators, which are set to it when a run starts.  None leaves
            the generators alone.
        minimize_options: keyword arguments for `srfx.minimize`.
        progress: show what goes on, on a terminal.

    Attributes:
        history: records so far.
        model: the current model.
        best: the smallest accepted model.

    Raises:
        CycleError: options that do not fit, or a checkpoint of a run with other options.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(32, 4)
        >>> def train(model):
        ...     optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         (model(x) - x[:, :2]).square().mean().backward()
        ...         optimizer.step()
        >>> def evaluate(model):
        ...     return -(model(x) - x[:, :2]).square().mean().item()
        >>> cycle = SqueezeRelease(net, train, evaluate, x[:1], cycles=1, tolerance=1.0, progress=False)
        >>> [record.phase for record in cycle]
        ['start', 'squeeze', 'minimize', 'finetune']
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        train: Train,
        evaluate: Callable[[Any], float],
        example_inputs: Any = None,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        cycles: int = 10,
        pruner: Pruner = "global",
        amount: Schedule = 0.5,
        prunable: Callable[[str], bool] | None = None,
        penalty: Schedule = 0.0,
        l1: Schedule = 0.0,
        inputs: bool = False,
        penalise: Collection[str] = ("train",),
        noise: float | None = 0.05,
        release_inputs: Any = None,
        tolerance: float = 0.01,
        mode: Literal["max", "min"] = "max",
        patience: int = 1,
        finetune: bool = True,
        optimizer: Optimizer | None = None,
        states: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        seed: int | None = 0,
        minimize_options: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        if mode not in ("max", "min"):
            raise CycleError(f"mode is 'max' or 'min', got {mode!r}")
        unknown = set(penalise) - {"train", "squeeze"}
        if unknown:
            raise CycleError(f"penalties act in 'train' and 'squeeze'; got {sorted(unknown)}")
        if cycles < 0 or patience < 1:
            raise CycleError(f"expected cycles >= 0 and patience >= 1, got {cycles} and {patience}")
        self._original = model.module() if isinstance(model, ExportedProgram) else model
        self._train, self._evaluate = train, evaluate
        self._args, self._kwargs = example_inputs, example_kwargs
        self.cycles, self.patience, self.tolerance, self.mode = cycles, patience, tolerance, mode
        self._pruner, self._amount, self._prunable = pruner, amount, prunable
        self._penalty, self._l1, self._inputs, self._penalise = penalty, l1, inputs, tuple(penalise)
        self._noise, self._release_inputs, self._finetune = noise, release_inputs, finetune
        self._optimizer, self._states = optimizer, dict(states or {})
        self._seed, self._options = seed, dict(minimize_options or {})
        self._n_before = count(self._original)[0]
        self.history: list[PhaseRecord] = []
        self.model: fx.GraphModule | None = None
        self.best: fx.GraphModule | None = None
        self._masks: dict[str, Tensor] = {}
        self._progress = CycleProgress(progress and agree.rank() == 0, cycles)
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint)
        if self._checkpoint is not None:
            self._resume(self._checkpoint)

    # ------------------------------------------------------------------ use
    def run(self) -> fx.GraphModule:
        """Go through all phases that are left; the best accepted model, in eval mode."""
        for _ in self:
            pass
        assert self.best is not None
        return self.best

    def __iter__(self) -> Iterator[PhaseRecord]:
        """Run phase by phase; leave the loop at any time, and iterate again to go on."""
        with self._progress:
            while True:
                upcoming = self.upcoming
                if upcoming is None:
                    return
                yield self._run(*upcoming)

    @property
    def upcoming(self) -> tuple[int, str] | None:
        """Cycle and name of the next phase, None when the run has ended; follows from the history."""
        if not self.history:
            return 0, "start"
        last = self.history[-1]
        if last.phase == "finetune":
            return None
        if last.phase == "release":
            return last.cycle + 1, "train"
        if last.phase == "train":
            return last.cycle, "squeeze"
        if last.phase == "squeeze":
            return last.cycle, "minimize"
        if last.cycle >= self.cycles or fruitless_cycles(self.history) >= self.patience:
            return (last.cycle, "finetune") if self._finetune else None
        if last.phase == "start":
            return 1, "train" if "train" in self._penalise and self._is_penalised(1) else "squeeze"
        return (last.cycle, "release") if self._noise else (last.cycle + 1, "train")

    def is_better(self, score: float, other: float) -> bool:
        """Whether the first score is better than the second."""
        return score > other if self.mode == "max" else score < other

    # ------------------------------------------------------------------ phases
    def _run(self, cycle: int, name: str) -> PhaseRecord:
        self._progress.phase(cycle, name)
        if name == "start" and self._seed is not None:
            seed_all(self._seed)
        started, previous = time.perf_counter(), smallest_accepted(self.history, self.is_better)
        n_steps, score, plan = 0, None, None
        if name in ("start", "minimize"):
            plan = self._minimize(clone_structure(self._original) if self.model is None else self.model)
            score = self._score()
        elif name == "release":
            self._release(cycle)
        elif name == "train":
            n_steps = self._train_phase(cycle, name, self._masks)
        elif name == "squeeze":
            n_steps = self._squeeze(cycle)
        else:
            self._take_best()
            n_steps = self._train_phase(cycle, name, {})
            score = self._score()
        assert self.model is not None
        n_parameters, n_zeros = count(self.model)
        record = PhaseRecord(
            cycle,
            name,
            n_parameters,
            n_zeros,
            self._n_before / max(1, n_parameters),
            score,
            None if score is None else self._is_accepted(score),
            n_steps,
            time.perf_counter() - started,
            None if plan is None else plan.digest(),
        )
        self.history.append(record)
        best = smallest_accepted(self.history, self.is_better)
        is_new_best = best is record and best is not previous
        if is_new_best:
            self.best = copy.deepcopy(self.model)
        self._progress.done(record, best)
        if self._checkpoint is not None:
            self._checkpoint.write(self._snapshot(), is_new_best)
        return record

    def _minimize(self, model: nn.Module) -> KeepPlan:
        set_mode(model, is_training=False)
        small = minimize(model, self._args, example_kwargs=self._kwargs, **self._options)
        set_mode(small, is_training=False)
        found = record_of(small)
        assert found is not None
        agree.assert_same_plan(found.plan)
        if self._optimizer is not None:
            found.plan.apply_to_optimizer(self._optimizer, model, small)
        self.model = small
        names = {n for n, p in small.named_parameters() if p.requires_grad and p.dim() >= 2}
        self._masks = zero_masks(small, names) if self._noise is None and self.history else {}
        return found.plan

    def _squeeze(self, cycle: int) -> int:
        assert self.model is not None
        set_mode(self.model, is_training=False)
        self._masks = prune_weights(
            self.model,
            self._pruner,
            at(self._amount, cycle),
            prunable=self._prunable,
            groups=self._group_penalty,
        )
        return self._train_phase(cycle, "squeeze", self._masks)

    def _train_phase(self, cycle: int, name: str, masks: dict[str, Tensor]) -> int:
        assert self.model is not None
        penalties: list[tuple[float, Penalty]] = []
        if name in self._penalise:
            if at(self._penalty, cycle):
                penalties.append((at(self._penalty, cycle), self._group_penalty()))
            if at(self._l1, cycle):
                l1 = L1Penalty(self.model, self._args, example_kwargs=self._kwargs)
                penalties.append((at(self._l1, cycle), l1))
        set_mode(self.model, is_training=True)
        phase = Phase(cycle, name, self.model, self._optimizer, penalties, masks, on_step=self._progress.step)
        with phase.attached():
            call_train(self._train, phase)
        for p in self.model.parameters():
            p.grad = None
        set_mode(self.model, is_training=False)
        return phase.n_steps

    def _release(self, cycle: int) -> None:
        assert self.model is not None
        assert self._noise is not None
        seed = 1_000_003 * (self._seed or 0) + cycle
        release(self.model, self._noise, self._release_inputs, seed=seed, inplace=True)
        self._masks = {}

    def _take_best(self) -> None:
        """Go on with a copy of the best model; an optimizer that lives on starts afresh with it."""
        assert self.best is not None
        assert self.model is not None
        fresh = copy.deepcopy(self.best)
        if self._optimizer is not None:
            rebind(self._optimizer, group_names(self._optimizer, self.model), fresh)
        self.model, self._masks = fresh, {}

    def _group_penalty(self) -> GroupPenalty:
        assert self.model is not None
        return GroupPenalty(self.model, self._args, example_kwargs=self._kwargs, inputs=self._inputs)

    # ------------------------------------------------------------------ scores
    def _score(self) -> float:
        assert self.model is not None
        set_mode(self.model, is_training=False)
        with torch.no_grad():
            return agree.from_rank_0(float(self._evaluate(self.model)))

    def _is_accepted(self, score: float) -> bool:
        if not self.history:
            return True
        reference = self.history[0].score
        assert reference is not None
        return (
            score >= reference - self.tolerance if self.mode == "max" else score <= reference + self.tolerance
        )

    def _is_penalised(self, cycle: int) -> bool:
        return bool(at(self._penalty, cycle) or at(self._l1, cycle))

    # ------------------------------------------------------------------ checkpoint
    def _settings(self) -> dict[str, Any]:
        """Options that the numbers depend on, as far as they can be compared."""
        found = {
            "pruner": self._pruner,
            "amount": self._amount,
            "penalty": self._penalty,
            "l1": self._l1,
            "inputs": self._inputs,
            "penalise": sorted(self._penalise),
            "noise": self._noise,
            "tolerance": self.tolerance,
            "mode": self.mode,
            "seed": self._seed,
            "parameters": self._n_before,
        }
        return {
            k: "a function" if callable(v) else list(v) if isinstance(v, (tuple, list)) else v
            for k, v in found.items()
        }

    def _snapshot(self) -> Snapshot:
        assert self.model is not None
        states: dict[str, Any] = {"random": random_states()}
        states["users"] = {name: state_of(state) for name, state in self._states.items()}
        if self._optimizer is not None:
            held = self._optimizer.state_dict()
            states["optimizer"] = {"names": group_names(self._optimizer, self.model), **held}
        return Snapshot(self.history, self._settings(), self.model, self.best, self._masks, states)

    def _resume(self, checkpoint: Checkpoint) -> None:
        found = checkpoint.read(self._original)
        if found is None:
            return
        other = [
            f"{k} was {found.options.get(k)!r}, is {v!r}"
            for k, v in self._settings().items()
            if found.options.get(k) != v
        ]
        if other:
            raise CycleError(
                f"the checkpoint in {checkpoint.folder} is of a run with other options ({'; '.join(other)}): "
                "take those, or another folder"
            )
        if set(found.states["users"]) != set(self._states):
            raise CycleError(
                f"the checkpoint in {checkpoint.folder} keeps the states {sorted(found.states['users'])}, this run has "
                f"{sorted(self._states)}"
            )
        self.history, self.model, self.best, self._masks = found.history, found.model, found.best, found.masks
        if self._optimizer is not None:
            held = dict(found.states["optimizer"])
            rebind(self._optimizer, held.pop("names"), self.model)
            self._optimizer.load_state_dict(held)
        for name, state in self._states.items():
            load_state(state, found.states["users"][name])
        set_random_states(found.states["random"])
