"""Replace nn.MultiheadAttention and the nn.Transformer layers by the plain layers they are made of.

Before: y, _ = attn(x, x, x, need_weights=False)
After:  q = attn.q_proj(x).unflatten(-1, (H, D)).transpose(1, 2);  k = attn.k_proj(x) ...;  v = ...
        y = attn.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from srfx.errors import OP_FAILURES
from srfx.ir.attrs import drop_unused_attributes, get_attr, set_attr
from srfx.ir.effects import is_torch_function
from srfx.ir.inline import replace_by_outputs
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Program
from srfx.ir.shapes import propagate
from srfx.passes._fused_rewrite import replace_by_value
from srfx.passes._plain_attention import Cutter, Mask, Writer
from srfx.passes.base import HintedPass, register_pass

_KINDS: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)
_METHODS = ("forward", "_sa_block", "_mha_block", "_ff_block")
_MASKS = (
    "attn_mask",
    "key_padding_mask",
    "mask",
    "src_mask",
    "src_key_padding_mask",
    "tgt_mask",
    "memory_mask",
    "tgt_key_padding_mask",
    "memory_key_padding_mask",
)
_TENSORS = ("query", "key", "value", "src", "tgt", "memory")


@dataclass(frozen=True)
class DecomposeAttention(Edit):
    """One call of an attention or transformer module is written out.

    Attributes:
        path: the module.
        is_batched: whether its operands have a batch axis.
        masks: name, whether boolean, and rank of each mask given.
        wants_weights: whether the attention weights are read.
    """

    path: str = ""
    is_batched: bool = True
    masks: tuple[tuple[str, bool, int], ...] = ()
    wants_weights: bool = False


class _Refused(Exception):
    """Why a call stays."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@register_pass("decompose-attention")
class DecomposeAttentionPass(HintedPass):
    """Write nn.MultiheadAttention, nn.Transformer and its layers as linear layers and attention.

    The packed projection is cut into ``q_proj``, ``k_proj``, ``v_proj`` below the module's path; other
    layers, norms and dropouts are the model's own.  Attention is scaled_dot_product_attention, inside a
    `DropoutAttention` when weights are dropped in training, or matmul, softmax, matmul when the weights are
    read.  The result follows ``train()`` and ``eval()`` as the original does.

    What is written is the path that these modules take in training, with gradients, and under export.  The
    fast path of nn.TransformerEncoder without gradients packs sequences by ``src_key_padding_mask`` and puts
    zeros at padded positions of its result; here they hold what the other path computes there.

    Refuses: UNRECOGNISED_CALL when an argument is no tensor, None or literal, when a layer is of a class of
    its own, or when its activation cannot be traced; OPAQUE_HOOK; SHARED_WEIGHT when a packed projection is
    also used elsewhere; COMPUTED_WEIGHT when one is parametrized.
    Source: torch.nn.functional.multi_head_attention_forward; torch/nn/modules/transformer.py.
    """

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        super().__init__(hints)
        self._cutter = Cutter()
        self._dissolved: list[str] = []

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every call of such a module, in graph order."""
        calls = [
            n for n in gm.graph.find_nodes(op="call_module") if _kind(get_attr(gm, str(n.target))) is not None
        ]
        if not calls:
            return Plan()
        program = Program(gm, propagate(gm, self.hints))
        found: dict[fx.Node, DecomposeAttention | Refusal] = {}
        for node in sorted(calls, key=list(gm.graph.nodes).index):
            try:
                found[node] = _edit(program, node)
            except _Refused as refused:
                found[node] = Refusal(node.name, refused.reason, refused.detail)
        _refuse_shared(program, found)
        plan = Plan()
        plan.edits += [edit for edit in found.values() if isinstance(edit, DecomposeAttention)]
        plan.refusals += [refusal for refusal in found.values() if isinstance(refusal, Refusal)]
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Write one call out."""
        assert isinstance(edit, DecomposeAttention)
        node = next(n for n in gm.graph.nodes if n.name == edit.node)
        module = get_attr(gm, edit.path)
        with gm.graph.inserting_before(node):
            outputs = _write(Writer(gm, node, self._cutter), edit, module, _bound(module, node))
        if isinstance(module, nn.MultiheadAttention):
            for user in [u for u in node.users if outputs[1] is None and u.args[1:] == (1,)]:
                replace_by_value(user, None)
                gm.graph.erase_node(user)
        replace_by_outputs(node, outputs)
        self._dissolved += [
            edit.path,
            *(f"{edit.path}.{p}" for p, m in module.named_modules() if p and _kind(m)),
        ]

    def finish(self, gm: fx.GraphModule) -> None:
        """Leave plain containers where the modules were, with the layers that are still called."""
        drop_unused_attributes(gm)
        for path in sorted(set(self._dissolved), key=len, reverse=True):
            husk = get_attr(gm, path) if _exists(gm, path) else None
            if husk is None or _kind(husk) is None:
                continue
            plain = nn.Module().train(husk.training)
            plain._modules, plain._parameters = husk._modules, husk._parameters
            for store in (plain._modules, plain._parameters):
                for name in [n for n, value in store.items() if value is None]:
                    del store[name]
            set_attr(gm, path, plain)
        self._dissolved = []


# ---------------------------------------------------------------------- recognising
def _kind(module: Any) -> type[nn.Module] | None:
    """The torch class whose computation this module does, exactly."""
    for kind in _KINDS:
        if isinstance(module, kind):
            own = [getattr(type(module), name, None) for name in _METHODS]
            return kind if own == [getattr(kind, name, None) for name in _METHODS] else None
    return None


def _exists(gm: fx.GraphModule, path: str) -> bool:
    value: Any = gm
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def _bound(module: nn.Module, node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of the module's forward, defaults included."""
    signature = inspect.signature(type(module).forward)
    found = signature.bind(module, *node.args, **node.kwargs)
    found.apply_defaults()
    return dict(found.arguments)


def _edit(program: Program, node: fx.Node) -> DecomposeAttention:
    module = program.modules[str(node.target)]
    _check(module)
    try:
        given = _bound(module, node)
    except TypeError as error:
        raise _Refused(Reason.UNRECOGNISED_CALL, str(error)) from error
    masks = []
    ranks = set()
    for name, raw in given.items():
        if name == "self":
            continue
        if isinstance(raw, fx.Node):
            hint = program.hints.get(raw)
            if not isinstance(hint, Tensor) or name not in (*_MASKS, *_TENSORS):
                raise _Refused(Reason.UNRECOGNISED_CALL, f"{name} is {raw.name}")
            if name in _MASKS:
                masks.append((name, hint.dtype == torch.bool, hint.dim()))
            else:
                ranks.add(hint.dim())
        elif name in _TENSORS or not (raw is None or isinstance(raw, bool)):
            raise _Refused(Reason.UNRECOGNISED_CALL, f"{name} is {raw!r}")
    if len(ranks) != 1 or not ranks <= {2, 3}:
        raise _Refused(Reason.UNRECOGNISED_CALL, f"operands of {sorted(ranks)} axes")
    is_batched = ranks == {3}
    _check_masks(masks, is_batched, given)
    wants_weights = bool(given.get("need_weights")) and _reads_weights(node)
    return DecomposeAttention(node.name, str(node.target), is_batched, tuple(masks), wants_weights)


def _check(module: nn.Module) -> None:
    """Every part that will be dissolved does what its class does, and nothing besides."""
    for path, part in module.named_modules():
        kind = _kind(part)
        if kind is None and isinstance(part, _KINDS):
            raise _Refused(Reason.UNRECOGNISED_CALL, f"{path or type(part).__name__} is a class of its own")
        if kind is None:
            continue
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise _Refused(Reason.OPAQUE_HOOK, path)
        if isinstance(part, nn.MultiheadAttention):
            _check_attention(part, path)
        elif isinstance(part, (nn.TransformerEncoder, nn.TransformerDecoder)):
            wanted = (
                nn.TransformerEncoderLayer if kind is nn.TransformerEncoder else nn.TransformerDecoderLayer
            )
            if not all(isinstance(layer, wanted) for layer in part.layers):
                raise _Refused(Reason.UNRECOGNISED_CALL, f"{path}.layers")
        elif isinstance(part, nn.Transformer):
            if (
                _kind(part.encoder) is not nn.TransformerEncoder
                or _kind(part.decoder) is not nn.TransformerDecoder
            ):
                raise _Refused(Reason.UNRECOGNISED_CALL, "encoder or decoder of a class of its own")
        elif not _is_traceable(part.activation):
            raise _Refused(Reason.UNRECOGNISED_CALL, f"{path}.activation")


def _check_attention(mha: nn.MultiheadAttention, path: str) -> None:
    parts: list[Any] = [mha.in_proj_weight, mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight]
    parts += [mha.in_proj_bias]
    parts += [mha.out_proj.weight, mha.out_proj.bias, mha.bias_k, mha.bias_v]
    is_computed = parametrize.is_parametrized(mha) or parametrize.is_parametrized(mha.out_proj)
    if is_computed or not all(p is None or isinstance(p, nn.Parameter) for p in parts):
        raise _Refused(Reason.COMPUTED_WEIGHT, path)


def _is_traceable(activation: Any) -> bool:
    """Whether an activation can be written into a graph: a module, a torch function, or traceable Python."""
    if isinstance(activation, nn.Module) or is_torch_function(activation):
        return True
    graph = fx.Graph()
    operand = fx.Proxy(graph.placeholder("x"), fx.proxy.GraphAppendingTracer(graph))
    try:
        return isinstance(activation(operand), fx.Proxy)
    except OP_FAILURES:
        return False


def _check_masks(masks: list[tuple[str, bool, int]], is_batched: bool, given: dict[str, Any]) -> None:
    for name, _, rank in masks:
        allowed = {2 if is_batched else 1} if "padding" in name else {2, 3}
        if rank not in allowed:
            raise _Refused(Reason.UNRECOGNISED_CALL, f"{name} has {rank} axes")
    if given.get("is_causal") and "attn_mask" in given and given["attn_mask"] is None:
        raise _Refused(Reason.UNRECOGNISED_CALL, "is_causal without a mask")


def _reads_weights(node: fx.Node) -> bool:
    """Whether somebody takes more than the first of the two results."""
    return not all(u.op == "call_function" and u.args == (node, 0) for u in node.users)


def _refuse_shared(program: Program, found: dict[fx.Node, DecomposeAttention | Refusal]) -> None:
    """A packed projection is cut only when every site that uses it is written out."""
    while True:
        uses: Counter[int] = Counter()
        for edit in found.values():
            if isinstance(edit, DecomposeAttention):
                uses.update({id(t) for t in _packed(program.modules[edit.path])})
        shared = [
            node
            for node, edit in found.items()
            if isinstance(edit, DecomposeAttention)
            and any(program.param(t).n_sites > uses[id(t)] for t in _packed(program.modules[edit.path]))
        ]
        if not shared:
            return
        for node in shared:
            found[node] = Refusal(node.name, Reason.SHARED_WEIGHT, str(node.target))


def _packed(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            tensors: list[Any] = [part.in_proj_weight, part.in_proj_bias]
            yield from (t for t in tensors if t is not None)


# ---------------------------------------------------------------------- writing
def _write(w: Writer, edit: DecomposeAttention, module: nn.Module, given: dict[str, Any]) -> Any:
    kinds = {name: (is_bool, rank) for name, is_bool, rank in edit.masks}
    values = {name: w.proxy(raw) for name, raw in given.items() if isinstance(raw, fx.Node)}
    masks = {name: Mask(values[name], *kinds[name]) if name in kinds else None for name in _MASKS}
    batched = edit.is_batched

    def is_set(name: str) -> bool:
        return given.get(name) is True

    if isinstance(module, nn.MultiheadAttention):
        operands = (values["query"], values["key"], values["value"])
        causal = is_set("is_causal") and not is_set("need_weights")  # else torch takes the mask it was given
        how = (masks["attn_mask"], masks["key_padding_mask"], causal, edit.wants_weights)
        y, weights = w.attention(edit.path, module, operands, batched, *how, is_set("average_attn_weights"))
        return y.node, None if weights is None else weights.node
    if isinstance(module, nn.TransformerEncoderLayer):
        rest = (masks["src_mask"], masks["src_key_padding_mask"], is_set("is_causal"))
        return w.encoder_layer(edit.path, module, values["src"], batched, *rest).node
    if isinstance(module, nn.TransformerEncoder):
        rest = (masks["mask"], masks["src_key_padding_mask"], is_set("is_causal"))
        return w.encoder(edit.path, module, values["src"], batched, *rest).node
    hints = (is_set("tgt_is_causal"), is_set("memory_is_causal"))
    tgt = values["tgt"]
    if isinstance(module, nn.TransformerDecoderLayer):
        return w.decoder_layer(edit.path, module, tgt, values["memory"], batched, masks, hints).node
    if isinstance(module, nn.TransformerDecoder):
        return w.decoder(edit.path, module, tgt, values["memory"], batched, masks, hints).node
    assert isinstance(module, nn.Transformer)
    rest = (masks["src_mask"], masks["src_key_padding_mask"], is_set("src_is_causal"))
    memory = w.encoder(f"{edit.path}.encoder", module.encoder, values["src"], batched, *rest)
    return w.decoder(f"{edit.path}.decoder", module.decoder, tgt, memory, batched, masks, hints).node
