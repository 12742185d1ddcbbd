"""Views of the same elements in another shape: view, reshape, flatten, squeeze, expand (theory: Lemmas M1 to M7)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import ViewAnyLayout
from srfx.ir.program import Value
from srfx.lattice.movement import Fields, Regroup, Step
from srfx.ops.facts import FactTable, Labeller
from srfx.ops.movement import Movement, _axis
from srfx.ops.registry import op_rule
from srfx.ops.rule import PortSite
from srfx.ops.sizes import resized

aten = torch.ops.aten


class Reshaping(Movement):
    """Row-major regrouping of the axes; the result's hint gives the new sizes."""

    def steps(self, call: Call) -> list[Step]:
        return [Regroup(call.shape(self.source(call)), call.out_shape)]

    def ports(self, call: Call, facts: FactTable) -> list[PortSite]:
        """An axis that is split into heads: where these need equal counts, what fills them up need not be computed."""
        source = self.source(call)
        if not isinstance(source, fx.Node) or source in call.program.independent:
            return []
        regroup = self.steps(call)[0]
        assert isinstance(regroup, Regroup)
        split = [ins[0] for ins, outs in regroup.groups() if len(ins) == 1 and len(outs) > 1]
        return [PortSite(source, axis, True) for axis in split if axis in facts.fields(source)]


@op_rule(nn.Flatten, torch.flatten, "flatten", aten.flatten.using_ints, torch.ravel, "ravel",
         torch.unsqueeze, "unsqueeze", aten.unsqueeze.default)  # fmt: skip
class Flatten(Reshaping):
    """flatten, unsqueeze: no sizes in the arguments."""


@op_rule(torch.squeeze, "squeeze", aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
class Squeeze(Reshaping):
    """squeeze asks for sizes at run time: an axis that it leaves in place must not shrink to size 1."""

    signature: tuple[str, ...] = ("input", "dim")

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        source, dim = self.source(call), call.get("dim")
        fields, shape = facts.fields(source), call.shape(source)
        dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
        second = []
        for axis in {_axis(d, len(shape)) for d in dims}:
            if axis in fields and shape[axis] > 1 and facts.count(fields, axis) == 1:
                kept = facts.is_kept(fields[axis])
                second.append(fields[axis].gather(axis, (~kept).long().argmax(axis, keepdim=True)).flatten())
        return torch.cat(second) if second else None


@op_rule("view", "reshape", "view_as", "reshape_as", torch.reshape, aten.view.default, aten.reshape.default,
         aten._unsafe_view.default, aten.view_copy.default, aten.view_as.default, aten.reshape_as.default)  # fmt: skip
class View(Reshaping):
    """view, reshape: sizes of changed axes are rewritten."""

    signature: tuple[str, ...] = ("input", "*size")

    def label(self, call: Call, labels: Labeller) -> Fields:
        return as_template(call, labels, super().label(call, labels))

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return [self.source(call), *_template(call)]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if isinstance(call.get("size"), fx.Node) or call.value("other") is not None:
            return []  # view_as: the shape comes from another tensor, which loses the same channels
        name = "size" if "size" in call.bound else "shape"
        return resized(call, facts, name, facts.fields(call.node), call.out_shape)

    def loosen(self, call: Call) -> Iterable[GraphEdit]:
        """``view`` asks for strides that fit, ``reshape`` does not (theory: Lemma M7)."""
        node = call.node
        is_of_dtype = bool(node.kwargs) or any(isinstance(a, torch.dtype) for a in node.args)
        is_view = (node.target == "view" and not is_of_dtype) or node.target is aten.view.default
        return [ViewAnyLayout(node.name)] if is_view else []


def _template(call: Call) -> list[Value]:
    """The tensor whose shape view_as and expand_as take."""
    found = [call.value(name) for name in ("other", "size")]
    return [v for v in found if v is not None]


def as_template(call: Call, labels: Labeller, fields: Fields, repeated: Iterable[int] = ()) -> Fields:
    """The fields of a result that takes its shape from another tensor: both lose the same channels.

    Along ``repeated`` axes, where one position is repeated, the result is as wide as the template, whatever that is.
    """
    for other in _template(call):
        lent = {a: f for a, f in labels.of(other).items() if a in repeated}
        rest = {a: f for a, f in labels.of(other).items() if a not in lent}
        shape = tuple(1 if a in lent else n for a, n in enumerate(call.out_shape))
        return {**labels.unify([(fields, shape), (rest, shape)], len(shape), call.node.name), **lent}
    return fields


@op_rule(nn.Unflatten, torch.unflatten, "unflatten", aten.unflatten.int)
class Unflatten(Reshaping):
    """unflatten: the new sizes begin at ``dim``."""

    signature: tuple[str, ...] = ("input", "dim", "sizes")

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        rank = len(call.shape(self.source(call)))
        name = "unflattened_size" if call.module is not None else "sizes"
        return resized(
            call, facts, name, facts.fields(call.node), call.out_shape, _axis(call.get("dim"), rank)
        )


@op_rule("expand", torch.broadcast_to, "broadcast_to", aten.expand.default, "expand_as", aten.expand_as.default,
         aten.broadcast_to.default, aten.expand_copy.default)  # fmt: skip
class Expand(Movement):
    """Repeat axes of size 1; leading axes may be new."""

    signature: tuple[str, ...] = ("input", "*size")

    def steps(self, call: Call) -> list[Step]:
        before, after = call.shape(self.source(call)), call.out_shape
        lifted = (1,) * (len(after) - len(before)) + before
        return [Regroup(before, lifted)] if lifted != before else []

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields, shape = super().label(call, labels), call.out_shape
        for axis in [a for a, f in fields.items() if f.shape[a] != shape[a]]:
            labels.require(call.node, fields.pop(axis))  # one channel repeated: not a channel axis any more
        before = call.shape(self.source(call))
        lifted = (1,) * (len(shape) - len(before)) + before
        repeated = [a for a, (m, n) in enumerate(zip(lifted, shape, strict=True)) if m == 1 < n]
        for axis in [a for a in repeated if a > 0 and self._is_literal(call, a)]:  # the first is the batch
            fields[axis] = labels.table.fresh(shape[axis]).view(
                [-1 if a == axis else 1 for a in range(len(shape))]
            )
        return as_template(call, labels, fields, repeated)

    def _is_literal(self, call: Call, axis: int) -> bool:
        """Whether a literal says how often an axis is repeated: its copies may go one by one."""
        sizes = call.bound.get("size")
        return isinstance(sizes, (list, tuple)) and isinstance(sizes[axis], int)

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return call.values()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if isinstance(call.get("size"), fx.Node) or "size" not in call.bound:
            return []
        return resized(call, facts, "size", facts.fields(call.node), call.out_shape)
