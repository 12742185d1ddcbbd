"""Where a loss begins: the first value that never varies though the analysis does not know it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, fx

from srfx.analysis.calls import Site
from srfx.analysis.why import READ, RELATED, STEPS, Why
from srfx.ir.plan import Reason
from srfx.ops.facts import FactTable
from srfx.ops.recurrent import Recurrent
from srfx.testing.observe import Observer

CLOUDS = (Reason.MASKED, Reason.BORDER, Reason.UNKNOWN_OP)
"""Reasons for which an op makes something of a constant that is not known to be one."""


class Origins:
    """Follows values that never vary, and that the analysis takes for varying, back to the op that lost them.

    Args:
        facts: the finished analysis.
        sites: its calls.
        observer: what varied and what was read when the graph was run; values it did not watch are looked through.
    """

    def __init__(self, facts: FactTable, sites: Iterable[Site], observer: Observer) -> None:
        self.facts, self.observer = facts, observer
        self._refused = {r.node: r for r in facts.refusals if r.reason in CLOUDS}
        self._layers = {s.node for s in sites if isinstance(s.rule, Recurrent) and not s.rule.is_cell}
        watched = [n for n in facts.program.nodes if n.name in observer.varies]
        self._lost = {n: lost for n in watched if bool((lost := self._lost_elements(n)).any())}
        self._watched = dict.fromkeys(watched)

    def _lost_elements(self, node: fx.Node) -> Tensor:
        varies = self.observer.varies[node.name]
        return self.facts.constancy(node).varies.cpu().expand(varies.shape) & ~varies

    def why(self, members: Iterable[str]) -> Why | None:
        """The reason for which a class of these values stays, if it is such a loss: its own, or of what is made of it."""
        wanted = set(members)
        nodes = [node for node in self._watched if node.name in wanted]
        found = {self._back(node) for node in (*nodes, *self._behind(nodes)) if node in self._lost}
        return self._reason(next(node for node in self._lost if node in found)) if found else None

    def _reason(self, node: fx.Node) -> Why:
        """What an op says of the constant that it lost."""
        for x in (node, *self._unwatched(node)):
            if x.name in self._refused:
                return Why(self._refused[x.name].reason.name, x.name, self._refused[x.name].detail)
            if x in self._layers:
                return Why(STEPS, x.name, "the states run by themselves")
        if self.observer.is_related(node.name, self._lost[node]):
            return Why(RELATED, node.name)
        return Why(READ, node.name, "never varies, which the analysis does not know")

    def _back(self, node: fx.Node) -> fx.Node:
        """The first lost value of those that a lost value is made of."""
        while True:
            operands = [*node.all_input_nodes, *(y for x in self._unwatched(node) for y in x.all_input_nodes)]
            before = next((x for x in operands if x in self._lost), None)
            if before is None:
                return node
            node = before

    def _unwatched(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a value is made of, as far as the values that are watched."""
        for x in node.all_input_nodes:
            if x not in self._watched:
                yield x
                yield from self._unwatched(x)

    def _behind(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Lost values made of these, the first on each path."""
        seen, waiting, found = dict.fromkeys(nodes), list(nodes), []
        while waiting:
            for user in waiting.pop().users:
                if user in self._lost:
                    found.append(user)
                elif user not in seen:
                    seen[user] = None
                    waiting.append(user)
        return found
