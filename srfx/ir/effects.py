"""Which nodes write to their operands, which results share storage with an operand, and which are random."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

INPLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_,
    operator.ixor: operator.xor, operator.ilshift: operator.lshift, operator.irshift: operator.rshift,
    operator.imatmul: operator.matmul,
}  # fmt: skip
"""In-place operators of Python and their functional twins."""

_NORMS_WITH_STATE = ("batch_norm", "instance_norm", "_native_batch_norm_legit", "native_batch_norm")
_RANDOM = frozenset(
    [
        "bernoulli", "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d",
        "dropout2d", "dropout3d", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
        "randperm", "normal", "multinomial", "poisson", "rrelu", "gumbel_softmax", "stochastic_depth",
        "fractional_max_pool2d", "fractional_max_pool3d", "empty", "empty_like", "empty_strided",
        "new_empty",
    ]
)  # fmt: skip


def op_name(node: fx.Node) -> str:
    """The bare name of what a call node calls: ``add_`` for aten.add_.Tensor and for ``x.add_``.

    For grouping spellings of one op in canonicalising passes only; op rules match by target object.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def is_torch_function(target: Any) -> bool:
    """Whether a call target is torch's own, an operator or from math (user functions may do anything)."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).startswith(("aten.", "prims.", "aten::", "prims::"))
    module = getattr(target, "__module__", None)
    if module is None:  # builtins of torch._C
        return getattr(torch, getattr(target, "__name__", ""), None) is target
    return module in ("_operator", "operator", "math", "builtins") or module.split(".")[0] == "torch"


def is_random(node: fx.Node) -> bool:
    """Whether two calls on the same operands may differ."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        return True
    return node.op in ("call_function", "call_method") and op_name(node).rstrip("_") in _RANDOM


def is_mutating(node: fx.Node) -> bool:
    """Whether a node may write to one of its operands (or to a buffer of the model).

    True for ATen ops whose schema says so, names with a trailing underscore, ``operator.iadd`` and the like,
    ``operator.setitem``, ``out=``, ``inplace=True`` (argument of a function or attribute of a module), and
    batch norms that update running statistics.  ``x += 1`` on an int is reported too: nothing here knows
    types.
    """
    if node.op == "call_module":
        module = _module_of(node)
        return _updates(module) or bool(getattr(module, "inplace", False))
    if updates_statistics(node):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    target, name = node.target, op_name(node)
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if name in _NORMS_WITH_STATE:
        return False
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if target in INPLACE_OPERATORS or target is operator.setitem:
        return True
    if getattr(target, "__module__", None) == "_operator":  # and_, or_, not_: the underscore avoids keywords
        return False
    if node.op == "call_method" and (name == "__setitem__" or name in _INPLACE_METHODS):
        return True
    position = _inplace_position(target)
    if position is not None and len(node.args) > position:
        return node.args[position] is True
    return name.endswith("_") and not name.endswith("__")


def updates_statistics(node: fx.Node) -> bool:
    """Whether a node is a batch or instance norm that updates running statistics (its result is fresh)."""
    if node.op == "call_module":
        return _updates(_module_of(node))
    name = op_name(node)
    return node.op == "call_function" and name in _NORMS_WITH_STATE and _norm_updates(node, name)


def changes_itself(gm: fx.GraphModule) -> bool:
    """Whether a run may change the model: norms that update statistics, and modules of others in training mode."""
    return any(updates_statistics(n) or _is_foreign_in_training(n) for n in gm.graph.nodes)


def _is_foreign_in_training(node: fx.Node) -> bool:
    module = _module_of(node) if node.op == "call_module" else None
    is_known = type(module).__module__.startswith(("torch.nn.", "srfx.nn."))
    return module is not None and module.training and not is_known


def _updates(module: nn.Module | None) -> bool:
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    return module.training and module.track_running_stats


_INPLACE_METHODS = frozenset(f"__{fn.__name__.strip('_')}__" for fn in INPLACE_OPERATORS)


@cache
def _inplace_position(target: object) -> int | None:
    """Where a function of torch.nn.functional takes ``inplace`` positionally."""
    if target is None or vars(F).get(getattr(target, "__name__", "")) is not target:
        return None
    try:
        names = list(inspect.signature(vars(F)[getattr(target, "__name__", "")]).parameters)
    except (TypeError, ValueError):  # builtins without a signature
        return None
    return names.index("inplace") if "inplace" in names else None


def _module_of(node: fx.Node) -> nn.Module | None:
    root: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        root = getattr(root, name, None)
    return root if isinstance(root, nn.Module) else None


def _norm_updates(node: fx.Node, name: str) -> bool:
    """aten.batch_norm's schema is functional, and yet it writes the running statistics in training mode."""
    names = {
        "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training"),
        "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"),
    }.get(name, ("input", "weight", "bias", "running_mean", "running_var", "training"))
    if name in ("batch_norm", "instance_norm") and not getattr(node.target, "__module__", "").startswith(
        "torch.nn"
    ):
        names = (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            names[-1],
        )  # torch.* and aten order
    if isinstance(node.target, torch._ops.OpOverload) and "running_mean" not in {
        argument.name for argument in node.target._schema.arguments
    }:
        return False  # the overload without statistics
    values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    is_training = values.get(names[-1], name == "instance_norm")
    return is_training is not False and values.get("running_mean") is not None
