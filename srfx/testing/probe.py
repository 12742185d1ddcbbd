"""The completeness probe: what a minimized model, or a masked one, could lose that the analysis does not see.

The zeros say what may go, the other numbers do not matter.  So they are drawn anew, widely and often, and the model
is run in float64: a channel that never varied, and one that noise may replace without a change at the outputs, need
not exist.  A class of tied channels all of which are such is *removable*.  Where the analysis keeps it, the probe
says so, and for which reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from srfx.analysis import analyse
from srfx.analysis.calls import Site
from srfx.analysis.why import READ, Explainer, Why, classes_of
from srfx.ir.aliases import mutation_barriers
from srfx.ir.capture import capture
from srfx.ir.program import Program
from srfx.ir.shapes import SharedHints, survey
from srfx.ir.surroundings import on_cpu, plain_torch
from srfx.lattice.movement import Fields
from srfx.minimize import canonicalise
from srfx.ops.facts import FactTable, collapse
from srfx.ops.recurrent import Recurrent
from srfx.testing.observe import Observer
from srfx.testing.origin import Origins


@dataclass(frozen=True)
class ValueProbe:
    """What running showed of the channels of one value along one axis.

    Attributes:
        node: the value, by its node in the canonical graph.
        axis: the channel axis.
        size: its length.
        still: positions that never varied.
        unread: positions that vary and that noise may replace.
    """

    node: str
    axis: int
    size: int
    still: tuple[int, ...]
    unread: tuple[int, ...]


@dataclass(frozen=True)
class Leftover:
    """A class of tied channels that could go and stayed.

    Attributes:
        members: its channels, as (node, axis, position).
        reason: name of a `srfx.ir.plan.Reason`, or READ, CARRIER, STATISTIC, IMPLIED, RESTORED, SUSTAINED.
        site: node or value where the reason arises.
        detail: more of it.
    """

    members: tuple[tuple[str, int, int], ...]
    reason: str
    site: str
    detail: str = ""

    def __str__(self) -> str:
        node, axis, position = self.members[0]
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        meaning = Why(self.reason, self.site).meaning
        where = f" at {self.site}" if self.site else ""
        return f"{node} axis {axis} channel {position}{more}: {self.reason} ({meaning}){where} {self.detail}".rstrip()


@dataclass(frozen=True)
class Probe:
    """What the probe found; plain data.

    Attributes:
        values: every value with channels, axis by axis, in graph order.
        n_classes: classes of tied channels that flow through the graph.
        n_unneeded: those that are still or unread.
        n_removable: those of them that could go while heads and groups keep equally many channels.
        leftovers: those of them that the analysis keeps.
        n_draws: draws of weights that told something.
    """

    values: tuple[ValueProbe, ...]
    n_classes: int
    n_unneeded: int
    n_removable: int
    leftovers: tuple[Leftover, ...]
    n_draws: int

    @property
    def n_gone(self) -> int:
        """Removable classes that go."""
        return self.n_removable - len(self.leftovers)

    @property
    def n_held(self) -> int:
        """Classes that are not needed, but that equal counts of other classes hold."""
        return self.n_unneeded - self.n_removable

    @property
    def share(self) -> float:
        """Share of removable classes that go; 1 when there are none."""
        return self.n_gone / self.n_removable if self.n_removable else 1.0

    @property
    def reasons(self) -> dict[str, int]:
        """Number of leftovers by reason."""
        return dict(sorted(Counter(left.reason for left in self.leftovers).items()))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self) | {"share": self.share}, sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        lines = [
            f"{self.n_classes} classes of tied channels, {self.n_draws} draws of weights",
            f"{self.n_removable} could go, {self.n_gone} go ({100 * self.share:.1f} %)",
            *([f"  {self.n_held} more are not needed, but for equal counts"] if self.n_held else []),
        ]
        for reason, count in self.reasons.items():
            lines.append(f"  {count} stay: {reason}, {Why(reason, '').meaning}")
            lines += [f"    {left}" for left in [x for x in self.leftovers if x.reason == reason][:5]]
        for v in self.values:
            if v.still or v.unread:
                lines.append(
                    f"  {v.node} axis {v.axis}, {v.size} channels: {len(v.still)} never vary{_some(v.still)}, "
                    f"{len(v.unread)} are never read{_some(v.unread)}"
                )
        return "\n".join(lines)


def _some(positions: tuple[int, ...]) -> str:
    if not positions:
        return ""
    shown = ", ".join(map(str, positions[:8]))
    return f" ({shown}{', ...' if len(positions) > 8 else ''})"


def probe(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
    n_draws: int = 6,
    max_draws: int = 16,
    seed: int = 0,
) -> Probe:
    """Find what could go, by running the model on other weights with the same zeros.

    Of a masked model it tells which share of what could go `srfx.minimize` removes; of a minimized one, what is
    left that could go.  Nothing is called removable that is read and varies: that a channel is still or unread
    must hold in every draw, and what would be unread alone but not together with the others counts as read.

    Args:
        model: as for `srfx.minimize`; not changed.
        example_inputs: positional arguments; where they have values these are run too.
        example_kwargs: keyword arguments.
        multiple_of: as for `srfx.minimize`.
        n_draws: draws of weights, each run on several inputs.
        max_draws: go on up to so many while there is a class that could go and stayed.
        seed: of all draws.

    Returns:
        A `Probe`; print it.

    Raises:
        CaptureError, MissingShapesError, UnsupportedModelError: as for `srfx.minimize`.

    Cost: about 10 runs of the model in float64, forward and backward, for each draw.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:].zero_()
        >>> found = probe(net, torch.randn(3, 4))
        >>> found.n_removable, found.share
        (6, 1.0)
    """
    with plain_torch():
        captured = capture(model, example_inputs, example_kwargs)
        gm = captured.graph_module
        hints = SharedHints(survey(gm, captured.inputs))
        canonicalise(gm, hints)
        surveyed = survey(gm, hints)
        with on_cpu():
            facts, sites = analyse(gm, surveyed.values, multiple_of)
        given = captured.inputs if captured.inputs is not None else surveyed.inputs
        return examine(facts, sites, given, n_draws, max_draws, seed)


def examine(
    facts: FactTable, sites: list[Site], hints: list[Any], n_draws: int, max_draws: int, seed: int
) -> Probe:
    """Probe a graph whose analysis is there already."""
    watched = _watched(facts)
    gm = facts.program.gm
    layouts = {node.name: facts.layout(node) for node in watched}
    inner = {name: labels for site in sites for name, labels in _inner_columns(facts, site)}
    observer = Observer(gm, layouts, hints, seed, bool(mutation_barriers(gm)), list(inner))
    flowing = _flowing(facts, watched)
    draw = 0
    while draw < n_draws or (
        draw < max_draws and bool((_removable(facts, watched, observer, flowing, inner) & facts.kept).any())
    ):
        observer.draw(draw)
        draw += 1
    if observer.n_draws:
        observer.confirm()
    unneeded = _unneeded(facts, watched, observer, flowing, inner)
    removable = _removable(facts, watched, observer, flowing, inner)
    left = (removable & facts.kept).nonzero().flatten().tolist()
    return Probe(
        tuple(_value_probes(watched, observer)),
        int(flowing.sum()),
        int(unneeded.sum()),
        int(removable.sum()),
        tuple(_leftovers(facts, sites, watched, left, Origins(facts, sites, observer))),
        observer.n_draws,
    )


def _watched(facts: FactTable) -> dict[fx.Node, Fields]:
    """Values with channels, in graph order; a tuple is seen where its parts are taken out.

    What no input reaches, or its sizes only (tables of angles, positions, a mask of windows), never varies, and
    positions that index something are no channels: neither is seen.
    """
    found = {}
    idle = facts.program.independent | facts.program.tables | _of_sizes(facts.program)
    for node in facts.program.nodes:
        fields, hint = facts.labeller.fields.get(node), facts.program.hints.get(node)
        if node in idle or node.op == "get_attr" or not isinstance(hint, Tensor):
            continue
        if isinstance(fields, dict) and fields and (hint.is_floating_point() or hint.is_complex()):
            found[node] = fields
    return found


def _of_sizes(program: Program) -> set[fx.Node]:
    """Tensors that no number of an input reaches, only sizes."""
    found: set[fx.Node] = set()
    for node in program.nodes:
        tensors = [n for n in node.all_input_nodes if not isinstance(program.hints.get(n), (int, torch.Size))]
        if node.op.startswith("call") and all(n in found or n.op == "get_attr" for n in tensors):
            found.add(node)
    return found


def _flowing(facts: FactTable, watched: dict[fx.Node, Fields]) -> Tensor:
    """Classes that some value carries, [labels] bool by representative."""
    found = torch.zeros(facts.labeller.table.size, dtype=torch.bool)
    for fields in watched.values():
        for labels in fields.values():
            found[facts.classes.representative[labels]] = True
    found[facts.classes.representative[0]] = False
    return found


def _inner_columns(facts: FactTable, site: Site) -> list[tuple[str, Tensor]]:
    """Weights of a recurrent layer that read its own states, and the labels of their columns.

    The state that a cell reads is a value of the graph, which is watched itself.
    """
    if not isinstance(site.rule, Recurrent) or site.rule.is_cell or site.rule.refused(site.call) is not None:
        return []
    weights = site.rule.known(site.call).weights
    read = [weights[name] for name in ("weight_hh", "weight_hr") if name in weights]
    return [(w.names[0], facts.labeller.of(w)[1].flatten()) for w in read]


def _unneeded(
    facts: FactTable,
    watched: dict[fx.Node, Fields],
    observer: Observer,
    flowing: Tensor,
    inner: Mapping[str, Tensor],
) -> Tensor:
    """Flowing classes none of whose elements both varies and is read; none before anything was learnt."""
    if not observer.n_draws:
        return torch.zeros_like(flowing)
    found = flowing.clone()
    for node, fields in watched.items():
        needed = observer.varies[node.name] & observer.read[node.name]
        found[classes_of(fields, needed, facts.classes)] = False
    for name, labels in inner.items():
        found[facts.classes.representative[labels[observer.columns[name]]]] = False
    return found


def _removable(
    facts: FactTable,
    watched: dict[fx.Node, Fields],
    observer: Observer,
    flowing: Tensor,
    inner: Mapping[str, Tensor],
) -> Tensor:
    """Classes that are not needed, without those that rectangular tensors need beside those that are.

    Where equal counts leave a choice, what the analysis keeps is chosen: only what it keeps beyond is removable.
    """
    unneeded = _unneeded(facts, watched, observer, flowing, inner)
    nothing = torch.zeros_like(facts.classes.pinned)
    nothing[0] = True
    shapes = dataclasses.replace(facts.classes, pinned=nothing)
    return unneeded & ~shapes.close(flowing & ~unneeded, first=facts.kept)


def _value_probes(watched: dict[fx.Node, Fields], observer: Observer) -> list[ValueProbe]:
    found = []
    for node, fields in watched.items():
        varies, read = observer.varies[node.name], observer.read[node.name]
        for axis, labels in fields.items():
            line = tuple(labels.shape[axis] if a == axis else 1 for a in range(labels.dim()))
            moving = collapse(varies, line).expand(line).flatten()
            needed = collapse(varies & read, line).expand(line).flatten()
            found.append(
                ValueProbe(
                    node.name,
                    axis,
                    line[axis],
                    tuple((~moving).nonzero().flatten().tolist()),
                    tuple((moving & ~needed).nonzero().flatten().tolist()),
                )
            )
    return found


def _leftovers(
    facts: FactTable, sites: list[Site], watched: dict[fx.Node, Fields], left: list[int], origins: Origins
) -> list[Leftover]:
    if not left:
        return []
    explainer = Explainer(facts, sites, left)
    members: dict[int, dict[tuple[str, int, int], None]] = {label: {} for label in left}
    wanted = torch.zeros(facts.labeller.table.size, dtype=torch.bool)
    wanted[left] = True
    for node, fields in watched.items():
        for axis, labels in fields.items():
            by_class = facts.classes.representative[labels]
            for place in wanted[by_class].nonzero().tolist():
                members[int(by_class[tuple(place)])][node.name, axis, place[axis]] = None
    found = []
    for label in left:
        why = explainer.why(label)
        if why.reason == READ:
            why = origins.why(dict.fromkeys(member[0] for member in members[label])) or why
        found.append(Leftover(tuple(members[label]), why.reason, why.site, why.detail))
    return found
