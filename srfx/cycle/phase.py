"""What the cycle does to a training loop that it does not see: penalty and masks, through the optimizer's own hooks.

Before each step of an optimizer that holds parameters of the model, the gradient of the penalty is added and the
gradients of pruned weights are zeroed; after it, pruned weights are zeroed again (momentum and decay may move them).
So the user's loop stays as it is, whatever computes its gradients: accumulation, DistributedDataParallel, autocast with
a GradScaler, a closure.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from srfx.cycle.penalty import GroupPenalty, L1Penalty
from srfx.ir.capture import unwrap
from srfx.ir.live import like, parameter

Penalty = GroupPenalty | L1Penalty


@dataclass
class Phase:
    """One call of the user's training function; handed to it as second argument, if it takes one.

    Attributes:
        cycle: number of the cycle, from 1; the last fine-tuning has that of the last cycle.
        name: ``train``, ``squeeze`` (pruned weights are held at zero) or ``finetune`` (the last one, of the best model).
        optimizer: the one given to `srfx.SqueezeRelease`, None when the training function makes its own.
        penalties: penalties with their strengths; their gradients are added before each optimizer step.
        masks: pruned parameters: True where a weight stays.
        n_steps: optimizer steps so far.
    """

    cycle: int
    name: str
    model: nn.Module
    optimizer: Optimizer | None = None
    penalties: Sequence[tuple[float, Penalty]] = ()
    masks: dict[str, Tensor] = field(default_factory=dict)
    n_steps: int = 0
    on_step: Callable[[], None] | None = None

    def watch(self, model: nn.Module) -> None:
        """Act on another module with the same parameter names: a sharded or otherwise wrapped copy that trains instead.

        Not needed for DistributedDataParallel, torch.compile, or ``fully_shard`` on the model itself.
        """
        self.model = unwrap(model)
        self.hold()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Penalty and masks act on every optimizer step within the block."""
        handles = (
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        )
        try:
            self.hold()
            yield
            self.hold()
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add_gradients(self, only: set[int] | None = None, scale: float | Tensor = 1.0) -> None:
        """Penalty gradients in, gradients of pruned weights out; called before each step."""
        chosen = None if only is None else [p for p in self.model.parameters() if id(p) in only]
        for strength, penalty in self.penalties:
            if strength:
                penalty.add_gradients(self.model, float(strength * scale), chosen)
        for name, mask in self.masks.items():
            p = parameter(self.model, name)
            if p.grad is not None and (only is None or id(p) in only):
                p.grad.mul_(like(mask.to(p.device, p.grad.dtype), p.grad))

    @torch.no_grad()
    def hold(self, only: set[int] | None = None) -> None:
        """Zero the pruned weights; called after each step."""
        for name, mask in self.masks.items():
            p = parameter(self.model, name)
            if only is None or id(p) in only:
                p.mul_(like(mask.to(p.device, p.dtype), p))

    def _of(self, optimizer: Optimizer) -> set[int]:
        """Parameters of the model that an optimizer holds, by identity."""
        ours = {id(p) for p in self.model.parameters()}
        return ours & {id(p) for group in optimizer.param_groups for p in group["params"]}

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        only = self._of(optimizer)
        if not only:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, when the step itself unscales

        def add() -> None:
            self.add_gradients(only, 1.0 if scale is None else scale)

        if closure is None:
            add()
            return None

        def wrapped() -> Any:
            with torch.enable_grad():
                loss = closure()
            add()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        only = self._of(optimizer)
        if only:
            self.hold(only)
            self.n_steps += 1
            if self.on_step is not None:
                self.on_step()


Train = Callable[..., object]
"""``train(model)`` or ``train(model, phase)``: trains in place; see `Phase`.  The phase is handed over
when there is a parameter of that name, or a second one without a default."""


def call_train(train: Train, phase: Phase) -> None:
    """Call the user's training function, with the phase if it takes one."""
    if not _takes_phase(train):
        train(phase.model)
    elif "phase" in inspect.signature(train).parameters:
        train(phase.model, phase=phase)
    else:
        train(phase.model, phase)


def _takes_phase(train: Train) -> bool:
    """Whether the training function has a parameter named ``phase``, or a second one without a default."""
    try:
        found = list(inspect.signature(train).parameters.values())
    except ValueError:  # a builtin without a signature
        return False
    second = found[1] if len(found) > 1 else None
    is_second = (
        second is not None
        and second.default is second.empty
        and second.kind in (second.POSITIONAL_ONLY, second.POSITIONAL_OR_KEYWORD)
    )
    return is_second or any(p.name == "phase" for p in found)


def set_mode(model: nn.Module, *, is_training: bool) -> None:
    """Training or eval mode; set by hand, since exported graphs refuse `train` and `eval`."""
    for module in model.modules():
        module.training = is_training
