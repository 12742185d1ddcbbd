"""Write what nn.MultiheadAttention and the nn.Transformer layers compute, in plain layers, into a graph.

Each function takes proxies of the operands and writes nodes before the call that they replace.  The forms
follow torch.nn.functional.multi_head_attention_forward and torch/nn/modules/transformer.py, without the fast
paths and nested tensors.  Heads are split by literal counts and merged by flatten, so every batch size and
length works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.attrs import set_attr
from srfx.nn.attention import DropoutAttention


@dataclass(frozen=True)
class Mask:
    """A mask operand: a proxy, whether it is boolean (True: not seen), and its rank."""

    value: Any
    is_bool: bool
    rank: int


class _NodeMaker(fx.proxy.GraphAppendingTracer):
    """Makes nodes where the graph inserts, with the metadata of the call that is replaced."""

    def __init__(self, graph: fx.Graph, meta: dict[str, Any]) -> None:
        super().__init__(graph)
        self.meta = {k: v for k, v in meta.items() if k not in ("val", "tensor_meta", "example_value")}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta = dict(self.meta)
        return node


class Cutter:
    """Pieces of parameters as parameters of their own; one object for the same piece of the same tensor."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int, int], tuple[Tensor, nn.Parameter]] = {}

    def rows(self, tensor: Tensor, start: int, stop: int) -> nn.Parameter:
        """Rows ``start`` to ``stop``."""
        key = (id(tensor), start, stop)
        if key not in self.known:
            new = nn.Parameter(tensor.detach()[start:stop].clone(), requires_grad=tensor.requires_grad)
            self.known[key] = (tensor, new)  # the tensor is kept alive, its id stays taken
        return self.known[key][1]


class Writer:
    """Writes into ``gm`` before ``node``.

    Args:
        gm: the graph module; new layers are set below the modules they replace.
        node: the call to replace.
        cutter: shared by all calls of one run.
    """

    def __init__(self, gm: fx.GraphModule, node: fx.Node, cutter: Cutter) -> None:
        self.gm = gm
        self.cutter = cutter
        self.maker = _NodeMaker(gm.graph, node.meta)

    def proxy(self, node: fx.Node) -> Any:
        """The operand as something to compute with."""
        return fx.Proxy(node, self.maker)

    def call(self, path: str, *args: Any) -> Any:
        """Call the module at ``path``."""
        return self.maker.create_proxy("call_module", path, args, {})

    def attribute(self, path: str) -> Any:
        """Read a parameter."""
        return self.maker.create_proxy("get_attr", path, (), {})

    # ------------------------------------------------------------------ layers
    def linear(self, path: str, weight: nn.Parameter, bias: nn.Parameter | None, is_training: bool) -> str:
        """A linear layer of these parameters at ``path``."""
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = weight
        if bias is not None:
            layer.bias = bias
        set_attr(self.gm, path, layer.train(is_training))
        return path

    def projections(self, path: str, mha: nn.MultiheadAttention) -> None:
        """``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` of an attention, once for all its calls."""
        if isinstance(mha._modules.get("q_proj"), nn.Linear):
            return
        n = mha.embed_dim
        packed: Any = mha.in_proj_weight  # None when keys or values have a width of their own
        bias: Any = mha.in_proj_bias
        for i, name in enumerate("qkv"):
            rows = (i * n, (i + 1) * n)
            own: Any = getattr(mha, f"{name}_proj_weight")
            weight = own if packed is None else self.cutter.rows(packed, *rows)
            shift = None if bias is None else self.cutter.rows(bias, *rows)
            self.linear(f"{path}.{name}_proj", weight, shift, mha.training)
        out: Any = mha.out_proj
        self.linear(f"{path}.out_proj", out.weight, out.bias, mha.training)

    # ------------------------------------------------------------------ attention
    def attention(
        self,
        path: str,
        mha: nn.MultiheadAttention,
        operands: tuple[Any, Any, Any],
        is_batched: bool,
        attn_mask: Mask | None = None,
        key_padding_mask: Mask | None = None,
        is_causal: bool = False,
        wants_weights: bool = False,
        averages: bool = True,
    ) -> tuple[Any, Any]:
        """The result of an nn.MultiheadAttention and its weights (None unless wanted)."""
        self.projections(path, mha)
        tokens_first = is_batched and not mha.batch_first
        q, k, v = (self.call(f"{path}.{n}_proj", x) for n, x in zip("qkv", operands, strict=True))
        n_added = int(mha.bias_k is not None) + int(mha.add_zero_attn)
        if mha.bias_k is not None:
            axis = 1 if is_batched and mha.batch_first else 0
            k = torch.cat([k, self._repeated(f"{path}.bias_k", k, is_batched, tokens_first)], dim=axis)
            v = torch.cat([v, self._repeated(f"{path}.bias_v", v, is_batched, tokens_first)], dim=axis)
        q, k, v = (self._heads(x, mha, is_batched, tokens_first) for x in (q, k, v))
        if mha.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if is_causal and key_padding_mask is None and not wants_weights:
            attn_mask = None
        else:
            is_causal = False
        mask = self._mask(attn_mask, key_padding_mask, q, mha.num_heads, is_batched)
        if mask is not None and n_added:
            mask = F.pad(mask, (0, n_added))
        weights = None
        if wants_weights:
            y, weights = self._eager(path, mha, q, k, v, mask)
            if averages:
                weights = weights.mean(dim=1 if is_batched else 0)
        elif mha.dropout > 0:
            set_attr(
                self.gm, f"{path}.attention", DropoutAttention(mha.dropout, is_causal).train(mha.training)
            )
            y = self.call(f"{path}.attention", q, k, v, *([] if mask is None else [mask]))
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        y = y.permute(2, 0, 1, 3).flatten(2) if tokens_first else y.transpose(-3, -2).flatten(-2)
        return self.call(f"{path}.out_proj", y), weights

    def _repeated(self, path: str, like: Any, is_batched: bool, tokens_first: bool) -> Any:
        """One more token [1, 1, E] for every sequence of the batch."""
        token = self.attribute(path)
        if not is_batched:
            return token.squeeze(0)
        if tokens_first:
            return token.expand(-1, like.size(1), -1)
        return token.expand(like.size(0), -1, -1)

    def _heads(self, x: Any, mha: nn.MultiheadAttention, is_batched: bool, tokens_first: bool) -> Any:
        """[N, H, T, D], or [H, T, D] without a batch."""
        x = x.unflatten(-1, (mha.num_heads, mha.head_dim))
        if tokens_first:
            return x.permute(1, 2, 0, 3)
        return x.transpose(1, 2) if is_batched else x.transpose(0, 1)

    def _eager(
        self, path: str, mha: nn.MultiheadAttention, q: Any, k: Any, v: Any, mask: Any
    ) -> tuple[Any, Any]:
        scores = torch.matmul(q * math.sqrt(1.0 / mha.head_dim), k.transpose(-2, -1))
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, dim=-1)
        if mha.dropout > 0:
            set_attr(self.gm, f"{path}.attention_dropout", nn.Dropout(mha.dropout).train(mha.training))
            weights = self.call(f"{path}.attention_dropout", weights)
        return torch.matmul(weights, v), weights

    def _mask(
        self, attn_mask: Mask | None, key_padding_mask: Mask | None, q: Any, n_heads: int, is_batched: bool
    ) -> Any:
        """One additive mask that broadcasts to the scores, or None."""
        parts = []
        if attn_mask is not None:
            value = self._additive(attn_mask, q)
            parts.append(value.unflatten(0, (-1, n_heads)) if attn_mask.rank == 3 and is_batched else value)
        if key_padding_mask is not None:
            value = self._additive(key_padding_mask, q)
            value = value.unsqueeze(-2)
            parts.append(value.unsqueeze(-2) if is_batched else value)
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _additive(self, mask: Mask, like: Any) -> Any:
        if not mask.is_bool:
            return mask.value
        return torch.zeros_like(mask.value, dtype=like.dtype).masked_fill(mask.value, -math.inf)

    def float_mask(self, mask: Mask | None, like: Any) -> Mask | None:
        """The mask as what is added to the scores, written once for several layers."""
        return None if mask is None else Mask(self._additive(mask, like), False, mask.rank)

    # ------------------------------------------------------------------ transformer
    def activation(self, path: str, layer: nn.Module, x: Any) -> Any:
        """The activation of a feed-forward block: a function, or a module of the layer."""
        function: Callable[[Any], Any] = layer.activation  # type: ignore[assignment]
        return self.call(f"{path}.activation", x) if isinstance(function, nn.Module) else function(x)

    def _feed_forward(self, path: str, layer: nn.Module, x: Any, dropout: str) -> Any:
        x = self.activation(path, layer, self.call(f"{path}.linear1", x))
        return self.call(f"{path}.{dropout}", self.call(f"{path}.linear2", self.call(f"{path}.dropout", x)))

    def encoder_layer(
        self,
        path: str,
        layer: nn.TransformerEncoderLayer,
        src: Any,
        is_batched: bool,
        src_mask: Mask | None,
        src_key_padding_mask: Mask | None,
        is_causal: bool,
    ) -> Any:
        """The result of an nn.TransformerEncoderLayer."""

        def attend(x: Any) -> Any:
            y, _ = self.attention(
                f"{path}.self_attn",
                layer.self_attn,
                (x, x, x),
                is_batched,
                src_mask,
                src_key_padding_mask,
                is_causal,
            )
            return self.call(f"{path}.dropout1", y)

        def feed(x: Any) -> Any:
            return self._feed_forward(path, layer, x, "dropout2")

        return self._residual(path, layer.norm_first, src, [attend, feed])

    def decoder_layer(
        self,
        path: str,
        layer: nn.TransformerDecoderLayer,
        tgt: Any,
        memory: Any,
        is_batched: bool,
        masks: dict[str, Mask | None],
        is_causal: tuple[bool, bool],
    ) -> Any:
        """The result of an nn.TransformerDecoderLayer."""

        def attend_self(x: Any) -> Any:
            given = (masks["tgt_mask"], masks["tgt_key_padding_mask"], is_causal[0])
            y, _ = self.attention(f"{path}.self_attn", layer.self_attn, (x, x, x), is_batched, *given)
            return self.call(f"{path}.dropout1", y)

        def attend_memory(x: Any) -> Any:
            given = (masks["memory_mask"], masks["memory_key_padding_mask"], is_causal[1])
            operands = (x, memory, memory)
            y, _ = self.attention(
                f"{path}.multihead_attn", layer.multihead_attn, operands, is_batched, *given
            )
            return self.call(f"{path}.dropout2", y)

        def feed(x: Any) -> Any:
            return self._feed_forward(path, layer, x, "dropout3")

        return self._residual(path, layer.norm_first, tgt, [attend_self, attend_memory, feed])

    def _residual(self, path: str, norm_first: bool, x: Any, blocks: list[Callable[[Any], Any]]) -> Any:
        for i, block in enumerate(blocks, 1):
            norm = f"{path}.norm{i}"
            x = x + block(self.call(norm, x)) if norm_first else self.call(norm, x + block(x))
        return x

    def encoder(
        self,
        path: str,
        encoder: nn.TransformerEncoder,
        src: Any,
        is_batched: bool,
        mask: Mask | None,
        src_key_padding_mask: Mask | None,
        is_causal: bool,
    ) -> Any:
        """The result of an nn.TransformerEncoder."""
        mask, padding = self.float_mask(mask, src), self.float_mask(src_key_padding_mask, src)
        for i, layer in enumerate(encoder.layers):
            assert isinstance(layer, nn.TransformerEncoderLayer)
            src = self.encoder_layer(f"{path}.layers.{i}", layer, src, is_batched, mask, padding, is_causal)
        return self.call(f"{path}.norm", src) if encoder.norm is not None else src

    def decoder(
        self,
        path: str,
        decoder: nn.TransformerDecoder,
        tgt: Any,
        memory: Any,
        is_batched: bool,
        masks: dict[str, Mask | None],
        is_causal: tuple[bool, bool],
    ) -> Any:
        """The result of an nn.TransformerDecoder."""
        masks = {name: self.float_mask(mask, tgt) for name, mask in masks.items()}
        for i, layer in enumerate(decoder.layers):
            assert isinstance(layer, nn.TransformerDecoderLayer)
            tgt = self.decoder_layer(f"{path}.layers.{i}", layer, tgt, memory, is_batched, masks, is_causal)
        return self.call(f"{path}.norm", tgt) if decoder.norm is not None else tgt
