"""Carry an optimizer over to the minimized model: its parameters, moments and groups.

A minimized parameter is a selection of the original's channels, and so is every state tensor that belongs to it.  The
gradient of a kept weight is the same in both models, so the next step is the one that the masked model would have taken.
What each kind of tensor gets:

    kept, perhaps cut          its state, cut alike; single numbers (the step count) as they are
    folded bias                the same: a bias that took up constants has the gradient that it had
    rescaled RMS norm weight   the same, not rescaled (w' = c w has the gradient g / c, with c = sqrt(C / K))
    changed matrix entry       zero state: the column now multiplies another value (a norm's statistic, or a channel
                               that carries the constants of others into a padded convolution)
    created (a new bias)       no state; it joins the group of a parameter of the same module, else the first group.
                               Fused SGD cannot do without: zero momentum, which comes to the same
    split (a fused projection) the parts count as created
    copied (heads in groups)   the state of what it is a copy of, cut as the copy is; it joins the group of that
    removed                    leaves its group with its state; a group may become empty, and stays
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srfx.errors import PlanError
from srfx.ir.attrs import split_path
from srfx.ir.capture import unwrap
from srfx.ir.editor import take
from srfx.ir.live import effective_name, live_tensor

if TYPE_CHECKING:
    from srfx.record.keep_plan import KeepPlan, TensorPlan


def carry_optimizer(plan: KeepPlan, optimizer: Optimizer, before: nn.Module, after: nn.Module) -> None:
    """See `KeepPlan.apply_to_optimizer`.  Everything is computed before the first write."""
    names = {id(p): effective_name(n) for n, p in unwrap(before).named_parameters()}
    target = {n: p for n, p in unwrap(after).named_parameters(remove_duplicate=False) if p.requires_grad}
    plans = {n: t for t in plan.tensors for n in (t.name, *t.aliases)}
    held = {names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    if not held:
        raise PlanError("the optimizer holds no parameter of the model that was minimized")
    copies = _copies(plan, plans, target)
    groups: list[list[tuple[Tensor, str | None]]] = []
    state: dict[Tensor, Any] = {}
    placed: dict[int, None] = {}
    for group in optimizer.param_groups:
        members: list[tuple[Tensor, str | None]] = []
        for p in group["params"]:
            name = names.get(id(p))
            if name is None:  # not the model's
                members.append((p, None))
                state[p] = optimizer.state.get(p)
                continue
            found = plans.get(name)
            if found is None:
                continue
            results = [(found, name, _result(found, target)), *copies.get(found.name, ())]
            for laid_out, its_name, new in results:
                if new is None:
                    continue
                members.append((new, its_name))
                placed[id(new)] = None
                if p in optimizer.state:
                    fresh = _changed(laid_out, live_tensor(before, name).detach(), new.detach())
                    state[new] = {
                        key: _cut_state(laid_out, key, value, fresh)
                        for key, value in optimizer.state[p].items()
                    }
        groups.append(members)
    for name, p in target.items():
        if id(p) not in placed:
            placed[id(p)] = None
            if _is_new(name, plans.get(name), held, set(names.values())):
                groups[_group_of(name, groups)].append((p, name))
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        if group.get("fused") and group.get("momentum"):
            _fill_momentum([p for p, _ in members], state)
    _write(optimizer, groups, state)


def _fill_momentum(members: list[Tensor], state: dict[Tensor, Any]) -> None:
    """Zero momentum for created parameters of fused SGD, which steps with all buffers of a group or with none.

    Its first step is then that of a parameter without state, times 1 - dampening.
    """
    key = "momentum_buffer"
    if any((state.get(p) or {}).get(key) is not None for p in members):
        for p in members:
            held = state.setdefault(p, {})
            if held is None or held.get(key) is None:
                state[p] = {**(held or {}), key: torch.zeros_like(p)}


def _result(found: TensorPlan | None, target: dict[str, nn.Parameter]) -> nn.Parameter | None:
    """The parameter of the result that a planned tensor became."""
    if found is None or found.status != "kept":
        return None
    return next((target[n] for n in (found.name, *found.aliases) if n in target), None)


def _copies(
    plan: KeepPlan, plans: dict[str, TensorPlan], target: dict[str, nn.Parameter]
) -> dict[str, list[tuple[TensorPlan, str, nn.Parameter | None]]]:
    """Copies of each tensor of the source: what is kept of it there, their names, and the parameters."""
    found: dict[str, list[tuple[TensorPlan, str, nn.Parameter | None]]] = {}
    for made in plan.tensors:
        if made.origin:
            laid_out = replace(plans[made.origin], cuts=made.cuts)
            found.setdefault(made.origin, []).append((laid_out, made.name, target.get(made.name)))
    return found


def _is_new(name: str, found: TensorPlan | None, held: set[str], known: set[str]) -> bool:
    """Whether minimize made it, in contrast to a parameter that the optimizer was not given before either."""
    if found is not None and found.origin in known:  # a copy of one that the optimizer was not given
        return False
    names = {name} if found is None else {found.name, *found.aliases}
    return not names & known or (found is not None and found.status == "created" and not names & held)


def _group_of(name: str, groups: list[list[tuple[Tensor, str | None]]]) -> int:
    """The group that holds another parameter of the same module, of the nearest parent that has one, else the first."""
    path = name
    while path:
        path, _ = split_path(path)
        prefix = f"{path}." if path else ""
        for i, members in enumerate(groups):
            if any(other is not None and other.startswith(prefix) for _, other in members):
                return i
    return 0


def _changed(found: TensorPlan, before: Tensor, after: Tensor) -> Tensor | None:
    """Entries of a matrix that hold another value than before, None when there are none."""
    if before.dim() < 2:
        return None
    changed = cut(found, before) != after
    return changed if bool(changed.any()) else None


def cut(found: TensorPlan, tensor: Tensor) -> Tensor:
    """What a plan keeps of a tensor laid out like the planned one; an axis of size 1 is left alone.

    Raises:
        PlanError: another axis has another size than the plan says.
    """
    n_axes = tensor.dim()
    if n_axes != len(found.shape) or any(
        n not in (1, m) for n, m in zip(tensor.shape, found.shape, strict=True)
    ):
        raise PlanError(
            f"{found.name} is {list(found.shape)} in the plan, the tensor is {list(tensor.shape)}"
        )
    for step in found.cuts:
        if tensor.shape[step.axis] == 1 and step.size != 1:
            continue
        index = torch.tensor(step.kept, dtype=torch.long).view(step.layout)
        tensor = take(tensor, step.axis, index)
    return tensor


def _cut_state(found: TensorPlan, key: str, value: Any, fresh: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or (value.numel() == 1 and tuple(value.shape) != found.shape):
        return value.clone() if isinstance(value, Tensor) else value
    try:
        kept = cut(found, value)
    except PlanError as error:
        raise PlanError(
            f"the optimizer's {key!r} of {found.name} is {list(value.shape)}, which is not laid out like the parameter "
            f"{list(found.shape)}: make a new optimizer"
        ) from error
    kept = kept.clone(memory_format=torch.preserve_format)
    if fresh is not None and kept.shape == fresh.shape:
        kept = kept.masked_fill_(fresh, 0)
    return kept


def _write(
    optimizer: Optimizer, groups: list[list[tuple[Tensor, str | None]]], state: dict[Tensor, Any]
) -> None:
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        if "param_names" in group:
            old = {id(p): n for p, n in zip(group["params"], group["param_names"], strict=True)}
            group["param_names"] = [old.get(id(p), name) for p, name in members]
        group["params"] = [p for p, _ in members]
    optimizer.state.clear()
    optimizer.state.update({p: s for p, s in state.items() if s is not None})
