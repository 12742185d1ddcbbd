"""`explain`: the shortest chain of reasons for which a channel is still there.

A minimized model needs nothing beside itself to be explained: analysed again, it keeps every channel it has, and the
analysis says for what.  So explaining costs nothing until somebody asks, and works after pickle, load and training.

Channels that stay together are one class.  A class is *read* for another when a call needs it to compute the other; the
distance of a class is the length of the shortest way along reads to something that has to stay by itself: an output, an
op that is not known, a pin, or a rule that brought it back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from srfx.analysis import analyse
from srfx.analysis.calls import Site
from srfx.analysis.why import Explainer, Why, classes_of
from srfx.errors import PlanError, UnknownChannelError
from srfx.ir.capture import capture
from srfx.ir.effects import op_name
from srfx.ir.program import Param, Value
from srfx.ir.shapes import SharedHints, survey
from srfx.ir.surroundings import on_cpu, plain_torch
from srfx.lattice.movement import Fields
from srfx.minimize import canonicalise
from srfx.ops.facts import FactTable
from srfx.record.attach import model_of, record_of, remembered_inputs
from srfx.record.keep_plan import KeepPlan

OUTPUT = "OUTPUT"


@dataclass(frozen=True)
class Step:
    """One read: ``reader`` needs ``channel`` of ``value`` (in the small model's numbering)."""

    value: str
    channel: int
    reader: str
    op: str

    def __str__(self) -> str:
        return f"channel {self.channel} of {self.value} is read by {self.reader} ({self.op})"


@dataclass(frozen=True)
class Explanation:
    """Why a channel stays.  ``str()`` gives it as sentences.

    Attributes:
        tensor: name of the parameter.
        axis: its axis.
        channel: the channel, in the numbering of the original.
        position: where it is in the small tensor; None when it is gone.
        steps: from the channel to what holds it, each read for the next.
        reason: ``OUTPUT``, name of a `srfx.ir.plan.Reason`, or a key of `srfx.analysis.why.MEANINGS`.
        site: where that is.
        text: the reason in words.
    """

    tensor: str
    axis: int
    channel: int
    position: int | None
    steps: tuple[Step, ...]
    reason: str
    site: str
    text: str

    def __str__(self) -> str:
        head = f"{self.tensor}, axis {self.axis}, channel {self.channel}"
        if self.position is None:
            return f"{head}: gone; {self.text}"
        lines = [f"{head} (now {self.position}) stays:", *(f"  {step}" for step in self.steps)]
        return "\n".join([*lines, f"  {self.text}" + (f" ({self.site})" if self.site else "")])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def explain(small: nn.Module | KeepPlan, name: str, channel: int, axis: int = 0) -> Explanation:
    """Why is this channel still there?

    Args:
        small: a result of `srfx.minimize`, or its plan as long as the result is still there.
        name: a parameter, or a layer (its weight is meant).
        channel: which, in the numbering of the original model.
        axis: of the parameter; 0 is the output of linear layers and convolutions.

    Raises:
        PlanError: ``small`` was not made by `srfx.minimize`, or is the plan of a model that is gone.
        UnknownChannelError: no such parameter, axis or channel.

    Example:
        >>> import srfx
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[0].zero_()
        >>> print(explain(srfx.minimize(net, torch.randn(1, 4)), "0", 2))
        0.weight, axis 0, channel 2 (now 1) stays:
          channel 1 of _1 is read by _2 (Linear)
          it is an output of the model (_2)

    Cost: an analysis of the small model, about 2 ms a node.  For many channels of one model use `Reasons`.
    """
    if isinstance(small, KeepPlan):
        found = model_of(small)
        if found is None:
            raise PlanError("the minimized model of this plan is no longer in memory: give the model itself")
        small = found
    return Reasons(small).explain(name, channel, axis)


class Reasons:
    """The analysis of a small model, for any number of explanations.

    Args:
        small: a result of `srfx.minimize`.

    Raises:
        PlanError: it was not made by `srfx.minimize`.
    """

    def __init__(self, small: nn.Module) -> None:
        record = record_of(small)
        if record is None:
            raise PlanError(f"this {type(small).__name__} carries no record: give a result of srfx.minimize")
        self.plan: KeepPlan = record.plan
        with plain_torch(), torch.no_grad():
            captured = capture(small)
            gm = captured.graph_module
            inputs = captured.inputs if captured.inputs is not None else remembered_inputs(small, gm)
            hints = SharedHints(survey(gm, inputs))
            canonicalise(gm, hints)
            with on_cpu():
                multiple_of = int(record.plan.options.get("multiple_of", 1))
                self.facts, self.sites = analyse(gm, survey(gm, hints).values, multiple_of)
                self.distance, self.via = self._distances()

    def explain(self, name: str, channel: int, axis: int = 0) -> Explanation:
        """See `explain`."""
        tensor, axis, position = self._locate(name, channel, axis)
        if position is None:
            text = "nothing needs it: it was not read, or it was a constant and is folded into its readers"
            return Explanation(tensor, axis, channel, None, (), "", "", text)
        label = self._label(tensor, axis, position)
        if label is None:
            text = "its axis is not followed: all of it stays"
            return Explanation(tensor, axis, channel, position, (), "UNTRACKED_AXIS", tensor, text)
        with torch.no_grad(), on_cpu():
            steps, label = self._chain(label)
            end = self._end(label)
        meaning = "it is an output of the model" if end.reason == OUTPUT else end.meaning
        return Explanation(tensor, axis, channel, position, tuple(steps), end.reason, end.site, meaning)

    def is_read(self, name: str, channel: int, axis: int = 0) -> bool:
        """Whether reads lead from this kept channel to something that has to stay."""
        tensor, axis, position = self._locate(name, channel, axis)
        label = None if position is None else self._label(tensor, axis, position)
        return label is None or int(self.distance[label]) >= 0

    def _locate(self, name: str, channel: int, axis: int) -> tuple[str, int, int | None]:
        names = {n for t in self.plan.tensors for n in (t.name, *t.aliases)}
        found = self.plan.tensor(name if name in names or f"{name}.weight" not in names else f"{name}.weight")
        kept = self.plan.kept(found.name, axis)
        axis %= len(found.shape)
        if not 0 <= channel < found.shape[axis]:
            raise UnknownChannelError(
                f"{found.name} has {found.shape[axis]} channels along axis {axis}, there is no {channel}"
            )
        hits = (kept == channel).nonzero()
        return found.name, axis, int(hits[0, axis if kept.dim() > 1 else 0]) if hits.numel() else None

    def _label(self, tensor: str, axis: int, position: int) -> int | None:
        for param in self.facts.program.params():
            fields = self.facts.labeller.fields.get(param)
            if tensor in param.names and isinstance(fields, dict) and axis in fields:
                labels = fields[axis].select(axis, position).flatten()
                return int(self.facts.classes.representative[labels[0]])
        return None

    # ------------------------------------------------------------------ distances
    def _distances(self) -> tuple[Tensor, dict[int, Site]]:
        """Reads to the end for each class (-1: none leads there), and the call that reads it on the shortest way."""
        facts = self.facts
        distance = torch.full((facts.labeller.table.size,), -1)
        via: dict[int, Site] = {}
        distance[self._outputs()] = 0
        for pin in facts.labeller.table.pins:
            distance[facts.classes.representative[pin.labels]] = 0
        is_new = True
        while is_new:
            is_new = False
            for site in reversed(self.sites):
                for step in self._levels(site, distance):
                    demanded = self._demanded(site, distance == step)
                    nearer = demanded[(distance[demanded] < 0) | (distance[demanded] > step + 1)]
                    distance[nearer] = step + 1
                    via |= dict.fromkeys(nearer.tolist(), site)
                    is_new = is_new or nearer.numel() > 0
        return distance, via

    def _levels(self, site: Site, distance: Tensor) -> list[int]:
        found = distance[_classes(self.facts, site.node)]
        return [int(d) for d in found.unique() if d >= 0]

    def _outputs(self) -> Tensor:
        parts = [torch.zeros(0, dtype=torch.long)]
        for node in self.facts.program.gm.graph.output_node().all_input_nodes:
            parts.append(_classes(self.facts, node))
        return torch.cat(parts)

    def _demanded(self, site: Site, marked: Tensor) -> Tensor:
        """Classes that the call reads for those of its result that are marked, [labels] bool."""
        facts = self.facts
        fields = facts.labeller.fields.get(site.node)
        live = facts.live.get(site.node)
        if not isinstance(fields, dict) or not isinstance(live, Tensor):
            if live is None or not isinstance(fields, tuple):
                return torch.zeros(0, dtype=torch.long)
            wanted: Any = live  # parts of a tuple: what is live of all of them
        else:
            wanted = live.cpu()
            for labels in fields.values():
                wanted = wanted & marked[facts.classes.representative[labels]]
            if not bool(wanted.any()):
                return torch.zeros(0, dtype=torch.long)
        parts = [torch.zeros(0, dtype=torch.long)]
        for key, found in site.rule.backward(site.call, wanted, facts).items():
            value, index = key if isinstance(key, tuple) else (key, None)
            held: Any = facts.labeller.fields.get(value, {})
            held = held[index] if isinstance(held, tuple) and index is not None else held
            if isinstance(held, dict):
                parts.append(classes_of(held, found.cpu(), facts.classes))
        joint: Tensor = torch.cat(parts).unique()
        return joint

    # ------------------------------------------------------------------ one chain
    def _chain(self, label: int) -> tuple[list[Step], int]:
        steps: list[Step] = []
        while int(self.distance[label]) > 0:
            site = self.via[label]
            value, channel = self._operand(site, label)
            steps.append(Step(value, channel, site.node.name, _op(site)))
            label = self._result(site, label)
        return steps, label

    def _result(self, site: Site, label: int) -> int:
        """A class of the call's result, one step nearer to the end, for which the call reads the class; by halving."""
        near = _classes(self.facts, site.node)
        near = near[self.distance[near] == self.distance[label] - 1].unique()
        while near.numel() > 1:
            half = near[: near.numel() // 2]
            marked = torch.zeros_like(self.distance, dtype=torch.bool)
            marked[half] = True
            near = half if bool((self._demanded(site, marked) == label).any()) else near[near.numel() // 2 :]
        return int(near[0])

    def _operand(self, site: Site, label: int) -> tuple[str, int]:
        for value in site.call.values():
            if not isinstance(value, Param):
                for fields in _parts(self.facts, value):
                    for axis, labels in fields.items():
                        hits = (self.facts.classes.representative[labels] == label).nonzero()
                        if hits.numel():
                            return value.name, int(hits[0, axis])
        return "its parameters", -1

    def _end(self, label: int) -> Why:
        if bool((self._outputs() == label).any()):
            names = [
                n.name
                for n in self.facts.program.gm.graph.output_node().all_input_nodes
                if bool((_classes(self.facts, n) == label).any())
            ]
            return Why(OUTPUT, names[0])
        return Explainer(self.facts, self.sites, [label]).why(label)


def _parts(facts: FactTable, value: Value) -> list[Fields]:
    found = facts.labeller.fields.get(value, {})
    return list(found) if isinstance(found, tuple) else [found]


def _classes(facts: FactTable, node: fx.Node) -> Tensor:
    parts = [torch.zeros(0, dtype=torch.long)]
    for fields in _parts(facts, facts.program.value(node)):
        parts += [facts.classes.representative[labels].flatten() for labels in fields.values()]
    joint: Tensor = torch.cat(parts).unique()
    return joint


def _op(site: Site) -> str:
    module = site.call.module
    return type(module).__name__ if module is not None else op_name(site.node)
