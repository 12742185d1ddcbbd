"""Permutations of axes: permute, transpose, movedim (theory: Lemmas M1 to M5)."""

from __future__ import annotations

import torch

from srfx.ir.call import Call
from srfx.lattice.movement import Permute, Step
from srfx.ops.movement import Movement, _axis
from srfx.ops.registry import op_rule

aten = torch.ops.aten


@op_rule("permute", torch.permute, aten.permute.default, aten.permute_copy.default)
class PermuteAxes(Movement):
    """permute."""

    signature: tuple[str, ...] = ("input", "*dims")

    def steps(self, call: Call) -> list[Step]:
        rank = len(call.out_shape)
        return [Permute(tuple(_axis(d, rank) for d in call.get("dims")))]


@op_rule("transpose", torch.transpose, aten.transpose.int, torch.swapaxes, "swapaxes", torch.swapdims, "swapdims",
         (aten.swapaxes.default, "input dim0 dim1"), (aten.swapdims.default, "input dim0 dim1"))  # fmt: skip
class Transpose(Movement):
    """transpose of two axes."""

    signature: tuple[str, ...] = ("input", "dim0", "dim1")

    def steps(self, call: Call) -> list[Step]:
        order = list(range(len(call.out_shape)))
        a, b = (
            _axis(call.get(n, call.get(o)), len(order)) for n, o in (("dim0", "axis0"), ("dim1", "axis1"))
        )
        order[a], order[b] = order[b], order[a]
        return [Permute(tuple(order))]


@op_rule("t", torch.t, aten.t.default, "adjoint", aten.numpy_T.default, aten.mT.default, torch.adjoint)
class MatrixTranspose(Movement):
    """Transpose of the last two axes (of a vector: itself)."""

    def steps(self, call: Call) -> list[Step]:
        order = list(range(len(call.out_shape)))
        return [Permute((*order[:-2], *reversed(order[-2:])))]


@op_rule(torch.movedim, "movedim", torch.moveaxis, "moveaxis", aten.movedim.int, aten.movedim.intlist,
         aten.moveaxis.int, aten.moveaxis.intlist)  # fmt: skip
class MoveDim(Movement):
    """movedim."""

    signature: tuple[str, ...] = ("input", "source", "destination")

    def steps(self, call: Call) -> list[Step]:
        rank = len(call.out_shape)
        source, target = call.get("source"), call.get("destination")
        source = [source] if isinstance(source, int) else list(source)
        target = [target] if isinstance(target, int) else list(target)
        order: list[int | None] = [None] * rank
        for s, t in zip(source, target, strict=True):
            order[_axis(t, rank)] = _axis(s, rank)
        rest = (a for a in range(rank) if a not in order)
        return [Permute(tuple(next(rest) if o is None else o for o in order))]
