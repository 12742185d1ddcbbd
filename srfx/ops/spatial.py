"""Ops that act on the spatial positions of each channel alone: pooling, interpolation, instance norm, batch norm (P1, B1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import SetArgument, SetTensor
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule, Shifted

aten = torch.ops.aten


class PerChannel(OpRule):
    """y[.., c, :] = f(x[.., c, :]); spatial axes must carry no channels.

    ``n_spatial`` trailing axes are mixed; 0 reads it from the operand (all axes from 2 on).
    """

    signature: tuple[str, ...] = ("input",)
    n_spatial = 0
    shrinks_axes = True

    def is_even(self, call: Call) -> bool:
        return True

    def source(self, call: Call) -> Value:
        return call.operand("input")

    def first_spatial(self, call: Call) -> int:
        """The first of the axes that are mixed."""
        rank = len(call.shape(self.source(call)))
        return rank - self.n_spatial if self.n_spatial else 2

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        source = self.source(call)
        rank, first = len(call.shape(source)), self.first_spatial(call)
        spatial = [a for a in labels.of(source) if a >= first]
        labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, spatial)
        fields = {a: f for a, f in labels.of(source).items() if a < first}
        for a, f in fields.items():
            for d in range(first, rank):
                if f.shape[d] > 1:
                    labels.table.tie(f, f.narrow(d, 0, 1))
                    f = fields[a] = f.narrow(d, 0, 1)
        return tuple(fields for _ in call.output) if isinstance(call.output, (tuple, list)) else fields

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        source, first = self.source(call), self.first_spatial(call)
        c = facts.constancy(source).settle(range(first))
        affine = c.affine if self.is_linear else None
        if affine is not None and not self.keeps(call):
            affine = replace(affine, bordered=True)
        if self.keeps(call):
            kept = replace(c, value=torch.where(c.varies, 0.0, self.of_constants(call, c.value)))
        else:
            kept = Constancy(c.varies | (c.value != 0), torch.zeros_like(c.value))
            if bool(c.nonzero().any()):
                facts.refuse(call.node, Reason.BORDER, "a window sees less of a constant at the border")
        kept = replace(kept, affine=affine, sums_to_one=None)
        if isinstance(call.output, (tuple, list)):
            return (kept, *(Constancy.top(o.dim()) for o in call.output[1:]))
        return kept

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        source = self.source(call)
        is_whole = isinstance(call.output, Tensor) and self.keeps(call)
        if not is_whole or not isinstance(source, fx.Node) or axis >= self.first_spatial(call):
            return []
        return [Shifted((), source, shift, axis)]

    is_linear = False
    """Whether f is linear, so that a combination of a norm's statistics is one of these again (theory: Lemma N10)."""

    def averaged(self, call: Call, axis: int) -> int | None:
        """Axis of the result with the channels of ``axis``, if each is mapped linearly and alike."""
        return axis if self.is_linear and axis < self.first_spatial(call) else None

    def keeps(self, call: Call) -> bool:
        """Whether a constant other than 0 comes out as one number at every position."""
        return True

    def of_constants(self, call: Call, value: Tensor) -> Tensor:
        """That number, which is the constant itself unless a window is summed."""
        return value

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if isinstance(live, tuple):
            found = [part for part in live if part is not None]
            live = torch.stack(torch.broadcast_tensors(*found)).any(0)
        source, spatial = self.source(call), range(self.first_spatial(call), live.dim())
        facts.refuse_constants(call.node, source, spatial, Reason.CHANNEL_MIXING)
        return {source: live}


def _zero(value: Any) -> bool:
    return all(v == 0 for v in value) if isinstance(value, (tuple, list)) else not value


class AveragePool(PerChannel):
    """Average pooling: padding that is counted disturbs a constant at the border."""

    is_linear = True
    signature: tuple[str, ...] = (
        "input",
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    )

    def keeps(self, call: Call) -> bool:
        if call.get("divisor_override") is not None:
            return False
        # in ceil mode a window hangs over the end: only the part inside the padded picture counts
        return _zero(call.get("padding", 0)) or not call.get("count_include_pad", True)


class PowerPool(PerChannel):
    """lp_pool: the root of a sum over a window, all of which are of one size but in ceil mode."""

    signature: tuple[str, ...] = ("input", "norm_type", "kernel_size", "stride", "ceil_mode")

    def keeps(self, call: Call) -> bool:
        return not call.get("ceil_mode", False)

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        return []

    def of_constants(self, call: Call, value: Tensor) -> Tensor:
        size = call.get("kernel_size")
        window = [size] * self.n_spatial if isinstance(size, int) else list(size)
        lead = value.shape[: value.dim() - self.n_spatial]
        found: Tensor = call.run({self.source(call): value.double().cpu().expand(*lead, *window)})
        return found


class Interpolate(PerChannel):
    """interpolate: weights sum to one for every mode."""

    signature: tuple[str, ...] = ("input", "size", "scale_factor", "mode")


class InstanceNorm(PerChannel):
    """Instance norm on its own statistics: a constant channel comes out as its bias."""

    signature: tuple[str, ...] = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "use_input_stats",
        "momentum",
        "eps",
    )
    vectors = ("weight", "bias", "running_mean", "running_var")
    width_name = "num_features"

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields = super().label(call, labels)
        assert isinstance(fields, dict)
        operands = [(fields, self._lead(call))]
        for name in self.vectors:
            value = call.value(name)
            if value is not None:
                axis = self.channel_axis(call)
                column = labels.of(value)[0].view(
                    [-1 if a == axis else 1 for a in range(len(self._lead(call)))]
                )
                found = {axis: column}
                operands.append((found, tuple(n if a == axis else 1 for a, n in enumerate(self._lead(call)))))
        return labels.unify(operands, len(self._lead(call)), call.node.name)

    def _lead(self, call: Call) -> tuple[int, ...]:
        return call.shape(self.source(call))

    def channel_axis(self, call: Call) -> int:
        """Axis 1; axis 0 where a module is given one picture without a batch axis."""
        unbatched = getattr(call.module, "_get_no_batch_dim", None)
        return 0 if unbatched is not None and unbatched() == len(self._lead(call)) else 1

    def first_spatial(self, call: Call) -> int:
        return self.channel_axis(call) + 1

    def uses_batch(self, call: Call) -> bool:
        """Whether the statistics come from the input."""
        if call.module is not None:
            return call.module.training or call.module.running_mean is None
        return bool(call.get("use_input_stats", True))

    def vector(self, call: Call, facts: FactTable, name: str) -> Tensor | None:
        """A per-channel tensor as a float64 layout tensor of the operand."""
        value = call.value(name)
        if value is None:
            return None
        axis, rank = self.channel_axis(call), len(self._lead(call))
        return facts.constancy(value).value.double().cpu().view([-1 if a == axis else 1 for a in range(rank)])

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        c = facts.constancy(self.source(call))
        gamma, beta = self.vector(call, facts, "weight"), self.vector(call, facts, "bias")
        if not self.uses_batch(call):
            return self._affine(call, c, facts)
        c = c.settle(range(self.first_spatial(call)))
        shift = beta if beta is not None else torch.zeros_like(c.value)
        still = ~c.varies if gamma is None else ~c.varies | (gamma == 0)
        return Constancy(~still, shift.expand(torch.broadcast_shapes(shift.shape, still.shape)))

    def _affine(self, call: Call, c: Constancy, facts: FactTable) -> Constancy:
        gamma, beta = self.vector(call, facts, "weight"), self.vector(call, facts, "bias")
        mean, var = self.vector(call, facts, "running_mean"), self.vector(call, facts, "running_var")
        assert mean is not None and var is not None
        scale = torch.rsqrt(var + call.get("eps", 1e-5))
        scale = scale if gamma is None else scale * gamma
        value = (c.value - mean) * scale + (beta if beta is not None else 0.0)
        return Constancy(c.varies & (scale != 0), value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        gamma = self.vector(call, facts, "weight")
        return {self.source(call): live if gamma is None else live & (gamma != 0)}

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        bias = call.value("bias")
        if not isinstance(bias, Param) or bias.n_sites > 1 or bias.tensor.dim() != 1:
            return []
        if axis != self.channel_axis(call) or not isinstance(call.output, Tensor):
            return []
        old = bias.tensor.detach()
        new = (old.double() + shift.to(old.device)).to(old)
        return [Shifted((SetTensor(call.node.name, "bias", tuple(bias.names), new),))]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        axis, source = self.channel_axis(call), self.source(call)
        if call.module is None or not facts.changed(facts.fields(source), axis, call.shape(source)[axis]):
            return []
        return [SetArgument(call.node.name, self.width_name, facts.count(facts.fields(source), axis))]


op_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm, aten.instance_norm.default)(
    InstanceNorm
)


@op_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, F.batch_norm,
         (aten.batch_norm.default, "input weight bias running_mean running_var training momentum eps"),
         (aten._native_batch_norm_legit_no_training.default, "input weight bias running_mean running_var momentum eps"),
         (aten._native_batch_norm_legit.default, "input weight bias running_mean running_var training momentum eps"),
         (aten._native_batch_norm_legit.no_stats, "input weight bias training momentum eps"),
         (aten.native_batch_norm.default, "input weight bias running_mean running_var training momentum eps"),
         (torch.batch_norm, "input weight bias running_mean running_var training momentum eps"))  # fmt: skip
class BatchNorm(InstanceNorm):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta with stored statistics.

    With batch statistics (training mode) nothing is constant and every channel stays: the statistics of one batch
    are no property of the network.  Source: Lemma B1.
    """

    signature: tuple[str, ...] = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )
    is_overwritable = True

    def uses_batch(self, call: Call) -> bool:
        if call.module is not None:
            return call.module.training or call.module.running_mean is None
        legit = call.node.target is aten._native_batch_norm_legit_no_training.default
        return not legit and bool(call.get("training", False) or call.value("running_mean") is None)

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:  # type: ignore[override]
        if self.uses_batch(call):
            labels.refuse(call.node, Reason.TRAINING_MODE)
            for value in call.values():
                labels.pin(value, call.node.name, Reason.TRAINING_MODE)
        if not isinstance(call.output, (tuple, list)):
            return super().label(call, labels)
        return (self._tuple_label(call, labels), *({} for _ in call.output[1:]))

    def _tuple_label(self, call: Call, labels: Labeller) -> Fields:
        operands = [(labels.of(self.source(call)), self._lead(call))]
        shape = tuple(n if a == 1 else 1 for a, n in enumerate(self._lead(call)))
        for name in self.vectors:
            value = call.value(name)
            if value is not None:
                column = labels.of(value)[0].view([-1 if a == 1 else 1 for a in range(len(shape))])
                operands.append(({1: column}, shape))
        return labels.unify(operands, len(shape), call.node.name)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        c = facts.constancy(self.source(call))
        result = Constancy.top(c.value.dim()) if self.uses_batch(call) else self._affine(call, c, facts)
        if isinstance(call.output, (tuple, list)):
            return (result, *(Constancy.top(o.dim()) for o in call.output[1:]))
        return result

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        first = live[0] if isinstance(live, tuple) else live
        if self.uses_batch(call) or first is None:
            return OpRule.backward(self, call, live, facts)
        return super().backward(call, first, facts)


def _spellings(homes: Iterable[tuple[Any, str]]) -> list[Any]:
    """The targets of these names, those that this version of torch has; overload packets by their default."""
    found = [getattr(home, name, None) for home, name in homes]
    plain = [getattr(t, "default", t) if isinstance(t, torch._ops.OpOverloadPacket) else t for t in found]
    return list(dict.fromkeys(t for t in plain if t is not None))


_SNAKE = {"Max": "max", "AdaptiveAvg": "adaptive_avg", "AdaptiveMax": "adaptive_max"}


def _register_pools(d: int) -> None:
    """Pools and edges of ``d`` spatial axes: the last ones, whether there is a batch axis or not."""
    for kinds, more, settings in (
        (("Max",), f"max_pool{d}d_with_indices", {"shrinks_axes": True}),
        (("AdaptiveMax",), "", {"shrinks_axes": False}),
        (("AdaptiveAvg",), f"_adaptive_avg_pool{d}d", {"shrinks_axes": False, "is_linear": True}),
    ):
        pools = [f"{_SNAKE[kind]}_pool{d}d" for kind in kinds]
        homes = [(nn, f"{kind}Pool{d}d") for kind in kinds]
        homes += [(F, n) for n in pools] + [(torch, n) for n in pools] + [(aten, n) for n in (*pools, more)]
        op_rule(*_spellings(homes), n_spatial=d, **settings)(PerChannel)
    homes = [(nn, f"AvgPool{d}d"), (F, f"avg_pool{d}d"), (aten, f"avg_pool{d}d")]
    op_rule(*_spellings(homes), n_spatial=d)(AveragePool)
    op_rule(*_spellings([(nn, f"LPPool{d}d"), (F, f"lp_pool{d}d")]), n_spatial=d)(PowerPool)
    op_rule(*_spellings((nn, f"{m}Pad{d}d") for m in ("Reflection", "Replication", "Circular")), n_spatial=d)(
        PerChannel
    )


def _register() -> None:
    for d in (1, 2, 3):
        _register_pools(d)
    upsamples = [
        getattr(getattr(aten, f"upsample_{m}"), o)
        for m in (
            "nearest1d",
            "nearest2d",
            "nearest3d",
            "linear1d",
            "bilinear2d",
            "bicubic2d",
            "trilinear3d",
            "_nearest_exact1d",
        )
        if hasattr(aten, f"upsample_{m}")
        for o in ("default", "vec")
        if hasattr(getattr(aten, f"upsample_{m}"), o)
    ]
    op_rule(
        nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate, F.upsample, *upsamples
    )(Interpolate)


_register()
