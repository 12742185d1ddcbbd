"""What a model was before a test touched it, and both ways of tracing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_structure


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a user could notice: tensors by identity and value, hooks, flags, classes, the tree."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors = {**module._parameters, **module._buffers}
        tensors |= {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
        state[path] = {
            "self": id(module),
            "class": type(module),
            "training": module.training,
            "inplace": getattr(module, "inplace", None),
            "tensors": {k: (id(t), None if t is None else t.detach().clone()) for k, t in tensors.items()},
            "grad": {k: t.requires_grad for k, t in tensors.items() if t is not None},
            "hooks": [list(d.values()) for d in (module._forward_hooks, module._forward_pre_hooks)],
            "children": [(k, id(m)) for k, m in module._modules.items()],
        }
    return state


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for path, was in before.items():
        now = after[path]
        for key in ("self", "class", "training", "inplace", "grad", "hooks", "children"):
            assert now[key] == was[key], (path, key)
        assert list(now["tensors"]) == list(was["tensors"]), path
        for name, (identity, value) in was["tensors"].items():
            other_identity, other = now["tensors"][name]
            assert identity == other_identity, (path, name)
            assert value is None or torch.equal(value.nan_to_num(), other.nan_to_num()), (path, name)


def trace(model: nn.Module, args: tuple[Any, ...], route: str) -> fx.GraphModule:
    """``route``: "symbolic" or "export" (dynamic batch, not decomposed)."""
    if route == "symbolic":
        return fx.symbolic_trace(model)
    try:
        structure = _structure(model, args)
    except TypeError:  # an attribute that has no hash
        return _export(model, args).module()
    program = _exported.pop(structure, None) or _export(model, args)
    _exported[structure] = program
    if len(_exported) > N_EXPORTED:
        del _exported[next(iter(_exported))]
    for name, tensor in _tensors(model).items():
        (program.state_dict if name in program.state_dict else program.constants)[name] = tensor
    return program.module()


N_EXPORTED = 16
_exported: dict[Any, torch.export.ExportedProgram] = {}
"""The last programs: torch.export is slow, and many tests try one architecture with several sets of zeros."""


def _export(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    with torch.no_grad():
        return torch.export.export(model, args, dynamic_shapes=(shapes), strict=False)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor for part in named for name, tensor in part}


def _structure(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """All that torch.export looks at: classes, attributes, hooks, and of parameters, buffers and inputs all but the values.

    Functions, and tensors that are plain attributes, count by identity.

    Raises:
        TypeError: an attribute has no hash.
    """
    modules, tensors = dict(model.named_modules(remove_duplicate=False)), _tensors(model)
    first = {id(thing): name for name, thing in reversed([*modules.items(), *tensors.items()])}
    structure = (
        tuple((path, first[id(m)], type(m), _frozen(_attributes(m))) for path, m in modules.items()),
        tuple((path, first[id(t)], t.requires_grad, *_form(t)) for path, t in tensors.items()),
        tuple(_form(t) if isinstance(t, torch.Tensor) else (type(t), t) for t in tree_leaves(args)),
        str(tree_structure(args)),
        torch.get_default_dtype(),
    )
    hash(structure)
    return structure


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}


def _form(t: torch.Tensor) -> Any:
    return type(t), t.shape, t.stride(), t.dtype


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_frozen(item) for item in value)
    return type(value), frozenset(value) if isinstance(value, set) else value


def assert_same(expected: Any, got: Any) -> None:
    """Equal structure of tensors, dtypes, shapes; values to 1e-10 relative, nan equal to nan."""
    wanted, found = tree_leaves(expected), tree_leaves(got)
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12, equal_nan=True)
        else:
            assert a == b
