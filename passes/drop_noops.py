"""Remove calls that return their operand and always will, and calls that nobody reads.

Before: y = dropout(x[:, :], 0.1, False)      After: y = x
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from srfx.ir.aliases import Kind, mutation_barriers, value_kinds
from srfx.ir.attrs import get_attr
from srfx.ir.dead_code import is_removable, remove_dead_nodes
from srfx.ir.effects import op_name
from srfx.ir.exported import is_check
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.passes.base import Pass, register_pass

aten = torch.ops.aten

# name of the flag, its position, its default, position of p
_DROPOUTS: dict[Any, tuple[str, int, bool]] = {
    F.dropout: ("training", 2, True),
    F.dropout1d: ("training", 2, True),
    F.dropout2d: ("training", 2, True),
    F.dropout3d: ("training", 2, True),
    F.alpha_dropout: ("training", 2, False),
    F.feature_alpha_dropout: ("training", 2, False),
    torch.dropout: ("train", 2, True),
    torch.alpha_dropout: ("train", 2, True),
    torch.feature_dropout: ("train", 2, True),
    torch.feature_alpha_dropout: ("train", 2, True),
    aten.dropout.default: ("train", 2, True),
    aten.alpha_dropout.default: ("train", 2, True),
    aten.feature_dropout.default: ("train", 2, True),
    aten.feature_alpha_dropout.default: ("train", 2, True),
}
_MAX_INT = sys.maxsize
_SHAPE_READS = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "layout"})
_SHAPE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "nelement", "stride"})


@dataclass(frozen=True)
class DropNoop(Edit):
    """Let the readers of ``node`` read ``operand``; None: nobody reads it."""

    operand: str | None = None


@register_pass("drop-noops")
class DropNoops(Pass):
    """Drop what is a no-op for good: baked dropout, Identity, alias, full slices, asserts, and what nobody reads.

    Kept, since they live on: ``nn.Dropout`` modules (``.train()`` switches them on again), ``detach`` where a
    gradient could arrive, ``contiguous``, ``clone`` and casts.  Asserts go when they look at nothing but
    shapes, dtypes and devices; those were true when the model was traced or will fail in the ops themselves.

    Refuses: MUTATION when the storage is written in place; OPAQUE_HOOK when the module has hooks.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every no-op in node order."""
        plan = Plan()
        barred = mutation_barriers(gm)
        kinds = value_kinds(gm.graph)
        gradients = _may_carry_gradients(gm)
        for node in gm.graph.nodes:
            if _is_shape_assert(node) or (not node.users and is_removable(node)):
                plan.edits.append(DropNoop(node.name))
                continue
            operand = _operand_of_noop(gm, node, kinds, gradients)
            if operand is None:
                continue
            if node in barred:
                plan.refusals.append(Refusal(node.name, Reason.MUTATION))
            elif node.op == "call_module" and _has_hooks(get_attr(gm, str(node.target))):
                plan.refusals.append(Refusal(node.name, Reason.OPAQUE_HOOK))
            else:
                plan.edits.append(DropNoop(node.name, operand.name))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Drop one."""
        assert isinstance(edit, DropNoop)
        node = next(n for n in gm.graph.nodes if n.name == edit.node)
        if edit.operand is not None:  # not by its name: an edit before this one may have dropped the operand
            node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)

    def finish(self, gm: fx.GraphModule) -> None:
        """Remove what only the dropped calls read."""
        remove_dead_nodes(gm)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _operand_of_noop(
    gm: fx.GraphModule, node: fx.Node, kinds: dict[fx.Node, Kind], gradients: dict[fx.Node, bool]
) -> fx.Node | None:
    """The operand that ``node`` returns unchanged, when it is a no-op for good."""
    if node.op in ("placeholder", "get_attr", "output") or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if not (node.args and node.args[0] is source):
        return source if _is_baked_dropout(node) and node.kwargs.get("input") is source else None
    if node.op == "call_module":
        return source if type(get_attr(gm, str(node.target))) is nn.Identity else None
    name = op_name(node)
    if node.target is aten.alias.default:
        return source
    if name in ("detach", "lift_fresh_copy", "lift_fresh"):
        return source if not gradients[source] else None
    if node.target is aten.slice.Tensor:
        return source if _is_full_slice(node) else None
    if name in ("getitem", "__getitem__") and kinds[source] is Kind.TENSOR:
        return source if _is_full_index(node.args[1]) else None
    return source if _is_baked_dropout(node) else None


def _is_baked_dropout(node: fx.Node) -> bool:
    if node.target is _stochastic_depth():
        return _argument(node, "training", 3, True) is False or _argument(node, "p", 1, 1.0) == 0.0
    flag = _DROPOUTS.get(node.target)
    return flag is not None and (_argument(node, *flag) is False or _argument(node, "p", 1, 0.5) == 0)


def _stochastic_depth() -> Callable[..., Any] | None:
    """The function of torchvision, if that is loaded at all (fx wraps it into graphs)."""
    module = sys.modules.get("torchvision.ops.stochastic_depth")
    return getattr(module, "stochastic_depth", None)


def _argument(node: fx.Node, name: str, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_full_slice(node: fx.Node) -> bool:
    start, end, step = (
        _argument(node, n, i, d) for n, i, d in (("start", 2, None), ("end", 3, None), ("step", 4, 1))
    )
    return start in (None, 0) and (end is None or end == _MAX_INT) and step == 1


def _is_full_index(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items)


def _is_shape_assert(node: fx.Node) -> bool:
    if node.users or not (node.target is torch._assert or is_check(node)):
        return False
    if is_check(node):
        return True
    return _reads_only_shapes(node.args[0] if node.args else node.kwargs.get("condition"))


def _reads_only_shapes(condition: Any) -> bool:
    """Walk back from a condition; shape reads end the walk, anything else that makes tensors fails it."""
    if not isinstance(condition, fx.Node):
        return True
    stack, seen = [condition], {condition}
    while stack:
        node = stack.pop()
        if node.target is getattr and node.args[1] in _SHAPE_READS:
            continue
        if node.op == "call_method" and node.target in _SHAPE_METHODS:
            continue
        module = getattr(node.target, "__module__", "")
        if node.op != "call_function" or (
            module not in ("_operator", "math", "builtins") and not _is_symbolic(node)
        ):
            return False
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        stack += fresh
    return True


def _is_symbolic(node: fx.Node) -> bool:
    return op_name(node) in ("sym_size", "sym_numel", "sym_int", "sym_not", "sym_max", "sym_min", "_assert")


def _may_carry_gradients(gm: fx.GraphModule) -> dict[fx.Node, bool]:
    """Whether a gradient could flow to each value, from a trainable parameter or a floating-point input."""
    carries: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            carries[node] = False
        elif node.op == "get_attr":
            carries[node] = bool(getattr(get_attr(gm, str(node.target)), "requires_grad", False))
        else:
            carries[node] = node.op in ("placeholder", "call_module") or any(
                carries[s] for s in node.all_input_nodes
            )
    return carries
