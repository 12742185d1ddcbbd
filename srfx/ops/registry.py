"""The one table from op targets to rules; matching is by the target object, never by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from srfx.ir.call import Call, native_signature
from srfx.ir.program import Program
from srfx.ops.rule import OpRule, Unknown

_RULES: dict[Any, tuple[OpRule, tuple[str, ...]]] = {}
_UNKNOWN = Unknown()


def op_rule(*targets: Any, **options: Any) -> Callable[[type[OpRule]], type[OpRule]]:
    """Register a rule for every spelling of its op.

    Args:
        targets: module classes, functions, OpOverloads, method names, ``"library::op"`` for an op that another
            package registers with torch; or ``(target, "input weight *size")`` where a spelling orders its
            arguments differently from the rule's ``signature``.
        options: attributes set on this registration's rule instance (one class may serve several ops).

    Raises:
        ValueError: a target is registered already; names both rules.
    """

    def register(cls: type[OpRule]) -> type[OpRule]:
        rule = cls()
        for name, value in options.items():
            setattr(rule, name, value)
        for entry in targets:
            target, names = entry if isinstance(entry, tuple) else (entry, None)
            if target in _RULES:
                raise ValueError(
                    f"{target} has a rule already: {type(_RULES[target][0]).__name__}, {cls.__name__}"
                )
            signature = tuple(names.split()) if names else _signature(target, rule)
            _RULES[target] = (rule, signature)
        return cls

    return register


def _signature(target: Any, rule: OpRule) -> tuple[str, ...]:
    if isinstance(target, torch._ops.OpOverload):
        return native_signature(target) or rule.signature
    return rule.signature


def resolve(node: fx.Node, program: Program) -> tuple[OpRule, Call]:
    """The rule of a call node and the call bound to the rule's argument names."""
    rule, signature = _find(node, program.modules)
    call = Call(node, program, signature)
    return rule.variant(call), call


def rule_of(node: fx.Node, modules: Mapping[str, torch.nn.Module]) -> OpRule:
    """The rule of a call node alone; ``modules`` by path."""
    return _find(node, modules)[0]


def _find(node: fx.Node, modules: Mapping[str, torch.nn.Module]) -> tuple[OpRule, tuple[str, ...]]:
    target: Any = node.target
    if node.op == "call_module":
        target = _module_key(modules[str(node.target)])
    if target not in _RULES and isinstance(target, torch._ops.OpOverload):
        target = target.name()  # an op of a library that is loaded later than we are
    return _RULES.get(target, (_UNKNOWN, ("input",)))


def has_rule(target: Any) -> bool:
    """Whether this target (a module class, function, OpOverload or method name) has a rule."""
    return target in _RULES


def registered(target: Any) -> OpRule | None:
    """The rule registered for this target, if there is one."""
    return _RULES.get(target, (None, ()))[0]


def known_targets() -> list[Any]:
    """All registered targets, in the order of registration."""
    return list(_RULES)


def known_rules() -> list[tuple[Any, OpRule]]:
    """All registered targets with their rules, in the order of registration."""
    return [(target, rule) for target, (rule, _) in _RULES.items()]


def _module_key(module: torch.nn.Module) -> Any:
    """The registered class whose forward this module runs, unless a hook may do anything besides."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    for cls in type(module).__mro__:
        if cls in _RULES and type(module).forward is cls.forward:  # type: ignore[attr-defined]
            return cls
    return None
