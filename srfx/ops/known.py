"""What an op over channels makes of channels that are all constants (theory: Lemma R5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.ops.facts import FactTable


def of_known(
    call: Call, facts: FactTable, source: Value, axes: Iterable[int], otherwise: Constancy
) -> Constancy:
    """``otherwise``, but constant where all channels of ``axes`` are: the op is run on these.

    Args:
        call: an op of one operand that treats the positions of all other axes each by itself.
        facts: what is known of its operand.
        source: the operand.
        axes: the axes that the op mixes; nothing more is known unless each of them is one of channels.
        otherwise: what is known without this.
    """
    c, shape, axes = facts.constancy(source), call.shape(source), list(axes)
    value = c.value.double().cpu()
    value = value.expand(torch.broadcast_shapes(value.shape, c.varies.shape))
    output = call.output[0] if isinstance(call.output, (tuple, list)) else call.output
    is_whole = all(value.shape[a] == shape[a] for a in axes)
    if not is_whole or not output.is_floating_point() or facts.has_run_time_number(call.node.args):
        return otherwise
    still = ~c.varies.cpu().expand(value.shape)
    for a in axes:
        still = still.all(a, keepdim=True)
    if not bool(still.any()):
        return otherwise
    found = call.run({source: value})
    found = found[0] if isinstance(found, (tuple, list)) else found
    if output.dim() != value.dim():
        still = still.squeeze(axes)
    return _refined(otherwise, still, found)


def _refined(fact: Constancy, still: Tensor, value: Tensor) -> Constancy:
    still = still & value.isfinite()
    varies = fact.varies.cpu() & ~still
    return Constancy(
        varies, torch.where(still, value.double(), fact.value.cpu()), fact.affine, fact.sums_to_one
    )
