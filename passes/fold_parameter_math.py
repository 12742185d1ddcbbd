"""Evaluate arithmetic on parameters once: masks times weights, weight norm, standardised weights, tables.

Before: y = conv(x, weight_orig * weight_mask)      After: y = conv(x, weight)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from srfx.errors import OP_FAILURES
from srfx.ir.attrs import drop_unused_attributes, free_path, get_attr, set_attr, split_path
from srfx.ir.effects import is_mutating, is_random, is_torch_function, op_name
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.passes.base import Pass, register_pass

# Ops that only move numbers about.  They stay in the graph, where labels follow them and tied weights stay
# tied.
_MOVEMENT = frozenset(
    [
        "view", "reshape", "view_as", "reshape_as", "permute", "transpose", "t", "T", "mT", "numpy_T", "adjoint",
        "swapaxes", "swapdims", "movedim", "moveaxis", "flatten", "unflatten", "squeeze", "unsqueeze",
        "expand", "expand_as", "broadcast_to", "slice", "select", "narrow", "index", "index_select",
        "getitem", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "contiguous", "clone",
        "detach", "alias", "to", "float", "half", "double", "bfloat16", "type", "type_as", "_to_copy",
        "cat", "concat", "concatenate", "stack", "roll", "flip", "lift_fresh_copy", "embedding", "gather",
        "take", "take_along_dim", "repeat", "tile", "repeat_interleave", "getattr", "data",
    ]
)  # fmt: skip
# Movement that takes a shape or dtype from another tensor: it would keep that tensor alive, so it is folded
# too.
_LIKE_ANOTHER = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})
_SMALL = 1 << 16


@dataclass(frozen=True)
class FoldParameters(Edit):
    """Replace the result of ``node`` by the attribute ``path``; ``is_known``: an edit before this one makes it."""

    path: str = ""
    value: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0), compare=False)
    needs_grad: bool = False
    is_parameter: bool = True
    is_known: bool = False


@register_pass("fold-parameter-math")
class FoldParameterMath(Pass):
    """Fold every maximal sub-graph that reads only parameters, buffers and constants and contains arithmetic.

    It is evaluated in float64 and rounded once to the dtype the model computes in; where the model's own
    arithmetic gives inf or nan, its own result is taken.  Pure movement (transpose, view, slice, cast ...) is
    not folded, before, after or without arithmetic, except when it feeds it.  The result becomes a Parameter
    if a Parameter went in (trainable if one of them was), else a buffer, named after its source when there is
    one name for it.

    Refuses: GROWS when the result is larger than what it makes unnecessary (and than 65536 elements), or when there
    would be more parameters than before, because a source is read elsewhere too or is broadcast;
    MUTATION when a source is written in the graph.
    Cost: two evaluations of the folded sub-graphs.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """The roots of the sub-graphs to fold, with their values."""
        return _Planner(gm).plan()

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Install one folded tensor and drop what it made unnecessary."""
        assert isinstance(edit, FoldParameters)
        node = next(n for n in gm.graph.nodes if n.name == edit.node)
        value: torch.Tensor = edit.value
        if edit.is_parameter:
            value = nn.Parameter(value, requires_grad=edit.needs_grad)
        with gm.graph.inserting_before(node):
            folded = gm.graph.create_node("get_attr", "", name=edit.path.replace(".", "_"))
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
        _erase_unused(node)
        folded.target = edit.path  # only now: the name may belong to one of the sources
        if not edit.is_known:
            set_attr(gm, edit.path, value)

    def finish(self, gm: fx.GraphModule) -> None:
        """Drop masks and sources that nothing reads any more."""
        drop_unused_attributes(gm)


def _erase_unused(node: fx.Node) -> None:
    stack = [node]
    while stack:
        current = stack.pop()
        if current.users or current.op == "placeholder" or current._erased:
            continue
        sources = current.all_input_nodes
        current.graph.erase_node(current)
        stack += sources


class _Planner:
    """Finds the foldable nodes of one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.native: dict[fx.Node, Any] = {}  # values of the nodes that depend on no input
        self.precise: dict[fx.Node, Any] = {}
        self.sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.is_computed: dict[fx.Node, bool] = {}
        self.kept: dict[fx.Node, bool] = {}  # whether a constant node is still read after folding
        self.called = tuple(f"{n.target}." for n in gm.graph.find_nodes(op="call_module"))

    def plan(self) -> Plan:
        written = _written_attributes(self.gm)
        with torch.no_grad():
            candidates = [node for node in self.gm.graph.nodes if self.is_constant(node, written)]
        refused: dict[fx.Node, str] = {}
        while True:
            roots = self.roots(candidates, refused)
            growing = self.growing(roots)
            refused |= growing
            if not growing:
                break
        plan = Plan()
        plan.refusals += [Refusal(n.name, Reason.GROWS, refused[n]) for n in candidates if n in refused]
        taken: set[str] = set()
        first = self.first_alike(roots)
        edits: dict[fx.Node, FoldParameters] = {}
        for node in roots:
            if first[node] is node:
                edits[node] = self.edit(node, taken)
            else:
                edits[node] = dataclasses.replace(edits[first[node]], node=node.name, is_known=True)
            self.precise.clear()  # float64 copies of one sub-graph at a time
        plan.edits += edits.values()
        return plan

    def first_alike(self, roots: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Of each root the first with the same value from the same sources: a masked weight at several sites is one."""
        found: dict[fx.Node, fx.Node] = {}
        by_sources: dict[frozenset[int], list[fx.Node]] = {}
        for root in roots:
            tensors = [get_attr(self.gm, str(s.target)) for s in self.sources[root]]
            alike = by_sources.setdefault(frozenset(id(t) for t in tensors), [])
            same = (n for n in alike if _is_equal(self.native[n], self.native[root]))
            found[root] = next(same, root)
            if found[root] is root:
                alike.append(root)
        return found

    def roots(self, candidates: list[fx.Node], refused: dict[fx.Node, str]) -> list[fx.Node]:
        """Constant arithmetic whose result something else reads, in node order; adds to ``refused``."""
        found: list[fx.Node] = []
        self.kept.clear()
        for node in reversed(candidates):
            self.kept[node] = any(self.kept.get(user, True) for user in node.users)
            if node in refused or not (self.kept[node] and self.is_arithmetic(node)):
                continue
            value = self.evaluate(node)
            if not isinstance(value, torch.Tensor) or not self.sources[node]:
                continue
            if not (value.is_floating_point() or value.is_complex()):
                continue
            freed = {s.target: self.native[s].numel() for s in self.sources[node] if not self.escapes(s)}
            if value.numel() > max(sum(freed.values()), _SMALL):
                refused[node] = f"{value.numel()} elements from {sum(freed.values())}"
                continue
            found.append(node)
            self.kept[node] = False
        return found[::-1]

    def growing(self, roots: list[fx.Node]) -> dict[fx.Node, str]:
        """Roots that together would leave more parameters than there were: a source of theirs is read elsewhere.

        Roots that share a source are judged together, since only all of them make it unnecessary.
        """
        readers: dict[int, list[fx.Node]] = {}
        for root in roots:
            for tensor in self.parameters(root):
                readers.setdefault(id(tensor), []).append(root)
        still_read, first = self.still_read(), self.first_alike(roots)
        found: dict[fx.Node, str] = {}
        seen: set[fx.Node] = set()
        for root in roots:
            together, stack, sources = [], [root], dict[int, int]()
            while stack:
                current = stack.pop()
                if current in seen:
                    continue
                seen.add(current)
                together.append(current)
                for tensor in self.parameters(current):
                    sources[id(tensor)] = tensor.numel()
                    stack += readers[id(tensor)]
            freed = sum(n for key, n in sources.items() if key not in still_read)
            made = sum(self.native[n].numel() for n in together if first[n] is n) if sources else 0
            if made > freed:
                found |= dict.fromkeys(together, f"{made} parameters in place of {freed}")
        return found

    def parameters(self, root: fx.Node) -> list[nn.Parameter]:
        """Parameters that go into a root."""
        tensors = [get_attr(self.gm, str(s.target)) for s in self.sources[root]]
        return [t for t in tensors if isinstance(t, nn.Parameter)]

    def still_read(self) -> set[int]:
        """Identities of the parameters that something reads when all roots are folded."""
        found = {
            id(get_attr(self.gm, str(n.target)))
            for n in self.gm.graph.find_nodes(op="get_attr")
            if self.kept.get(n, True)
        }
        for node in self.gm.graph.find_nodes(op="call_module"):
            found |= {id(p) for p in self.gm.get_submodule(str(node.target)).parameters()}
        return found

    def is_constant(self, node: fx.Node, written: set[str]) -> bool:
        """Whether the node has one value known now; remembers its sources."""
        if node.op == "get_attr":
            value = get_attr(self.gm, str(node.target))
            if not isinstance(value, torch.Tensor) or str(node.target) in written:
                return False
            self.sources[node] = (node,)
            self.native[node] = value.detach()
            self.is_computed[node] = False
            return True
        if node.op not in ("call_function", "call_method") or is_random(node) or is_mutating(node):
            return False
        if node.op == "call_function" and not is_torch_function(node.target):
            return False
        inputs = node.all_input_nodes
        if not all(source in self.sources for source in inputs):
            return False
        if node.op == "call_method" and not inputs:
            return False
        self.sources[node] = tuple(dict.fromkeys(s for source in inputs for s in self.sources[source]))
        self.is_computed[node] = not self.moves_only(node) or any(self.is_computed[s] for s in inputs)
        return True

    def moves_only(self, node: fx.Node) -> bool:
        return op_name(node) in _MOVEMENT

    def is_arithmetic(self, node: fx.Node) -> bool:
        """Whether folding here is worth it: arithmetic, or one item of a tuple that arithmetic returned."""
        if node.op == "get_attr" or not self.is_computed[node]:
            return False
        if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            return isinstance(self.evaluate(source), (tuple, list)) and not self.moves_only(source)
        return not self.moves_only(node) or op_name(node) in _LIKE_ANOTHER

    def escapes(self, source: fx.Node) -> bool:
        """Whether a source is read by something else than constant arithmetic."""
        stack = [source]
        while stack:
            for user in stack.pop().users:
                if user not in self.sources:
                    return True
                if not self.is_arithmetic(user):
                    stack.append(user)
        return False

    def evaluate(self, node: fx.Node, precise: bool = False) -> Any:
        """The node's value in the model's own arithmetic, or in float64; None when that cannot be had."""
        values = self.precise if precise else self.native
        for current in _ancestors(node, values):
            if current.op == "get_attr":
                value = self.native[current]
                values[current] = value.double() if value.is_floating_point() else value
                continue
            args = fx.map_arg(current.args, lambda n: values[n])
            kwargs = fx.map_arg(current.kwargs, lambda n: values[n])
            try:
                with torch.no_grad():
                    if current.op == "call_method":
                        values[current] = getattr(args[0], str(current.target))(*args[1:], **kwargs)
                    else:
                        values[current] = current.target(*args, **kwargs)  # type: ignore[operator]
            except OP_FAILURES:
                values[current] = None
        return values[node]

    def edit(self, node: fx.Node, taken: set[str]) -> FoldParameters:
        native = self.evaluate(node)
        value = native
        precise = self.evaluate(node, precise=True) if native.is_floating_point() else None
        if isinstance(precise, torch.Tensor) and precise.shape == native.shape:
            rounded = precise.to(native.dtype)
            if torch.equal(rounded.isfinite(), native.isfinite()):
                value = torch.where(native.isfinite(), rounded, native)
        parameters = [
            s for s in self.sources[node] if isinstance(get_attr(self.gm, str(s.target)), nn.Parameter)
        ]
        needs_grad = any(get_attr(self.gm, str(s.target)).requires_grad for s in parameters)
        path = self.path_for(node, parameters, taken)
        taken.add(path)
        return FoldParameters(node.name, path, value.contiguous().clone(), needs_grad, bool(parameters))

    def path_for(self, node: fx.Node, parameters: list[fx.Node], taken: set[str]) -> str:
        """``conv.weight`` for weight_orig * weight_mask and for a weight norm's original0 and original1."""
        names = {_plain_name(str(s.target)) for s in parameters}
        if len(names) == 1:
            path = names.pop()
            holders = [s for s in self.gm.graph.find_nodes(op="get_attr") if s.target == path]
            is_read = any(self.kept.get(s, True) for s in holders) or f"{path}.".startswith(self.called)
            if not is_read and path not in taken:
                return path
        parent = split_path(str(parameters[0].target))[0] if parameters else ""
        wanted = f"{parent}.{node.name}" if parent else node.name
        path = free_path(self.gm, wanted)
        while path in taken:
            path += "_"
        return path


def _is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _ancestors(node: fx.Node, known: dict[fx.Node, Any]) -> Iterable[fx.Node]:
    """The node and all it needs that has no value yet, operands first."""
    order: list[fx.Node] = []
    stack = [(node, False)]
    seen: set[fx.Node] = set()
    while stack:
        current, is_ready = stack.pop()
        if is_ready:
            order.append(current)
        elif current not in known and current not in seen:
            seen.add(current)
            stack.append((current, True))
            stack += [(source, False) for source in current.all_input_nodes]
    return order


def _written_attributes(gm: fx.GraphModule) -> set[str]:
    """Attributes that some node may write, directly or through views."""
    written: set[str] = set()
    for node in gm.graph.nodes:
        if not is_mutating(node):
            continue
        stack, seen = list(node.all_input_nodes), set(node.all_input_nodes)
        while stack:
            current = stack.pop()
            if current.op == "get_attr":
                written.add(str(current.target))
            elif op_name(current) in _MOVEMENT or current in node.all_input_nodes:
                fresh = [
                    s for s in current.all_input_nodes if s not in seen and op_name(current) in _MOVEMENT
                ]
                seen.update(fresh)
                stack += fresh
    return written


def _plain_name(path: str) -> str:
    parent, name = split_path(path)
    if ".parametrizations." in f".{path}" and name.startswith("original"):
        owner, _, tensor = f".{parent}".rpartition(".parametrizations.")
        return f"{owner.lstrip('.')}.{tensor}".lstrip(".")
    for suffix in ("_orig", "_g", "_v"):
        if name.startswith("weight") and name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    else:
        name = name.removesuffix("_orig")
    return f"{parent}.{name}" if parent else name
