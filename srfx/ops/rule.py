"""The base class of op rules: an op's whole knowledge, each method with a safe default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live


class Effect(Enum):
    """What executing the op does besides computing its result."""

    PURE = "nothing"
    RANDOM = "draws random numbers"
    IMPURE = "may do anything"


@dataclass(frozen=True)
class PortSite:
    """An operand that its reader may narrow: a node, the axis of its channels, and whether constants may be supplied.

    ``absorbs``: a constant that the reader needs may come from a stored tensor instead of the operand.
    ``is_bound``: the reader takes channels of a norm's operand only, and no statistics in their places.
    """

    operand: fx.Node
    axis: int
    absorbs: bool
    is_bound: bool = False


@dataclass(frozen=True)
class Shifted:
    """One way to have numbers added to the channels of a result: by edits, once others are added to an operand's.

    Attributes:
        edits: of stored tensors that one site reads, and of arguments.
        operand: the node whose channels get numbers; None where the edits do it all.
        shift: those numbers, one for each of the operand's channels along ``axis``, float64.
        axis: the axis of the operand's channels.
    """

    edits: tuple[GraphEdit, ...] = ()
    operand: fx.Node | None = None
    shift: Tensor | None = None
    axis: int = 0


class OpRule:
    """How one op moves labels, constants and liveness, what it absorbs, and how a call of it is rewritten.

    The defaults are those of an op nobody knows: its operands keep every channel, its result varies.  Methods read
    only; the edits they return are carried out by a pass.
    """

    effect = Effect.PURE
    signature: tuple[str, ...] = ("input",)
    barrier: Reason = Reason.UNKNOWN_OP
    shrinks_axes: bool = False
    """Whether axes of the result are shorter than the operand's, by an amount that the call fixes: a window."""
    is_overwritable = False
    """Whether the result is storage of its own that the op's backward does not read: a reader may write over it."""

    def variant(self, call: Call) -> OpRule:
        """The rule of this very call, where one target stands for several ops."""
        return self

    def is_unrecognised(self, call: Call) -> bool:
        """Whether the arguments of this call are in a form that the rule cannot read: then it is a barrier."""
        return False

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        """Channel axes of the result; ties between operands are recorded in ``labels``."""
        for value in call.values():
            found = labels.fields.get(value)
            for fields in found if isinstance(found, tuple) else (labels.of(value),):
                for axis in fields:
                    labels.table.pin(fields[axis], call.node.name, self.barrier.name)
        output = call.output
        return tuple({} for _ in call.leaves) if isinstance(output, (tuple, list)) else {}

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        """Which channels of the result are constant, from those of the operands."""
        output = call.output
        if isinstance(output, (tuple, list)):
            return tuple(Constancy.top(o.dim() if isinstance(o, Tensor) else 0) for o in call.leaves)
        return Constancy.top(output.dim() if isinstance(output, Tensor) else 0)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        """Which channels of the operands have to exist for the live channels of the result."""
        demand: Demand = {}
        for value in call.values():
            found = facts.labeller.fields.get(value)
            if isinstance(found, tuple):
                assert not isinstance(value, torch.Tensor)
                for i, hint in enumerate(facts.program.leaves(value)):  # type: ignore[arg-type]
                    if isinstance(hint, Tensor):
                        demand[value, i] = everything(hint.dim())  # type: ignore[index]
            else:
                demand[value] = everything(len(call.shape(value)))
        return demand

    def ports(self, call: Call, facts: FactTable) -> list[PortSite]:
        """Operands of which this call may read channels of its own choice, whatever others keep."""
        return []

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        """Ways to add ``shift`` [C], float64, to the channels of the result along an axis, and nothing else.

        None, for an op that nobody knows (theory: Lemma G9).
        """
        return []

    def is_even(self, call: Call) -> bool:
        """Whether a permutation of positions, of operands and parameters alike, permutes the result, and nothing else.

        An op that moves positions counts too where the labels of its result show it (theory: Lemma G8).
        """
        return False

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        """Labels that have to be kept beside the live ones, given the kept set so far (None: no more)."""
        return None

    def loosen(self, call: Call) -> Iterable[GraphEdit]:
        """Edits that a call needs once anything before it is rewritten: its operand may be laid out otherwise."""
        return []

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        """Operands that the rewritten call still takes; the others need not be computed."""
        return call.values()

    def fold(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        """New parameter values, at the original sizes, after which nothing that is not live is read."""
        return ()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        """New sizes in the call's arguments, once its operands and parameters have lost their channels."""
        return ()


class Unknown(OpRule):
    """An op without a rule, or a call that its rule does not cover: a barrier, taken to have effects.

    Args:
        barrier: why; UNKNOWN_OP is named in the report.
    """

    effect = Effect.IMPURE

    def __init__(self, barrier: Reason = Reason.UNKNOWN_OP) -> None:
        self.barrier = barrier


def everything(rank: int) -> Tensor:
    """The layout tensor that marks every channel."""
    return torch.ones((1,) * rank, dtype=torch.bool)


def nothing(rank: int) -> Tensor:
    """The layout tensor that marks no channel."""
    return torch.zeros((1,) * rank, dtype=torch.bool)
