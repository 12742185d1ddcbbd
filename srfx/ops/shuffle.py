"""Channels and positions that change places: pixel and channel shuffle, flip, roll (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.lattice.movement import Fields, Permute, Regroup, Step, Take
from srfx.ops.facts import FactTable, Labeller
from srfx.ops.movement import AlongAxis, Movement, _axis
from srfx.ops.registry import op_rule

aten = torch.ops.aten


class OfPixels(Movement):
    """Pixels become channels or the other way round: where pixels have labels, they stay, and are none apart."""

    why_dynamic = Reason.CHANNEL_MIXING

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        rank, fields = len(call.out_shape), labels.of(self.source(call))
        return [a for a in (rank - 2, rank - 1) if a in fields]


@op_rule(nn.PixelShuffle, torch.pixel_shuffle, aten.pixel_shuffle.default)
class PixelShuffle(OfPixels):
    """[N, C r^2, H, W] -> [N, C, r H, r W]: the r^2 channels of an output channel stay or go together."""

    signature: tuple[str, ...] = ("input", "upscale_factor")

    def steps(self, call: Call) -> list[Step]:
        *batch, c, h, w = call.shape(self.source(call))
        r, n = call.get("upscale_factor"), len(batch)
        split = (*batch, c // (r * r), r, r, h, w)
        order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
        spread = tuple(split[i] for i in order)
        return [Regroup((*batch, c, h, w), split), Permute(order), Regroup(spread, call.out_shape)]

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis = len(call.out_shape) - 3
        fields = self.known_fields(call, labels, dict(labels.of(self.source(call))))
        if axis not in fields:
            return fields
        r2 = call.get("upscale_factor") ** 2
        grouped = fields[axis].unflatten(axis, (-1, r2))
        labels.table.tie(grouped, grouped.narrow(axis + 1, 0, 1))
        return {**fields, axis: grouped.select(axis + 1, 0)}


@op_rule(nn.PixelUnshuffle, torch.pixel_unshuffle, aten.pixel_unshuffle.default)
class PixelUnshuffle(OfPixels):
    """[N, C, r H, r W] -> [N, C r^2, H, W]: each channel appears r^2 times."""

    signature: tuple[str, ...] = ("input", "downscale_factor")

    def steps(self, call: Call) -> list[Step]:
        *batch, c, h, w = call.shape(self.source(call))
        r, n = call.get("downscale_factor"), len(batch)
        split = (*batch, c, h // r, r, w // r, r)
        order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
        spread = tuple(split[i] for i in order)
        return [Regroup((*batch, c, h, w), split), Permute(order), Regroup(spread, call.out_shape)]


@op_rule(nn.ChannelShuffle, torch.channel_shuffle, aten.channel_shuffle.default, torch.native_channel_shuffle)
class ChannelShuffle(AlongAxis):
    """A fixed permutation of channels; becomes an index_select when channels go."""

    signature: tuple[str, ...] = ("input", "groups")

    def selection(self, call: Call) -> Take:
        channels = call.out_shape[1]
        order = torch.arange(channels).view(call.get("groups"), -1).t().flatten()
        return Take(1, order, channels)


_FLIPS: dict[Any, tuple[int, ...]] = dict.fromkeys((torch.fliplr, "fliplr", aten.fliplr.default), (1,))


_FLIPS |= dict.fromkeys((torch.flipud, "flipud", aten.flipud.default), (0,))


@op_rule(torch.flip, "flip", aten.flip.default, torch.fliplr, torch.flipud, "fliplr", "flipud", aten.fliplr.default,
         aten.flipud.default)  # fmt: skip
class Flip(Movement):
    """flip; an axis that loses channels is flipped all the same, the kept ones in reverse order."""

    signature: tuple[str, ...] = ("input", "*dims")

    def steps(self, call: Call) -> list[Step]:
        shape = call.out_shape
        dims = _FLIPS.get(call.node.target) or call.get("dims")
        dims = [dims] if isinstance(dims, int) else dims
        return [
            Take(a, torch.arange(shape[a]).flip(0), shape[a]) for a in (_axis(d, len(shape)) for d in dims)
        ]


@op_rule(torch.rot90, "rot90", aten.rot90.default)
class Rot90(Movement):
    """k quarter turns in the plane of two axes: flips, and for odd k the axes change places."""

    signature: tuple[str, ...] = ("input", "k", "dims")

    def steps(self, call: Call) -> list[Step]:
        shape, k = call.shape(self.source(call)), call.get("k", 1) % 4
        a, b = (_axis(d, len(shape)) for d in call.get("dims", (0, 1)))
        flipped = {0: (), 1: (b,), 2: (a, b), 3: (a,)}[k]
        steps: list[Step] = [Take(d, torch.arange(shape[d]).flip(0), shape[d]) for d in flipped]
        order = list(range(len(shape)))
        if k % 2:
            order[a], order[b] = b, a
        return [*steps, Permute(tuple(order))]


@op_rule(torch.roll, "roll", aten.roll.default)
class Roll(AlongAxis):
    """roll along axes; a rolled channel axis that loses channels becomes an index_select."""

    signature: tuple[str, ...] = ("input", "shifts", "dims")

    def steps(self, call: Call) -> list[Step]:
        shape, shifts, dims = call.out_shape, call.get("shifts"), call.get("dims")
        if dims is None or dims == [] or dims == ():
            flat = (torch.Size(shape).numel(),)
            return [
                Regroup(shape, flat),
                Take(0, torch.arange(flat[0]).roll(shifts), flat[0]),
                Regroup(flat, shape),
            ]
        shifts = [shifts] if isinstance(shifts, int) else shifts
        dims = [dims] if isinstance(dims, int) else dims
        axes = [_axis(d, len(shape)) for d in dims]
        return [Take(a, torch.arange(shape[a]).roll(s), shape[a]) for a, s in zip(axes, shifts, strict=True)]

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        if not labels.is_dynamic(call.bound.get("shifts")):
            return []
        takes = [s for s in self.steps(call) if isinstance(s, Take)]
        return (
            [s.axis for s in takes]
            if len(takes) == len(self.steps(call))
            else list(range(len(call.out_shape)))
        )

    def label(self, call: Call, labels: Labeller) -> Fields:
        steps = self.steps(call)
        takes = [s for s in steps if isinstance(s, Take)]
        tracked = [s.axis for s in takes if s.axis in labels.of(self.source(call))]
        if len(steps) > len(takes) or (
            tracked and len(takes) > 1
        ):  # several axes at once: no single index_select
            labels.pin(self.source(call), call.node.name, Reason.CHANNEL_MIXING)
        return super().label(call, labels)

    def selection(self, call: Call) -> Take:
        step = self.steps(call)[0]
        assert isinstance(step, Take)
        return step

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return super().compact(call, facts) if len(self.steps(call)) == 1 else []
