"""Why the analysis keeps a class that nothing seems to need: the first of its constraints that holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from srfx.analysis.calls import Site
from srfx.analysis.liveness import executed, restored
from srfx.ir.effects import op_name
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.classes import Classes
from srfx.lattice.movement import Fields
from srfx.ops.attention import Matmul
from srfx.ops.contraction import Contraction
from srfx.ops.facts import Demand, FactTable, collapse
from srfx.ops.norm import LayerNorm
from srfx.ops.recurrent import Recurrent
from srfx.ops.rule import Effect
from srfx.ops.vector_norm import Normalize, VectorNorm

READ = "READ"
CARRIER = "CARRIER"
STATISTIC = "STATISTIC"
IMPLIED = "IMPLIED"
RESTORED = "RESTORED"
SUSTAINED = "SUSTAINED"
WHOLE = "WHOLE"
STEPS = "STEPS"
RELATED = "RELATED"

MEANINGS = {
    READ: "the analysis takes it for read",
    CARRIER: "carries the constants of its value into a zero-padded reader",
    STATISTIC: "its place is taken by a statistic that a norm emits",
    IMPLIED: "another class that is kept needs it",
    RESTORED: "an output is as wide as it was: a template fills it up",
    SUSTAINED: "an op needs it because of what else is kept",
    STEPS: "a recurrent layer is the same at each of its steps",
    RELATED: "it is constant only because of how its operands are related",
    WHOLE: "to leave it out of what a norm writes would cost more than it saves",
}
"""What the codes mean that are no `srfx.ir.plan.Reason`."""


@dataclass(frozen=True)
class Why:
    """A reason (name of a `srfx.ir.plan.Reason`, or a key of `MEANINGS`), where it arises, and more of it."""

    reason: str
    site: str
    detail: str = ""

    @property
    def meaning(self) -> str:
        """The reason in words."""
        return Reason[self.reason].value if self.reason in Reason.__members__ else MEANINGS[self.reason]


class Explainer:
    """Finds reasons for classes that are kept; what is expensive is computed once.

    Args:
        facts: the finished analysis.
        sites: its calls.
        left: classes to explain, by representative.
    """

    def __init__(self, facts: FactTable, sites: list[Site], left: Iterable[int]) -> None:
        assert facts.demanded is not None
        self.facts, self.sites, self.left = facts, sites, dict.fromkeys(left)
        classes = facts.classes
        self._nonlinear = {r.node: r.detail for r in facts.refusals if r.reason is Reason.NOT_LINEAR_IN_NORM}
        self._pins = self._pinned()
        self._implied = dataclasses.replace(classes, blocks=()).close(facts.demanded)
        self._blocks = dataclasses.replace(classes, multiple_of=1).close(facts.demanded)
        self._multiples = classes.close(facts.demanded)
        self._results = {site.node.name: self._carried(site.node) for site in sites}
        self._lonely = self._last_channels()
        self._readers = self._demands()
        self._carriers = self._chosen_carriers()
        self._statistics = self._places()
        self._sustained = self._sustainers()

    def why(self, label: int) -> Why:
        """The reason for which a class (its representative) stays."""
        facts = self.facts
        assert facts.demanded is not None
        if label in self._pins:
            return self._pins[label]
        if bool(facts.demanded[label]):
            return self._reader(label)
        if label in self._carriers:
            return Why(CARRIER, self._carriers[label])
        if label in self._statistics:
            return Why(STATISTIC, self._statistics[label])
        if bool(self._implied[label]):
            return self._implication(label)
        if bool(self._blocks[label]):
            return Why(Reason.BLOCK_COUNT.name, self._block(label))
        if bool(self._multiples[label]):
            return Why(Reason.MULTIPLE_OF.name, self._block(label))
        if label in self._sustained:
            return self._sustained[label]
        if label in self._lonely:
            return Why(Reason.LAST_CHANNEL.name, self._lonely[label])
        if label in self._readers:
            return self._reader(label)
        implied = self._implication(label)
        if implied.site:
            return implied
        block = self._block(label)
        if block:
            return Why(Reason.BLOCK_COUNT.name, block, "beside a class that is kept itself without need")
        return Why(Reason.LAST_CHANNEL.name, "")

    def _reader(self, label: int) -> Why:
        """Who reads the class; if what the reader makes of it could go too, the reason for which that stays."""
        seen: dict[int, None] = {}
        while label not in seen:
            seen[label] = None
            found = self._readers.get(label, Why(READ, "", "at first only"))
            further = [x for x in self._results.get(found.site, ()) if x in self.left and x not in seen]
            if found.reason != READ or not further:
                break
            label = further[0]
            if label in self._pins:
                return self._pins[label]
            if label in self._lonely:
                return Why(Reason.LAST_CHANNEL.name, self._lonely[label])
        return found

    # ------------------------------------------------------------------ what holds which class
    def _pinned(self) -> dict[int, Why]:
        rep, found = self.facts.classes.representative, dict[int, Why]()
        for pin in self.facts.labeller.table.pins:
            for label in rep[pin.labels].unique().tolist():
                found.setdefault(label, Why(pin.reason, pin.site))
        return found

    def _demands(self) -> dict[int, Why]:
        """For each class the call that demands it: one that cannot do without rather than one that passes it on."""
        found: dict[int, tuple[int, Why]] = {}
        for site in reversed(self.sites):
            is_idle = self.facts.live.get(site.node) is None and not self.facts.program.is_tensor(site.node)
            if is_idle and site.rule.effect is not Effect.IMPURE:
                continue  # sizes and the like
            demand = site.rule.backward(site.call, self._live(site.node), self.facts)
            own = self._results[site.node.name]
            for value, part in demand.items():
                name = value[0].name if isinstance(value, tuple) else _name(value)
                is_inner = (
                    isinstance(value, tuple) and value[0] is site.node
                )  # a layer that reads its own states
                why = Why(STEPS if is_inner else READ, site.node.name, f"{_op(site)} reads {name}")
                for label in self._labels(value, part):
                    _note(found, label, 3 if label in own else 2, why)
            self._note_special(site, demand, found)
        output = self.facts.program.gm.graph.output_node()
        for node in output.all_input_nodes:
            rank, why = 1, Why(READ, "output", f"{node.name} is an output")
            if self._is_integer(node):  # positions of maxima, which no rule follows
                rank, why = 0, Why(Reason.DATA_DEPENDENT.name, node.name, "integers that are an output")
            for value, part in _parts(node, self.facts.live.get(node)):
                for label in self._labels(value, part):
                    _note(found, label, rank, why)
            if not self.facts.program.is_tensor(node):
                continue  # a size
            template = restored(self.facts, node)
            for label in self._labels(node, template) if bool(template.any()) else ():
                _note(found, label, 0, Why(RESTORED, node.name))
        return {label: why for label, (_, why) in found.items()}

    def _is_integer(self, node: fx.Node) -> bool:
        hint = self.facts.program.hints.get(node)
        return isinstance(hint, Tensor) and not (hint.is_floating_point() or hint.is_complex())

    def _carried(self, node: fx.Node) -> list[int]:
        """Classes of a node's result."""
        fields = self.facts.labeller.fields.get(node, {})
        parts = fields if isinstance(fields, tuple) else (fields,)
        rep = self.facts.classes.representative
        return [label for part in parts for f in part.values() for label in rep[f].unique().tolist()]

    def _last_channels(self) -> dict[int, str]:
        """Classes that are all that is left of a value's axis."""
        found: dict[int, str] = {}
        rep = self.facts.classes.representative
        for value in executed(self.facts, self.sites):
            fields = self.facts.labeller.fields.get(value)
            for labels in fields.values() if isinstance(fields, dict) else ():
                held = rep[labels].unique()
                held = held[self.facts.kept[held]]
                if held.numel() == 1:
                    found.setdefault(int(held), _name(value))
        return found

    def _live(self, node: fx.Node) -> Any:
        live = self.facts.live.get(node)
        if live is not None:
            return live
        hint = self.facts.program.hints.get(node)
        if isinstance(hint, (tuple, list)):
            return (None,) * len(hint)
        return torch.zeros((1,) * (hint.dim() if isinstance(hint, Tensor) else 0), dtype=torch.bool)

    def _note_special(self, site: Site, demand: Demand, found: dict[int, tuple[int, Why]]) -> None:
        """Constants that a layer cannot absorb: its bias is not its own, or none, or they meet zero padding."""
        rule, call, facts = site.rule, site.call, self.facts
        if isinstance(rule, Matmul):  # by a parameter: a layer without a place for a bias (theory: Lemma L6)
            rule = rule.rule(call)
        if isinstance(rule, Recurrent) and rule.refused(call) is None:
            self._note_recurrent(site, demand, found)
        if isinstance(rule, LayerNorm) and site.node.name in self._nonlinear:
            x = rule.x(call)
            still = demand[x] & ~facts.constancy(x).varies.cpu() if x in demand else None
            detail = f"{_op(site)} sees {_name(x)}, {self._nonlinear[site.node.name]}"
            for label in self._labels(x, still) if still is not None else ():
                _note(found, label, 0, Why(Reason.NOT_LINEAR_IN_NORM.name, site.node.name, detail))
        if isinstance(rule, (Normalize, VectorNorm)):
            self._note_length(site, demand, found)
        if not isinstance(rule, Contraction) or rule.refused(call) is not None:
            return
        x = rule.x(call)
        if x not in demand:
            return
        still = demand[x] & ~facts.constancy(x).varies.cpu()
        detail = f"{_op(site)} reads {_name(x)}"
        if not rule.is_private(call, facts):
            for label in self._labels(x, still):
                _note(found, label, 0, Why(Reason.SHARED_WEIGHT.name, site.node.name, detail))
        elif rule.has_border(call):
            for label in self._labels(x, still & facts.constancy(x).nonzero().cpu()):
                _note(found, label, 0, Why(Reason.BORDER.name, site.node.name, detail))

    def _note_length(self, site: Site, demand: Demand, found: dict[int, tuple[int, Why]]) -> None:
        """Constants other than 0 are part of a length (theory: Lemma R3)."""
        for x, part in demand.items():
            if isinstance(x, tuple):
                continue
            still = part & self.facts.constancy(x).nonzero().cpu()
            why = Why(
                Reason.CHANNEL_MIXING.name, site.node.name, f"a constant of {_name(x)} is part of a length"
            )
            for label in self._labels(x, still):
                _note(found, label, 0, why)

    def _note_recurrent(self, site: Site, demand: Demand, found: dict[int, tuple[int, Why]]) -> None:
        assert isinstance(site.rule, Recurrent)
        o = site.rule.known(site.call)
        reason = Reason.GROWS if site.rule.is_private(o) else Reason.SHARED_WEIGHT
        for value in (o.x, o.h if site.rule.is_cell else None):
            if value is None or value not in demand:
                continue
            detail = f"{_op(site)} has no bias to take constants of {_name(value)} in"
            still = demand[value] & ~self.facts.constancy(value).varies.cpu()
            for label in self._labels(value, still):
                _note(found, label, 0, Why(reason.name, site.node.name, detail))

    def _labels(self, value: Value | tuple[fx.Node, int], live: Tensor) -> list[int]:
        """Classes of the live elements of a value."""
        key, index = value if isinstance(value, tuple) else (value, None)
        fields: Any = self.facts.labeller.fields.get(key, {})
        fields = fields[index] if isinstance(fields, tuple) and index is not None else fields
        if isinstance(fields, tuple):
            return []
        found = classes_of(fields, live.cpu(), self.facts.classes)
        return found.tolist()

    def _chosen_carriers(self) -> dict[int, str]:
        found = {}
        for value, channel in self.facts.carriers.items():
            fields = self.facts.fields(value)
            labels = next(iter(fields.values())).flatten()
            found[int(self.facts.classes.representative[labels[channel]])] = _name(value)
        return found

    def _places(self) -> dict[int, str]:
        found = {}
        for norm, places in self.facts.emitted.items():
            if isinstance(norm, fx.Node):
                for labels in self.facts.fields(norm).values():
                    flat = self.facts.classes.representative[labels.flatten()]
                    for name, place in places.items():
                        if place < flat.numel():
                            found[int(flat[place])] = f"{norm.name}: {name}"
        return found

    def _sustainers(self) -> dict[int, Why]:
        found: dict[int, Why] = {}
        for site in self.sites:
            labels = site.rule.sustain(site.call, self.facts)
            if labels is not None:
                why = Why(WHOLE if site.node in self.facts.whole else SUSTAINED, site.node.name)
                for label in self.facts.classes.representative[labels].unique().tolist():
                    found.setdefault(label, why)
        return found

    def _implication(self, label: int) -> Why:
        classes = self.facts.classes
        for guards, targets in zip(classes.guards, classes.targets, strict=True):
            hits = ((targets == label) & self.facts.kept[guards].all(0)).nonzero().flatten()
            for hit in hits.tolist():
                others = [g for g in guards[:, hit].tolist() if g not in (0, label)]
                if others:
                    return Why(IMPLIED, self.place(others[-1]))
        return Why(IMPLIED, "")

    def _block(self, label: int) -> str:
        for block in self.facts.classes.blocks:
            if bool((block.rows == label).any()):
                return block.site
        return ""

    def place(self, label: int) -> str:
        """A value, axis and position that carry a class."""
        for value, fields in self.facts.labeller.fields.items():
            for part in fields if isinstance(fields, tuple) else (fields,):
                for axis, labels in part.items():
                    hits = (self.facts.classes.representative[labels] == label).nonzero()
                    if hits.numel():
                        return f"{_name(value)} axis {axis} channel {int(hits[0, axis])}"
        return ""


def _note(found: dict[int, tuple[int, Why]], label: int, rank: int, why: Why) -> None:
    if label not in found or rank < found[label][0]:
        found[label] = rank, why


def classes_of(fields: Fields, marked: Tensor, classes: Classes) -> Tensor:
    """Representatives of the classes of marked elements, each once."""
    found: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    for labels in fields.values():
        chosen = collapse(marked, tuple(labels.shape)).expand(labels.shape)
        found.append(classes.representative[labels[chosen]])
    joint: Tensor = torch.cat(found).unique()
    return joint


def _parts(node: fx.Node, live: Any) -> list[tuple[Any, Tensor]]:
    if isinstance(live, Tensor):
        return [(node, live)]
    return [((node, i), part) for i, part in enumerate(live or ()) if part is not None]


def _name(value: Value) -> str:
    return (value.names[0] if value.names else "?") if isinstance(value, Param) else value.name


def _op(site: Site) -> str:
    module = site.call.module
    return type(module).__name__ if module is not None else op_name(site.node)
