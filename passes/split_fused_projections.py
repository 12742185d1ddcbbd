"""Split a projection whose result is viewed as several tensors, so that each may lose its own channels.

Before: q, k, v = qkv(x).reshape(N, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
After:  q = qkv_q(x).reshape(N, T, H, D).transpose(1, 2);  k = qkv_k(x) ...;  v = qkv_v(x) ...

The fused view forces q, k and v to one head size and one number of heads.  Each row of the weight goes to one
of the new projections, so the parameters are the same numbers, and zeros stay where they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.attrs import free_path, set_attr
from srfx.ir.clone import clone_structure
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.effects import op_name
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Param, Program
from srfx.ir.shapes import propagate
from srfx.lattice.movement import Permute
from srfx.ops.contraction import Contraction
from srfx.ops.join import Concat
from srfx.ops.movement import Movement
from srfx.ops.registry import resolve
from srfx.passes._fused_axis import Ends, Pick, Track, Walk
from srfx.passes._fused_rewrite import PartWriter
from srfx.passes.base import HintedPass, register_pass

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitProjection(Edit):
    """One projection becomes several.

    Attributes:
        rows: the rows of the weight that go to each.
        paths: where each keeps its weight and bias.
    """

    rows: tuple[tuple[int, ...], ...] = ()
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Weights:
    """The tensors of a projection and how they are laid out.

    Attributes:
        axis: the axis of the weight that makes the rows.
        bias: None, a parameter, or nodes for consecutive runs of rows (a concatenation).
        is_transposed_product: the call is ``x @ weight.T``.
    """

    weight: Param
    axis: int
    bias: Param | list[fx.Node] | None
    is_transposed_product: bool = False


@dataclass(frozen=True)
class _Site:
    weights: _Weights
    ends: Ends
    rank: int


@register_pass("split-fused-projections")
class SplitFusedProjections(HintedPass):
    """Split projections whose rows are told apart only by a view: (3, H, D), (H, 3, D), (G, n + 2, D) ...

    The rows are followed from the projection (linear, addmm, convolution, ``x @ W.T``) through views,
    permutations, unsqueeze, squeeze and copies to the selects, unbinds, chunks, slices and constant indices
    that take some of them.  When all readers do, and what they take falls into disjoint sets, each set gets a
    projection of its own and each reader its chain again, without the axis where one position of it is left.
    Rows that are strided in the fused weight (interleaved heads) are gathered.

    Left as they are: splits along the flat axis of the result, which need no change, and parts that come
    together again (rotary halves, gates, boxes), where nothing is won.

    Refuses: SHARED_WEIGHT when weight or bias is used elsewhere; OTHER_READERS when the fused value is also
    read whole; COMPUTED_WEIGHT when the weight is no parameter.
    Cost: shapes of all nodes, then O(weights split).
    Source: timm's and torchvision's attention, GPT-NeoX, BLOOM and Falcon in transformers.
    """

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        super().__init__(hints)
        self._program: Program | None = None
        self._sites: dict[str, _Site] = {}

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every fused projection, in graph order."""
        self._sites = {}
        program = self._program = Program(gm, propagate(gm, self.hints))
        plan, taken = Plan(), set[str]()
        for node in gm.graph.nodes:
            track = _row_axis(program, node)
            if track is None:
                continue
            walk = Walk(program)
            ends = walk.ends(node, track)
            if ends is None:
                if walk.n_picked and walk.blocker is not None:
                    detail = f"read by {walk.blocker.name}"
                    plan.refusals.append(Refusal(node.name, Reason.OTHER_READERS, detail))
                continue
            parts = _parts(ends, track.n)
            if parts is None or _meet(program, ends):
                continue
            weights = _weights(program, node, parts)
            if isinstance(weights, Reason):
                plan.refusals.append(Refusal(node.name, weights))
                continue
            paths = _free(gm, _names(node, weights, len(parts)), taken)
            self._sites[node.name] = _Site(weights, ends, len(program.shape(node)))
            plan.edits.append(SplitProjection(node.name, parts, paths))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Split one projection."""
        assert isinstance(edit, SplitProjection)
        assert self._program is not None
        site, program = self._sites[edit.node], self._program
        node = next(n for n in gm.graph.nodes if n.name == edit.node)
        picks = [end for end in site.ends if isinstance(end, Pick)]
        sizes = [end for end in site.ends if not isinstance(end, Pick)]
        n_rows = sum(map(len, edit.rows))
        for i, (rows, path) in enumerate(zip(edit.rows, edit.paths, strict=True)):
            own = [pick for pick in picks if pick.rows == rows]
            new = _project(gm, node, site.weights, torch.tensor(rows), path, i)
            drops_axis = all(pick.is_removed for pick in own)
            writer = PartWriter(program, new, site.rank, len(rows), n_rows, drops_axis)
            for pick in own:
                writer.replace(pick)
            for read in sizes:
                writer.replace_size(read)
            sizes = []

    def finish(self, gm: fx.GraphModule) -> None:
        """Drop the fused chains and weights."""
        remove_dead_nodes(gm)
        self._program, self._sites = None, {}


# ---------------------------------------------------------------------- recognising
def _row_axis(program: Program, node: fx.Node) -> Track | None:
    """The whole row axis of a projection's result, None when the node is no projection or a grouped one."""
    if node.op not in ("call_module", "call_function", "call_method") or not program.is_tensor(node):
        return None
    rule, call = resolve(node, program)
    if _is_product(node):
        if _factor(program, node) is None and _transposed(program, node) is None:
            return None
        rank = len(call.out_shape)
        return Track(rank - 1, 1, call.out_shape[-1], 1) if rank > 1 else None
    if not isinstance(rule, Contraction) or call.value("input") is None or call.value("weight") is None:
        return None
    if rule.groups(call) != 1 or len(call.out_shape) < 2:
        return None
    if isinstance(call.value("weight"), Param) and rule.refused(call) is not None:
        return None
    axis = rule.channel_axis(call)
    return Track(axis, 1, call.out_shape[axis], 1)


def _parts(ends: Ends, n_rows: int) -> tuple[tuple[int, ...], ...] | None:
    """The sets of rows, by their first row; None when they overlap, leave rows out, or are flat runs."""
    picks = [end for end in ends if isinstance(end, Pick)]
    parts = sorted({pick.rows for pick in picks})
    together = sorted(row for part in parts for row in part)
    is_flat = all(pick.track.outer * pick.track.inner == 1 for pick in picks)
    return tuple(parts) if together == list(range(n_rows)) and len(parts) > 1 and not is_flat else None


_PRODUCTS = frozenset(["matmul", "bmm", "mm", "baddbmm", "addbmm", "einsum", "scaled_dot_product_attention"])


def _meet(program: Program, ends: Ends) -> bool:
    """Whether two parts come together again otherwise than in a product (then nothing is won)."""
    owner: dict[fx.Node, tuple[int, ...]] = {}
    for pick in ends:
        if not isinstance(pick, Pick):
            continue
        stack = [pick.node]
        while stack:
            node = stack.pop()
            if owner.setdefault(node, pick.rows) != pick.rows:
                return True
            stack += [u for u in node.users if owner.get(u) != pick.rows and not _ends(program, u)]
    return False


def _ends(program: Program, node: fx.Node) -> bool:
    """Whether what a node computes has no channels of its operands any more."""
    if node.op == "output" or op_name(node) in _PRODUCTS:
        return True
    return _is_size(program, node) or isinstance(resolve(node, program)[0], Contraction)


def _weights(program: Program, node: fx.Node, parts: tuple[tuple[int, ...], ...]) -> _Weights | Reason:
    rule, call = resolve(node, program)
    if _is_product(node):
        factor, axis = _factor(program, node), 1
        if factor is None:
            factor, axis = _transposed(program, node), 0
        assert factor is not None
        return Reason.SHARED_WEIGHT if factor.n_sites > 1 else _Weights(factor, axis, None, axis == 0)
    assert isinstance(rule, Contraction)
    weight, bias = call.value("weight"), call.value("bias")
    if not isinstance(weight, Param):
        return Reason.COMPUTED_WEIGHT
    if weight.n_sites > 1 or (isinstance(bias, Param) and bias.n_sites > 1):
        return Reason.SHARED_WEIGHT
    if bias is None or isinstance(bias, Param):
        return _Weights(weight, rule.row_axis(call), bias)
    pieces = _pieces(program, bias, parts)
    return Reason.COMPUTED_WEIGHT if pieces is None else _Weights(weight, rule.row_axis(call), pieces)


def _is_product(node: fx.Node) -> bool:
    """Whether a node is ``x @ w`` in any spelling, with positional operands."""
    is_plain = node.op != "call_module" and len(node.args) == 2 and not node.kwargs
    return is_plain and op_name(node) in ("matmul", "mm")


def _factor(program: Program, node: fx.Node) -> Param | None:
    """The parameter W [C_in, C_out] of ``x @ W``."""
    source = node.args[1]
    value = program.value(source) if isinstance(source, fx.Node) else None
    return value if isinstance(value, Param) and len(value.shape) == 2 else None


def _transposed(program: Program, node: fx.Node) -> Param | None:
    """The parameter W [C_out, C_in] of ``x @ W.T``, when nothing else reads W.T."""
    source = node.args[1]
    if not isinstance(source, fx.Node) or len(source.users) > 1 or not source.op.startswith("call"):
        return None
    rule, call = resolve(source, program)
    weight = call.value("input") if isinstance(rule, Movement) else None
    if not isinstance(weight, Param) or len(weight.shape) != 2 or not isinstance(rule, Movement):
        return None
    return weight if rule.steps(call) == [Permute((1, 0))] else None


def _pieces(program: Program, bias: fx.Node, parts: tuple[tuple[int, ...], ...]) -> list[fx.Node] | None:
    """The operands of a concatenated bias, when each is the bias of one part."""
    rule, call = resolve(bias, program)
    if not isinstance(rule, Concat):
        return None
    nodes, start = list(call["tensors"]), 0
    if len(nodes) != len(parts):
        return None
    for node, part in zip(nodes, parts, strict=True):
        stop = start + program.shape(program.value(node))[0]
        if part != tuple(range(start, stop)):
            return None
        start = stop
    return nodes


def _is_size(program: Program, node: fx.Node) -> bool:
    return isinstance(program.hints.get(node), (int, float, bool, torch.Size, torch.dtype, torch.device))


# ---------------------------------------------------------------------- names
_QKV = ("q", "k", "v")


def _names(node: fx.Node, weights: _Weights, n_parts: int) -> tuple[str, ...]:
    """``qkv`` gives qkv_q, qkv_k, qkv_v; ``in_proj`` gives q_proj, k_proj, v_proj; others are numbered."""
    if node.op == "call_module":
        path = str(node.target)
    else:
        name = weights.weight.names[0] if weights.weight.names else node.name
        path = name.removesuffix("weight").rstrip("._") or node.name
    parent, _, last = path.rpartition(".")
    is_attention = any(word in last for word in ("qkv", "query_key_value", "in_proj", "attn", "Wqkv"))
    if n_parts == 3 and is_attention:
        letters: tuple[str, ...] = _QKV
    elif n_parts == 2 and last.endswith("kv"):
        letters = _QKV[1:]
    else:
        letters = tuple(str(i) for i in range(n_parts))
    is_torch = last in ("in_proj", "in_proj_kv")
    own = [f"{x}_proj" if is_torch and x in _QKV else f"{last}_{x}" for x in letters]
    return tuple(f"{parent}.{name}" if parent else name for name in own)


def _free(gm: fx.GraphModule, wanted: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    found = []
    for name in wanted:
        path = free_path(gm, name)
        while path in taken:
            path += "_"
        taken.add(path)
        found.append(path)
    return tuple(found)


# ---------------------------------------------------------------------- building
def _project(
    gm: fx.GraphModule, node: fx.Node, weights: _Weights, rows: Tensor, path: str, part: int
) -> fx.Node:
    """A node before ``node`` that computes these rows of it, the given part."""
    weight = _take(weights.weight, weights.axis, rows)
    bias = _take(weights.bias, 0, rows) if isinstance(weights.bias, Param) else None
    if node.op == "call_module":
        return _project_by_module(gm, node, weight, bias, path)
    set_attr(gm, f"{path}.weight", weight)
    if bias is not None:
        set_attr(gm, f"{path}.bias", bias)
    with gm.graph.inserting_before(node):
        w = gm.graph.get_attr(f"{path}.weight")
        b = gm.graph.get_attr(f"{path}.bias") if bias is not None else _piece(weights.bias, part)
        if weights.is_transposed_product:
            is_aten = isinstance(node.target, torch._ops.OpOverload)
            new = gm.graph.call_function(aten.linear.default if is_aten else F.linear, (node.args[0], w))
        else:
            old_w, old_b = _weight_nodes(node, weights)
            swap = {old_w: w, old_b: b}
            new = gm.graph.node_copy(node, lambda n: swap.get(n) or n)
    new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "example_value")}
    return new


def _project_by_module(
    gm: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor | None, path: str
) -> fx.Node:
    old = gm.get_submodule(str(node.target))
    module = clone_structure(old)
    set_attr(module, "weight", weight)
    if bias is not None:
        set_attr(module, "bias", bias)
    width: Any = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    if hasattr(module, width):
        setattr(module, width, bias.numel() if bias is not None else weight.shape[0])
    set_attr(gm, path, module)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(path, node.args, node.kwargs)
    new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "example_value")}
    return new


def _weight_nodes(node: fx.Node, weights: _Weights) -> tuple[fx.Node, fx.Node | None]:
    """The operands of a call that are its weight and its bias."""
    names = {"weight": weights.weight, "bias": weights.bias}
    found: dict[str, fx.Node] = {}
    for operand in node.all_input_nodes:
        for name, param in names.items():
            is_it = isinstance(param, Param) and operand.op == "get_attr" and operand.target in param.names
            if is_it or (isinstance(param, list) and operand.all_input_nodes == param):
                found[name] = operand
    return found["weight"], found.get("bias")


def _piece(bias: Param | list[fx.Node] | None, part: int) -> fx.Node | None:
    """The operand of a concatenated bias that belongs to a part."""
    return bias[part] if isinstance(bias, list) else None


def _take(param: Param, axis: int, rows: Tensor) -> Tensor:
    """These rows, of the same kind as the parameter."""
    old = param.tensor
    new = old.detach().index_select(axis, rows.to(old.device)).contiguous()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
