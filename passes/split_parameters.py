"""Make the pieces of a packed parameter parameters of their own.

Before: w_q, w_kv = in_proj_weight.split([E, 2 * E])      After: w_q, w_kv are parameters

Projections are only split by `split-fused-projections` when their weight is a parameter.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from srfx.ir.attrs import free_path, set_attr
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.plan import Edit, Plan
from srfx.ir.program import Param, Program
from srfx.ir.shapes import propagate
from srfx.ops.registry import resolve
from srfx.ops.selection import Narrow
from srfx.ops.splitting import Splitting, Unbind
from srfx.passes.base import HintedPass, register_pass


@dataclass(frozen=True)
class SplitParameter(Edit):
    """One parameter becomes several; ``node`` reads it.

    Attributes:
        axis: the axis that is cut.
        pieces: the node whose value each piece is, its first position and the one behind its last.
        paths: where each piece is kept.
    """

    axis: int = 0
    pieces: tuple[tuple[str, int, int], ...] = ()
    paths: tuple[str, ...] = ()


@register_pass("split-parameters")
class SplitParameters(HintedPass):
    """Cut a parameter that is only read in pieces, which follow each other along one axis.

    The pieces are those of one split or chunk, or slices; together they are the whole parameter.  One piece is
    one new parameter, trainable as the old one, so that no number is stored twice.  What is read whole anywhere,
    or cut in two ways, is left.

    Source: cross attention of torch.nn.MultiheadAttention as torch.export shows it.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every packed parameter, in graph order."""
        packed = [n for n in gm.graph.find_nodes(op="get_attr") if any(_may_cut(u) for u in n.users)]
        if not packed:
            return Plan()
        program = Program(gm, propagate(gm, self.hints))
        plan, taken = Plan(), set[str]()
        for node in packed:
            param = program.value(node)
            if not isinstance(param, Param) or not isinstance(param.tensor, nn.Parameter):
                continue
            found = _pieces(program, node) if param.n_sites == len(node.users) else None
            if found is None:
                continue
            axis, pieces = found
            paths = _paths(gm, str(node.target), [stop - start for _, start, stop in pieces], taken)
            plan.edits.append(SplitParameter(node.name, axis, pieces, paths))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Cut one parameter."""
        assert isinstance(edit, SplitParameter)
        nodes = {n.name: n for n in gm.graph.nodes}
        whole: Tensor = operator.attrgetter(str(nodes[edit.node].target))(gm)
        for (name, start, stop), path in zip(edit.pieces, edit.paths, strict=True):
            piece = whole.detach().narrow(edit.axis, start, stop - start).clone()
            set_attr(gm, path, nn.Parameter(piece, requires_grad=whole.requires_grad))
            old = nodes[name]
            with gm.graph.inserting_before(nodes[edit.node].next):
                new = gm.graph.get_attr(path)
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)

    def finish(self, gm: fx.GraphModule) -> None:
        """Drop the packed parameters."""
        remove_dead_nodes(gm)


def _may_cut(node: fx.Node) -> bool:
    """A quick look, before shapes are known."""
    return node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1


def _pieces(program: Program, node: fx.Node) -> tuple[int, tuple[tuple[str, int, int], ...]] | None:
    """The axis and the pieces in order, when all readers take pieces that make up the whole."""
    axes: set[int] = set()
    found: list[tuple[str, int, int]] = []
    for user in node.users:
        if not _may_cut(user):
            return None
        rule, call = resolve(user, program)
        if isinstance(rule, Splitting) and not isinstance(rule, Unbind):
            axes.add(rule.axis(call))
            runs = rule.runs(call)
            for item in user.users:
                if item.target is not operator.getitem or not isinstance(item.args[1], int):
                    return None
                found.append((item.name, *_ends(runs[item.args[1]])))
        elif isinstance(rule, Narrow):
            take = rule.selection(call)
            if not take.source.numel() or not bool((take.source.diff() == 1).all()):
                return None
            axes.add(take.axis)
            found.append((user.name, *_ends(take.source)))
        else:
            return None
    found.sort(key=lambda piece: piece[1])
    if len(axes) != 1 or len(found) < 2:
        return None
    axis = axes.pop()
    starts, stops = [start for _, start, _ in found], [stop for _, _, stop in found]
    is_whole = starts == [0, *stops[:-1]] and stops[-1] == program.shape(program.value(node))[axis]
    return (axis, tuple(found)) if is_whole else None


def _ends(run: Tensor) -> tuple[int, int]:
    return int(run[0]), int(run[-1]) + 1


def _paths(gm: fx.GraphModule, path: str, sizes: list[int], taken: set[str]) -> tuple[str, ...]:
    """``in_proj_weight`` in the manner of nn.MultiheadAttention gives q_proj.weight, in_proj_kv.weight."""
    stem, kind = path, ""
    for suffix in ("weight", "bias"):
        if path.endswith(suffix):
            stem, kind = path.removesuffix(suffix).rstrip("._"), f".{suffix}"
    parent, _, last = stem.rpartition(".")
    names = [f"{last}_{i}" for i in range(len(sizes))]
    if last == "in_proj" and len(sizes) == 2 and sizes[1] == 2 * sizes[0]:
        names = ["q_proj", "in_proj_kv"]
    elif last == "in_proj" and len(sizes) == 3:
        names = ["q_proj", "k_proj", "v_proj"]
    found = []
    for name in names:
        wanted = free_path(gm, f"{parent}.{name}{kind}" if parent else f"{name}{kind}")
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        found.append(wanted)
    return tuple(found)
