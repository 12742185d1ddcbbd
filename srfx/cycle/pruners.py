"""Which weights to zero: magnitude pruning of torch.nn.utils.prune on any graph, and of whole groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from srfx.cycle.groups import NO_GROUP
from srfx.cycle.penalty import GroupPenalty
from srfx.errors import CycleError
from srfx.ir.masks import bake_all

Pruner = Literal["global", "layer", "groups"] | Callable[[nn.Module, float], object]
"""``global``: the smallest weights, wherever they are.  ``layer``: the smallest of each tensor.  ``groups``: the groups of
`srfx.channel_groups` with the smallest root mean square.  Or a function of model and amount that zeroes weights or
installs the hooks of torch.nn.utils.prune."""

_METHODS = ("global", "layer", "groups")


def prune_weights(
    model: nn.Module,
    pruner: Pruner,
    amount: float,
    *,
    prunable: Callable[[str], bool] | None = None,
    groups: Callable[[], GroupPenalty] | None = None,
) -> dict[str, Tensor]:
    """Zero weights of a model in place.

    Args:
        model: without hooks.
        pruner: see `Pruner`.
        amount: share of the prunable weights that is zero afterwards, in 0..1 (of a function of the user's: what it makes
            of it).
        prunable: which parameters are pruned, by name; default those that train and have at least two axes.  A user's
            function is not bound by it.
        groups: makes the group penalty of the model, for ``groups``.

    Returns:
        For each prunable parameter that holds zeros: True where a weight stays.

    Raises:
        CycleError: unknown pruner, an amount outside 0..1, or a parametrization that cannot be baked.
    """
    if not 0 <= amount < 1:
        raise CycleError(f"the amount to prune is a share, 0 <= amount < 1; got {amount}")
    chosen = {n: p for n, p in model.named_parameters() if _is_prunable(n, p, prunable)}
    if callable(pruner):
        pruner(model, amount)
        refused = bake_all(model).refusals
        if refused:
            raise CycleError(
                f"the mask that the pruner put on {refused[0].node} cannot be read: {refused[0].detail}"
            )
        chosen = {
            n: p for n, p in model.named_parameters() if p.requires_grad and (n in chosen or p.dim() > 1)
        }
    elif pruner == "groups":
        assert groups is not None
        _prune_groups(model, groups(), amount)
    elif pruner in ("global", "layer"):
        _prune_magnitude(chosen, pruner, amount)
    else:
        raise CycleError(
            f"pruner is one of {', '.join(_METHODS)}, or a function of model and amount; got {pruner!r}"
        )
    return zero_masks(model, set(chosen))


def zero_masks(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """True where a weight is not zero, for those of the named parameters that hold zeros."""
    masks = {n: p.detach() != 0 for n, p in model.named_parameters() if n in names}
    return {n: mask for n, mask in masks.items() if not bool(mask.all())}


def _is_prunable(name: str, p: nn.Parameter, prunable: Callable[[str], bool] | None) -> bool:
    if not p.requires_grad or not p.is_floating_point():
        return False
    return prunable(name) if prunable is not None else p.dim() >= 2


@torch.no_grad()
def _prune_magnitude(chosen: dict[str, nn.Parameter], method: str, amount: float) -> None:
    """torch.nn.utils.prune on scratch modules: hooks on the graph's own modules need not run (ATen graphs)."""
    holders = []
    for p in chosen.values():
        holder = nn.Module()
        holder.register_parameter("weight", nn.Parameter(p.detach(), requires_grad=False))
        holders.append(holder)
    if method == "global":
        if holders:
            prune.global_unstructured(
                [(h, "weight") for h in holders], pruning_method=prune.L1Unstructured, amount=amount
            )
    else:
        for holder in holders:
            prune.l1_unstructured(holder, "weight", amount)
    for holder, p in zip(holders, chosen.values(), strict=True):
        mask = holder.get_buffer("weight_mask")
        p.mul_(mask)


@torch.no_grad()
def _prune_groups(model: nn.Module, penalty: GroupPenalty, amount: float) -> None:
    """Zero the groups of least root mean square until they hold ``amount`` of all weights in groups."""
    sizes = penalty.sizes.double()
    mean = penalty.norms(model).cpu().double().square() / sizes.clamp(min=1)
    order = mean.argsort(stable=True)
    gone = torch.zeros(len(sizes) + 1, dtype=torch.bool)
    gone[order[sizes[order].cumsum(0) <= amount * sizes.sum()]] = True
    parameters = dict(model.named_parameters())
    for s in penalty.groups.slices:
        if not s.is_bias:
            groups = torch.where(s.groups == NO_GROUP, len(sizes), s.groups)
            p = parameters[s.name]
            p.masked_fill_(gone[groups].to(p.device), 0.0)
