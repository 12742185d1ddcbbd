"""Write an einsum as the permutation, product and sum that it is.

Before: y = einsum("b h q d, b h k d -> b h q k", q, k)     After: y = matmul(q, permute(k, (0, 1, 3, 2)))
Before: y = einsum("b t c, o c -> b t o", x, w)             After: y = matmul(x, permute(w, (1, 0)))
Before: y = einsum("b c h w, b c -> b c h w", x, s)         After: y = x * unsqueeze(s, ..)

An index of both operands is a batch of the product when it is read later, else it is contracted; with none to contract the
product is elementwise.  An index of one operand alone that is read by nobody is summed first.  Three and more
operands are taken from the left, two at a time.  Exact in real arithmetic: these are the same sums of the same
products (theory: Lemma A8).  The rules of permutation, product and sum then know what they know of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Param, Program
from srfx.ir.shapes import propagate
from srfx.passes.base import HintedPass, register_pass

aten = torch.ops.aten
_ELLIPSIS = -100
"""Indices that an ellipsis stands for count down from here, the last axis first; letters are their code points."""

_OPS: dict[str, tuple[Any, Any]] = {
    "permute": (torch.permute, aten.permute.default),
    "matmul": (torch.matmul, aten.matmul.default),
    "mul": (torch.mul, aten.mul.Tensor),
    "sum": (torch.sum, aten.sum.dim_IntList),
    "unsqueeze": (torch.unsqueeze, aten.unsqueeze.default),
    "squeeze": (torch.squeeze, aten.squeeze.dim),
    "flatten": (torch.flatten, aten.flatten.using_ints),
    "unflatten": (torch.unflatten, aten.unflatten.int),
}
"""Each op as a function of torch, and as an ATen overload for graphs of those."""

Indices = tuple[int, ...]


@dataclass(frozen=True)
class LowerEinsum(Edit):
    """One einsum.

    Attributes:
        inputs: the index of each axis of each operand.
        output: the index of each axis of the result.
        sizes: sizes of indices that are the same at every call.
        stored: operands that are stored tensors.
    """

    inputs: tuple[Indices, ...]
    output: Indices
    sizes: tuple[tuple[int, int], ...]
    stored: tuple[bool, ...]


@register_pass("lower-einsum")
class LowerEinsums(HintedPass):
    """Replace ``torch.einsum`` and ``aten.einsum`` by permutations, products and sums.

    Left as it is: an equation that is no literal, and operands given as one tuple.

    Refuses: UNRECOGNISED_CALL for an index twice in one operand (a diagonal), and for sizes that broadcast.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every einsum, in graph order."""
        plan = Plan()
        found = [n for n in gm.graph.nodes if n.target in (torch.einsum, aten.einsum.default)]
        if not found:
            return plan
        program = Program(gm, propagate(gm, self.hints))
        for node in found:
            edit = _edit(node, program)
            if edit is None:
                plan.refusals.append(Refusal(node.name, Reason.UNRECOGNISED_CALL, "einsum"))
            else:
                plan.edits.append(edit)
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, LowerEinsum)
        node = next(n for n in gm.graph.nodes if n.name == edit.node)
        with gm.graph.inserting_before(node):
            writer = _Writer(gm.graph, int(isinstance(node.target, torch._ops.OpOverload)), dict(edit.sizes))
            new = writer.contract(_operands(node), edit)
        if new in node.all_input_nodes:  # a product of one tensor that changes nothing
            node.replace_all_uses_with(new)
        else:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


# ---------------------------------------------------------------------- reading
def _operands(node: fx.Node) -> list[Any]:
    rest = node.args[1:]
    return list(rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest)


def _edit(node: fx.Node, program: Program) -> LowerEinsum | None:
    equation = node.args[0] if node.args else None
    operands = _operands(node)
    if not isinstance(equation, str) or set(node.kwargs) - {"path"} or not operands:
        return None
    if not all(isinstance(n, fx.Node) and program.is_tensor(n) for n in operands):
        return None
    values = [program.value(n) for n in operands]
    shapes = [program.shape(v) for v in values]
    parsed = _parse(equation, [len(s) for s in shapes])
    if parsed is None:
        return None
    inputs, output = parsed
    known: dict[int, set[int]] = {}
    for indices, shape in zip(inputs, shapes, strict=True):
        for index, size in zip(indices, shape, strict=True):
            known.setdefault(index, set()).add(size)
    if any(len(sizes) > 1 for sizes in known.values()) or not set(output) <= set(known):
        return None
    fixed = [
        pair
        for indices, value in zip(inputs, values, strict=True)
        if isinstance(value, Param)
        for pair in zip(indices, value.shape, strict=True)
    ]
    stored = tuple(isinstance(v, Param) for v in values)
    return LowerEinsum(node.name, tuple(inputs), output, tuple(dict.fromkeys(fixed)), stored)


def _parse(equation: str, ranks: Sequence[int]) -> tuple[list[Indices], Indices] | None:
    """Indices of operands and result; None where an index stands twice in one of them."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    inputs = [_indices(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    if arrow:
        n_hidden = max(
            (len(i) - len(t.replace("...", "")) for i, t in zip(inputs, terms, strict=True)), default=0
        )
        output = _indices(right, len(right.replace("...", "")) + (n_hidden if "..." in right else 0))
    else:
        every = [i for indices in inputs for i in indices]
        hidden = sorted({i for i in every if i < 0})
        output = (*hidden, *sorted(i for i in set(every) if i > 0 and every.count(i) == 1))
    if any(len(set(i)) < len(i) for i in (*inputs, output)):
        return None
    return inputs, output


def _indices(term: str, rank: int) -> Indices:
    before, dots, after = term.partition("...")
    n_hidden = rank - len(before) - len(after) if dots else 0
    hidden = range(_ELLIPSIS - n_hidden + 1, _ELLIPSIS + 1)  # aligned at the last axis, as broadcasting is
    return (*map(ord, before), *hidden, *map(ord, after))


# ---------------------------------------------------------------------- writing
class _Writer:
    """Nodes for products of labelled operands; no node is made for a step that changes nothing."""

    def __init__(self, graph: fx.Graph, flavour: int, sizes: dict[int, int]) -> None:
        self.graph, self.flavour, self.sizes = graph, flavour, sizes

    def op(self, name: str, *args: Any) -> fx.Node:
        return self.graph.call_function(_OPS[name][self.flavour], args)

    def contract(self, operands: list[fx.Node], edit: LowerEinsum) -> fx.Node:
        node, indices, is_stored = operands[0], edit.inputs[0], edit.stored[0]
        for i in range(1, len(operands)):
            later = {x for rest in edit.inputs[i + 1 :] for x in rest} | set(edit.output)
            one, two = (node, indices), (operands[i], edit.inputs[i])
            if is_stored and not edit.stored[i]:  # weights stand on the right, where rules look for them
                one, two = two, one
            node, indices = self.pair(*one, *two, later)
            is_stored = is_stored and edit.stored[i]
        node, indices = self.sum(node, indices, set(edit.output))
        return self.order(node, indices, edit.output)

    def pair(
        self, a: fx.Node, of_a: Indices, b: fx.Node, of_b: Indices, later: set[int]
    ) -> tuple[fx.Node, Indices]:
        """The product of two operands, and its indices."""
        a, of_a = self.sum(a, of_a, later | set(of_b))
        b, of_b = self.sum(b, of_b, later | set(of_a))
        batch = tuple(i for i in of_a if i in of_b and i in later)
        summed = tuple(i for i in of_a if i in of_b and i not in later)
        left = tuple(i for i in of_a if i not in of_b)
        right = tuple(i for i in of_b if i not in of_a)
        if not summed:
            return self.scale(a, of_a, b, of_b, (*batch, *left, *right))
        sized = {i: (a, of_a.index(i)) for i in of_a} | {i: (b, of_b.index(i)) for i in of_b}
        x = self.merge(self.order(a, of_a, (*batch, *left, *summed)), -1, len(summed))
        y = self.order(b, of_b, (*batch, *summed, *right))
        n_left = len(left)
        if batch or n_left == 0:
            x = self.merge(x, -2, n_left) if n_left else self.op("unsqueeze", x, -2)
        y = self.merge(y, -1, len(right)) if right else self.op("unsqueeze", y, -1)
        y = self.merge(y, -2, len(summed))
        product = self.op("matmul", x, y)
        product = self.split(product, right, sized, -1) if right else self.op("squeeze", product, -1)
        at = -1 - len(right)
        if n_left == 0:
            product = self.op("squeeze", product, at)
        elif batch:
            product = self.split(product, left, sized, at)
        return product, (*batch, *left, *right)

    def scale(
        self, a: fx.Node, of_a: Indices, b: fx.Node, of_b: Indices, wanted: Indices
    ) -> tuple[fx.Node, Indices]:
        """The elementwise product, with the indices ``wanted``: those of the wider operand as they stand, if it has all."""
        wanted = next((own for own in (of_a, of_b) if len(own) == len(wanted)), wanted)
        return self.op("mul", self.spread(a, of_a, wanted), self.spread(b, of_b, wanted)), wanted

    def spread(self, node: fx.Node, indices: Indices, wanted: Indices) -> fx.Node:
        """Axes in the order ``wanted``, of size 1 where the operand has none; leading ones are left to broadcasting."""
        node = self.order(node, indices, tuple(i for i in wanted if i in indices))
        first = min((wanted.index(i) for i in indices), default=len(wanted))
        for at, index in enumerate(wanted[first:]):
            if index not in indices:
                node = self.op("unsqueeze", node, at)
        return node

    def sum(self, node: fx.Node, indices: Indices, wanted: set[int]) -> tuple[fx.Node, Indices]:
        gone = [at for at, index in enumerate(indices) if index not in wanted]
        return (self.op("sum", node, gone) if gone else node), tuple(i for i in indices if i in wanted)

    def order(self, node: fx.Node, indices: Indices, wanted: Indices) -> fx.Node:
        return node if indices == wanted else self.op("permute", node, [indices.index(i) for i in wanted])

    def merge(self, node: fx.Node, last: int, n: int) -> fx.Node:
        """``n`` axes, of which the last is ``last``, as one."""
        return self.op("flatten", node, last - n + 1, last) if n > 1 else node

    def split(
        self, node: fx.Node, indices: Indices, sized: dict[int, tuple[fx.Node, int]], at: int
    ) -> fx.Node:
        """The axis ``at`` as these indices; one size that may differ from call to call is left to torch."""
        if len(indices) < 2:
            return node
        unknown = [i for i in indices if i not in self.sizes]
        sizes: list[Any] = [
            self.sizes[i] if i in self.sizes else self.size(*sized[i])
            for i in indices
            if i not in unknown[:1]
        ]
        if unknown:
            sizes.insert(indices.index(unknown[0]), -1)
        return self.op("unflatten", node, at, sizes)

    def size(self, node: fx.Node, axis: int) -> fx.Node:
        if self.flavour:
            return self.graph.call_function(aten.sym_size.int, (node, axis))
        return self.graph.call_method("size", (node, axis))
