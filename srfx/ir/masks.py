"""Weights that are computed before each forward pass, found in a module tree and replaced by their values.

Covers torch.nn.utils.prune (every method, containers), torch.nn.utils.parametrize (every parametrization;
also the sparsifiers of torch.ao.pruning and the new weight_norm, spectral_norm, orthogonal), and the hooks of
the old weight_norm and spectral_norm.  The tree is changed in place, so it has to be one the caller owns;
tensors of the model it was cloned from are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from srfx.ir.attrs import get_attr
from srfx.ir.clone import clone_structure
from srfx.ir.plan import Edit, Plan, Reason, Refusal

_HOOKS = {BasePruningMethod: "prune", WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}
_PARTS = {"prune": ("_orig", "_mask"), "weight_norm": ("_g", "_v"), "spectral_norm": ("_orig", "_u", "_v")}


@dataclass(frozen=True)
class BakeMask(Edit):
    """Replace one computed tensor by a parameter holding its value; ``node`` is the path of its module.

    Attributes:
        tensor: name of the tensor in the module, usually ``weight``.
        mechanism: ``prune``, ``prune_stale``, ``weight_norm``, ``spectral_norm`` or ``parametrize``.
        same_as: path of an already baked tensor with the same source and mask: the two stay tied.
    """

    tensor: str = "weight"
    mechanism: str = "prune"
    same_as: str | None = None


@dataclass
class _Seen:
    """Prunings met so far, to keep tied what was tied and masked alike."""

    by_source: dict[int, list[tuple[torch.Tensor, str]]] = field(default_factory=dict)

    def tied_to(self, orig: torch.Tensor, mask: torch.Tensor, path: str) -> str | None:
        known = self.by_source.setdefault(id(orig), [])
        for other_mask, other_path in known:
            if torch.equal(mask, other_mask):
                return other_path
        known.append((mask, path))
        return None


def find_masks(root: nn.Module) -> Plan:
    """Every computed tensor of the tree that has one value, as edits in tree order; the others as refusals.

    A weight of a MultiheadAttention's ``out_proj`` is read without calling it, so its hook never runs: what
    the model computes with is the tensor the hook left there (``prune_stale``).

    Refuses: TRAINING_MODE when the value changes from call to call (spectral norm in training mode, noise).
    """
    plan = Plan()
    seen = _Seen()
    unrun = {m.out_proj for m in root.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, module in root.named_modules():
        for hook in _weight_hooks(module):
            mechanism = _mechanism(hook)
            if mechanism == "spectral_norm" and module.training:
                plan.refusals.append(
                    Refusal(path, Reason.TRAINING_MODE, "spectral_norm iterates in training mode")
                )
                continue
            tensor = _hook_name(hook)
            same_as = None
            if mechanism == "prune" and module in unrun:
                mechanism = "prune_stale"
            elif mechanism == "prune":
                orig, mask = getattr(module, tensor + "_orig"), getattr(module, tensor + "_mask")
                same_as = seen.tied_to(orig, mask, f"{path}.{tensor}" if path else tensor)
            plan.edits.append(BakeMask(path, tensor, mechanism, same_as))
    # From the leaves up: a parametrization may hold parametrized modules.
    for path, module in reversed(list(root.named_modules())):
        if not parametrize.is_parametrized(module):
            continue
        parametrized = module.parametrizations
        assert isinstance(parametrized, nn.ModuleDict)
        values = [_twice(module, tensor) for tensor in parametrized]
        if all(value is not None for value in values):
            plan.edits += [BakeMask(path, tensor, "parametrize") for tensor in parametrized]
        else:
            plan.refusals.append(
                Refusal(path, Reason.TRAINING_MODE, "the parametrization changes at each call")
            )
    return plan


def bake(root: nn.Module, edit: BakeMask, keep: Collection[tuple[nn.Module, str]] = ()) -> None:
    """Carry out one edit of :func:`find_masks` on the same tree.

    Args:
        root: the tree.
        edit: what to bake.
        keep: (module, attribute) pairs that somebody else reads and that must not be deleted.
    """
    module = get_attr(root, edit.node) if edit.node else root
    tensor = edit.tensor
    if edit.mechanism == "parametrize":
        _bake_parametrization(module, tensor)
        return
    mechanism = edit.mechanism.removesuffix("_stale")
    hook = next(h for h in _weight_hooks(module) if _hook_name(h) == tensor and _mechanism(h) == mechanism)
    parts = [tensor + suffix for suffix in _PARTS[mechanism]]
    needs_grad = any(_needs_grad(module, part) for part in parts)
    if edit.same_as is not None:
        value = get_attr(root, edit.same_as)
    elif edit.mechanism == "prune_stale":
        value = getattr(module, tensor)
    else:
        value = _hook_value(module, hook)
    _remove_hook(module, hook)
    for part in parts:
        if (module, part) not in keep:
            _forget(module, part)
    _forget(module, tensor)
    _install(module, tensor, value, needs_grad)


def bake_all(root: nn.Module) -> Plan:
    """Find and bake everything in a tree that the caller owns; what was done and refused."""
    plan = find_masks(root)
    for edit in plan.edits:
        assert isinstance(edit, BakeMask)
        bake(root, edit)
    return plan


def _weight_hooks(module: nn.Module) -> list[object]:
    """Hooks that compute a weight: pruning first, since weight norm may read what pruning writes."""
    hooks = list(module._forward_pre_hooks.values())
    return [hook for kind in _HOOKS for hook in hooks if isinstance(hook, kind)]


def _mechanism(hook: object) -> str:
    return next(name for kind, name in _HOOKS.items() if isinstance(hook, kind))


def _hook_name(hook: object) -> str:
    name = "_tensor_name" if isinstance(hook, BasePruningMethod) else "name"
    return str(getattr(hook, name))


def _hook_value(module: nn.Module, hook: object) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(hook, BasePruningMethod):
            product: torch.Tensor = hook.apply_mask(module)  # exact, and nan where orig is inf or nan
            return product
        native = _call_weight_hook(module, hook)
        try:
            precise = _call_weight_hook(_in_float64(module), hook)
        except (RuntimeError, TypeError):  # the kernel has no float64 for this device
            return native
        return precise.to(native.dtype)


def _call_weight_hook(module: nn.Module, hook: object) -> torch.Tensor:
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    assert isinstance(hook, WeightNorm)
    value: torch.Tensor = hook.compute_weight(module)
    return value


def _in_float64(module: nn.Module) -> nn.Module:
    return clone_structure(module, lambda t: t.detach().double() if t.is_floating_point() else t)


def _twice(module: nn.Module, tensor: str) -> torch.Tensor | None:
    """The parametrized tensor in the native dtype, or None when two evaluations differ.

    Buffers are copied first (spectral norm in training mode writes them) and the random state is put back.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        scratch = clone_structure(module, lambda t: t.detach().clone())
        first, second = getattr(scratch, tensor).clone(), getattr(scratch, tensor)
    is_same = first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
    return first if is_same and torch.equal(first.isnan(), second.isnan()) else None


def _bake_parametrization(module: nn.Module, tensor: str) -> None:
    native = _twice(module, tensor)
    assert native is not None
    value = native
    try:
        precise = _twice(_in_float64(module), tensor)
    except (RuntimeError, TypeError):  # a parametrization with constants of a fixed dtype
        precise = None
    if precise is not None and native.is_floating_point():
        value = precise.to(native.dtype)
    parametrized: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    originals = list(parametrized[tensor].parameters(recurse=True))
    needs_grad = any(p.requires_grad for p in originals)
    del parametrized[tensor]
    if not len(parametrized):
        del module._modules["parametrizations"]
        _remove_load_hooks(
            module, lambda hook: getattr(hook, "__module__", "") == "torch.nn.utils.parametrizations"
        )
        # The class with the property is shared with the user's module: leave it alone, step back to its base.
        module.__class__ = module.__class__.__bases__[0]
    module.__dict__.setdefault("_srfx_baked", {})
    module.__dict__["_srfx_baked"][tensor] = (value, needs_grad, bool(originals))
    if "parametrizations" not in module._modules:
        for name, (baked, grad, is_parameter) in module.__dict__.pop("_srfx_baked").items():
            _install(module, name, baked, grad, is_parameter)


def _needs_grad(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _remove_hook(module: nn.Module, hook: object) -> None:
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    _remove_load_hooks(module, lambda other: getattr(other, "fn", None) is hook)


def _remove_load_hooks(module: nn.Module, is_meant: Callable[[Any], bool]) -> None:
    """Remove the hooks that translate state dicts of the mechanism that is gone."""
    for store in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, value in list(store.items()):
            if is_meant(getattr(value, "hook", value)):  # torch wraps load hooks
                del store[key]


def _forget(module: nn.Module, name: str) -> None:
    for store in (module._parameters, module._buffers, module.__dict__):
        store.pop(name, None)


def _install(
    module: nn.Module, name: str, value: torch.Tensor, needs_grad: bool, is_parameter: bool = True
) -> None:
    if not is_parameter:
        module.register_buffer(name, value.detach())
    elif isinstance(value, nn.Parameter):  # tied to one that is baked already
        setattr(module, name, value)
    else:
        setattr(module, name, nn.Parameter(value.detach(), requires_grad=needs_grad))
