"""Convolutions: 1d to 3d, strided, dilated, grouped, depthwise, transposed (theory: Lemmas L1 to L4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.contraction import Contraction
from srfx.ops.facts import FactTable, Labeller
from srfx.ops.matrix_form import split_axis
from srfx.ops.registry import op_rule, resolve
from srfx.ops.rule import OpRule
from srfx.ops.sizes import set_argument

aten = torch.ops.aten


class Convolution(Contraction):
    """y[n, r, p] = b[r] + sum_c,t W[r, c, t] x[n, c, s p + d t - pad].  W [C_out, C_in/G, *k]."""

    signature: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    shrinks_axes = True
    is_overwritable = True

    def n_spatial(self, call: Call) -> int:
        return len(call.shape(self.w(call))) - 2

    def groups(self, call: Call) -> int:
        return int(call.get("groups", 1))

    def refused(self, call: Call) -> Reason | None:
        found = super().refused(call)
        if found is None and self.groups(call) > 1 and self._is_read_otherwise(call):
            return Reason.SHARED_WEIGHT
        return found

    def _is_read_otherwise(self, call: Call) -> bool:
        """Whether a weight of several groups has a site that does not group it alike: its columns are other channels."""
        w = self.w(call)
        if not isinstance(w, Param) or w.n_sites < 2:
            return False
        for node in call.program.readers(w):
            rule, other = resolve(node, call.program)
            is_alike = isinstance(rule, Convolution) and other.value("weight") is w
            if not is_alike or other.get("groups", 1) != self.groups(call) or type(rule) is not type(self):
                return True
        return False

    def channel_axis(self, call: Call) -> int:
        return len(call.out_shape) - self.n_spatial(call) - 1

    def matrix(self, call: Call, weight: Tensor) -> Tensor:
        return split_axis(weight, 0, self.groups(call)).flatten(3)

    def unmatrix(self, call: Call, m: Tensor, weight: Tensor) -> Tensor:
        flat = m.flatten(0, 1)
        return flat.view(*flat.shape, *(1 for _ in range(weight.dim() - 2)))

    def has_border(self, call: Call) -> bool:
        if call.module is not None and call.get("padding_mode", "zeros") != "zeros":
            return False
        padding = call.get("padding", 0)
        if isinstance(padding, str):
            return padding == "same" and any(k > 1 for k in call.shape(self.w(call))[2:])
        return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)

    def outer(self, call: Call, labels: Labeller) -> Fields:
        x, axis = self.x(call), self.channel_axis(call)
        fields = dict(self.operand(call, labels))
        spatial = [a for a in fields if a > axis]
        labels.pin(x, call.node.name, Reason.CHANNEL_MIXING, spatial)
        fields = {a: f for a, f in fields.items() if a <= axis}
        for a, f in fields.items():
            for d in range(axis + 1, f.dim()):
                if f.shape[d] > 1:
                    labels.table.tie(f, f.narrow(d, 0, 1))
                    f = fields[a] = f.narrow(d, 0, 1)
        return fields

    def known(self, call: Call, facts: FactTable) -> Constancy:
        return super().known(call, facts).settle(range(self.channel_axis(call) + 1))

    def _rows(self, call: Call, labels: Labeller, w: Value) -> Tensor:
        """Row labels; those of a grouped weight's columns differ from group to group, so they are set here."""
        if self.groups(call) > 1 and w not in labels.fields:
            self._grouped_fields(call, labels, w)
        return self._result_rows(call, labels.of(w))

    def _grouped_fields(self, call: Call, labels: Labeller, w: Value) -> None:
        shape = call.shape(w)
        rank, g = len(shape), self.groups(call)
        per_group = self._per_group(
            call
        )  # lanes along axis 1, one set of them for each group of axis-0 positions
        lanes = labels.table.fresh(g, per_group).repeat_interleave(shape[0] // g, 0)
        fields = {
            a: labels.table.fresh(n).view([n if i == a else 1 for i in range(rank)])
            for a, n in enumerate(shape)
        }
        fields[1] = lanes.view(shape[0], per_group, *(1 for _ in range(rank - 2)))
        labels.fields[w] = fields

    def _per_group(self, call: Call) -> int:
        return call.shape(self.w(call))[1]

    def _result_rows(self, call: Call, fields: Fields) -> Tensor:
        return fields[0].reshape(-1)

    def _operand_columns(self, call: Call, fields: Fields) -> Tensor:
        """Labels of the operand's channels as the weight knows them, [C_in]."""
        g, lanes = self.groups(call), fields[1].flatten(1)
        return lanes.view(g, -1, lanes.shape[1])[:, 0].reshape(-1)

    def _label_groups(self, call: Call, labels: Labeller, fields: Fields, rows: Tensor, g: int) -> None:
        columns = self._operand_columns(call, labels.of(self.w(call)))
        self._unify_columns(call, labels, fields, columns, len(call.shape(self.x(call))))
        ins, outs, site = columns.view(g, -1), rows.view(g, -1), call.node.name
        if ins.shape[1] == 1 and outs.shape[1] == 1:
            labels.table.tie(ins, outs)
            return
        group = columns if ins.shape[1] == 1 else labels.table.fresh(g)
        labels.table.block(ins, [group], site)
        labels.table.block(outs, [group], site)

    def resize(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        g = self.groups(call)
        edits: list[GraphEdit] = []
        if call.module is not None:
            edits += self.module_widths(call, facts, "in_channels", "out_channels")
        if g > 1:
            axis = self.channel_axis(call)
            stay = facts.is_kept(facts.fields(call.node)[axis]).reshape(g, -1).any(1)
            if int(stay.sum()) != g:
                edits.append(set_argument(call, "groups", int(stay.sum())))
        return edits


op_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d, aten.conv1d.default, aten.conv2d.default,
        aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)(Convolution)  # fmt: skip


class TransposedConvolution(Convolution):
    """The adjoint of a convolution.  W [C_in, C_out/G, *k]; positions see different taps unless the kernel is 1."""

    signature: tuple[str, ...] = (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    )

    def row_axis(self, call: Call) -> int:
        return 1

    def matrix(self, call: Call, weight: Tensor) -> Tensor:
        return split_axis(weight, 0, self.groups(call)).transpose(1, 2).flatten(3)

    def unmatrix(self, call: Call, m: Tensor, weight: Tensor) -> Tensor:
        flat = m.transpose(1, 2).flatten(0, 1)
        return flat.view(*flat.shape, *(1 for _ in range(weight.dim() - 2)))

    def has_border(self, call: Call) -> bool:
        ones = all(k == 1 for k in call.shape(self.w(call))[2:])
        return not (ones and _all(call.get("stride", 1), 1) and _all(call.get("padding", 0), 0))

    def _result_rows(self, call: Call, fields: Fields) -> Tensor:
        if self.groups(call) == 1:
            return fields[1].reshape(-1)
        lanes = fields[1].flatten(1)
        return lanes.view(self.groups(call), -1, lanes.shape[1])[:, 0].reshape(-1)

    def _operand_columns(self, call: Call, fields: Fields) -> Tensor:
        return fields[0].reshape(-1)


op_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, F.conv_transpose1d, F.conv_transpose2d,
        F.conv_transpose3d, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
        aten.conv_transpose3d.input)(TransposedConvolution)  # fmt: skip


def _all(value: Any, wanted: int) -> bool:
    return all(v == wanted for v in value) if isinstance(value, (tuple, list)) else value == wanted


class _TransposedConvolution(TransposedConvolution):
    """aten.convolution with ``transposed`` True."""


class _Convolution(Convolution):
    """aten.convolution, which says by ``transposed`` which of the two it is."""

    signature: tuple[str, ...] = (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "transposed",
        "output_padding",
        "groups",
    )
    _transposed = _TransposedConvolution()

    def variant(self, call: Call) -> OpRule:
        return self._transposed if call.get("transposed") else self


op_rule(aten.convolution.default)(_Convolution)
