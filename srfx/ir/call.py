"""One call of an op, its arguments by name whatever the spelling.

nn.Module, functional, method and ATen spellings of an op differ in where an argument stands: an attribute of the
module, a position, a keyword.  `Call` hides the difference in both directions, for reading and for `SetArg` edits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.program import Param, Program, Value, named_tensors

ALIASES = {
    "self": "input",
    "a": "input",
    "b": "other",
    "mat2": "other",
    "mask": "condition",
    "axis": "dim",
    "axes": "dim",
    "x": "input",
    "keepdims": "keepdim",
}


class Call:
    """A node bound to its rule's argument names.

    Args:
        node: a call_function, call_method or call_module node.
        program: the graph it stands in.
        signature: names of the positional arguments; a last name ``*size`` collects the rest.
    """

    def __init__(self, node: fx.Node, program: Program, signature: tuple[str, ...]) -> None:
        self.node = node
        self.program = program
        self.module = program.modules[str(node.target)] if node.op == "call_module" else None
        self.signature = signature
        self.bound = self._bind()
        self._named: dict[str, Value | None] = {}

    # ------------------------------------------------------------------ reading
    def __getitem__(self, name: str) -> Any:
        """The raw argument: a Node, a tensor or a plain value.  KeyError when the call does not have it."""
        if name in self.bound:
            return self.bound[name]
        if self.module is not None and hasattr(self.module, name):
            return getattr(self.module, name)
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The argument with nodes of sizes replaced by their hints, or ``default``."""
        try:
            raw = self[name]
        except KeyError:
            return default
        return self.hint(raw)

    def hint(self, raw: Any) -> Any:
        """``raw`` with every non-tensor node replaced by its concrete hint value."""

        def concrete(node: fx.Node) -> Any:
            found = self.program.hints.get(node, node)
            return node if isinstance(found, Tensor) else found

        return fx.node.map_arg(raw, concrete)

    def value(self, name: str) -> Value | None:
        """The tensor operand of this name as a Value, or None when it is absent or not a tensor.

        What it was when first asked for: rules ask many times, and nothing is written while they do.
        """
        if name not in self._named:
            try:
                self._named[name] = self.as_value(self[name])
            except KeyError:
                self._named[name] = None
        return self._named[name]

    def operand(self, name: str) -> Value:
        """The tensor operand of this name, which has to be there."""
        value = self.value(name)
        assert value is not None, f"{self.where}: no tensor operand {name!r}"
        return value

    def as_value(self, raw: Any) -> Value | None:
        """A raw argument as a Value, or None when it is no tensor."""
        if isinstance(raw, fx.Node):
            return self.program.value(raw) if self.program.is_tensor(raw) else None
        return self.program.param(raw) if isinstance(raw, Tensor) else None

    def values(self) -> list[Value]:
        """Every tensor operand once, in order: arguments first, then the module's own tensors."""
        found: dict[Value, None] = {}
        for node in self.node.all_input_nodes:
            for value in self._tensors_of(node):
                found[value] = None
        if self.module is not None:
            for _, tensor in named_tensors(self.module):
                found[self.program.param(tensor)] = None
        return list(found)

    def shape(self, value: Value) -> tuple[int, ...]:
        """Concrete hint shape of an operand."""
        return self.program.shape(value)

    @property
    def output(self) -> Any:
        """Hint of the result: a fake tensor, a tuple of them, or something else."""
        return self.program.hints.get(self.node)

    @property
    def leaves(self) -> list[Any]:
        """Hints of the elements of a tuple result, nested ones in a row."""
        return self.program.leaves(self.node)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Concrete hint shape of a tensor result."""
        return self.program.shape(self.node)

    @property
    def where(self) -> str:
        """For messages: node name and target."""
        name = getattr(self.node.target, "__name__", str(self.node.target))
        return f"{self.node.name} ({name})"

    # ------------------------------------------------------------------ running and naming
    def run(self, values: dict[Value, Tensor]) -> Any:
        """Execute the op with operands replaced; sizes take their hints, other parameters stay."""

        def replace(node: fx.Node) -> Any:
            value = self.program.value(node)
            if value in values:
                return values[value]
            return value.tensor if isinstance(value, Param) else self.program.hints[node]

        args = fx.node.map_arg(self.node.args, replace)
        kwargs = fx.node.map_arg(self.node.kwargs, replace)
        with torch.no_grad():
            if self.module is not None:
                return self.module(*args, **kwargs)
            if self.node.op == "call_method":
                return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
            assert callable(self.node.target)
            return self.node.target(*args, **kwargs)

    def slot(self, name: str) -> str:
        """Attribute path where the tensor argument ``name`` lives, or would be created."""
        if self.module is not None:
            return f"{self.node.target}.{name}"
        value = self.value(name)
        if isinstance(value, Param) and value.names:
            return value.names[0]
        weight = self.value("weight")
        if isinstance(weight, Param) and weight.names and weight.names[0].endswith("weight"):
            path = weight.names[0].removesuffix("weight") + name
            if not self.program.has_attribute(path):
                return path
        return f"{self.node.name}_{name}"

    # ------------------------------------------------------------------ binding
    def _tensors_of(self, node: fx.Node) -> Iterator[Value]:
        hint = self.program.hints.get(node)
        if isinstance(hint, (Tensor, tuple, list)):
            yield self.program.value(node)

    def _bind(self) -> dict[str, Any]:
        bound: dict[str, Any] = {}
        args = self.node.args
        for i, name in enumerate(self.signature):
            if name.startswith("*"):
                rest = args[i:]
                if len(rest) == 1 and not isinstance(rest[0], int) and not self._is_int(rest[0]):
                    bound[name[1:]] = rest[0]
                elif rest:
                    bound[name[1:]] = tuple(rest)
            elif i < len(args):
                bound[name] = args[i]
        for key, value in self.node.kwargs.items():
            bound[ALIASES.get(key, key)] = value
        return bound

    def _is_int(self, raw: Any) -> bool:
        return isinstance(raw, fx.Node) and isinstance(self.program.hints.get(raw), int)


def write_argument(node: fx.Node, signature: tuple[str, ...], name: str, value: Any) -> None:
    """Set an argument of a function or method call by name, where it stands or as a keyword."""
    plain = tuple(s.removeprefix("*") for s in signature)
    for key in node.kwargs:
        if ALIASES.get(key, key) == name:
            node.kwargs = {**node.kwargs, key: value}
            return
    if name in plain:
        i = plain.index(name)
        if signature[i].startswith("*"):
            is_one = len(node.args) == i + 1 and isinstance(node.args[i], (tuple, list))
            spread = tuple(value) if isinstance(value, (tuple, list)) and not is_one else (value,)
            node.args = (*node.args[:i], *spread)
            return
        if i < len(node.args):
            node.args = (*node.args[:i], value, *node.args[i + 1 :])
            return
        if i == len(node.args):
            node.args = (*node.args, value)
            return
    node.kwargs = {**node.kwargs, name: value}


@cache
def native_signature(target: Any) -> tuple[str, ...] | None:
    """Argument names that the target itself declares: an OpOverload's schema or a Python function's parameters."""
    if isinstance(target, torch._ops.OpOverload):
        return tuple(ALIASES.get(a.name, a.name) for a in target._schema.arguments)
    if inspect.isfunction(target):
        names = _parameters(target)
        return names if not any(n.startswith("*") for n in names) else None
    return None


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(
        ("*" if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else "") + ALIASES.get(p.name, p.name)
        for p in inspect.signature(function).parameters.values()
    )
