"""Guesses at what a graph without shape metadata takes as input, most likely first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from srfx.ir.attrs import get_attr

Guess = Callable[[], torch.Tensor]

_SIDES = (
    224,
    32,
    28,
    64,
    96,
    128,
    299,
    256,
    16,
    384,
    112,
    48,
    160,
    192,
    240,
    320,
    512,
    8,
    14,
    7,
    288,
    36,
    331,
    40,
    80,
)
_LENGTHS = (128, 16, 64, 256, 1000, 1024, 16000, 32, 100, 512, 784, 8, 4000)
_CLIPS = ((16, 112, 112), (8, 32, 32), (16, 64, 64), (8, 16, 16), (16, 224, 224), (4, 8, 8))
_TOKENS = (16, 128, 32, 8, 64, 197, 512)
_MAX_PRODUCT = 64
_SEARCH_DEPTH = 40

_CONV_DIM: dict[Any, int] = {
    F.conv1d: 1, F.conv2d: 2, F.conv3d: 3,
    F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3,
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3,
}  # fmt: skip


def candidates(gm: fx.GraphModule, placeholders: Sequence[fx.Node]) -> Iterator[list[Any]]:
    """Input lists to try: all placeholders by their i-th guess, then (few inputs only) mixed guesses.

    A guess is a function that makes a tensor (to be called under a fake tensor mode) or a plain default
    value.
    """
    device = next((p.device for p in [*gm.parameters(), *gm.buffers()]), torch.device("cpu"))
    dtype = next((p.dtype for p in gm.parameters() if p.is_floating_point()), torch.get_default_dtype())
    choices = [list(_guesses(gm, node, dtype, device)) for node in placeholders]
    n_rounds = max((len(options) for options in choices), default=1)
    for i in range(n_rounds):
        yield [options[i % len(options)] for options in choices]
    if sum(len(options) > 1 for options in choices) > 1:
        yield from (list(mix) for mix in itertools.islice(itertools.product(*choices), _MAX_PRODUCT))


def _guesses(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    if node.args:  # an optional argument keeps its default
        yield node.args[0]
        return

    def floats(*shape: int) -> Guess:
        return lambda: torch.empty(shape, dtype=dtype, device=device)

    def tokens(*shape: int) -> Guess:
        return lambda: torch.empty(shape, dtype=torch.long, device=device)

    kind, n_channels = _first_layer(gm, node)
    if kind == "tokens":
        yield from (tokens(2, length) for length in _TOKENS)
        yield tokens(2)
    elif kind == "linear":
        yield floats(2, n_channels)
        yield from (floats(2, length, n_channels) for length in _TOKENS)
        yield from (floats(2, n // (side * side), side, side) for side, n in _squares(n_channels))
    elif kind == "conv1":
        yield from (floats(2, n_channels, length) for length in _LENGTHS)
        yield from (floats(2, length) for length in _LENGTHS if n_channels == 1)
    elif kind == "conv2":
        yield from (floats(2, n_channels, side, side) for side in _SIDES)
        yield from (floats(2, side, side, n_channels) for side in _SIDES[:3])
        yield from (floats(2, side, side) for side in _SIDES[:3] if n_channels == 1)
    elif kind == "conv3":
        yield from (floats(2, n_channels, *clip) for clip in _CLIPS)
    elif kind == "norm":
        yield from (
            floats(2, n_channels, *space) for space in [(), (224, 224), (32, 32), (128,), (8, 32, 32)]
        )
    # Whatever the first layer says: there may be a reshape in front of it.
    if kind != "tokens":
        yield from (floats(2, 3, side, side) for side in _SIDES[:3])
        yield from (floats(2, 1, side, side) for side in _SIDES[1:3])
        yield from (tokens(2, length) for length in _TOKENS[:2])
        yield from (floats(2, 16), floats(2, 16, 64), floats(2), floats(2, 3, 16, 112, 112))


def _squares(n_features: int) -> Iterator[tuple[int, int]]:
    """Sides of square pictures that flatten to this many features: 784 is 28 x 28, 3072 is 3 x 32 x 32."""
    for n_colours in (1, 3):
        side = round((n_features / n_colours) ** 0.5)
        if side > 1 and side * side * n_colours == n_features:
            yield side, n_features


def _first_layer(gm: fx.GraphModule, node: fx.Node) -> tuple[str, int]:
    """The kind of the first layer with weights that reads this input, and the channels it wants."""
    queue, seen = [node], {node}
    position = 0
    while position < len(queue) and position < _SEARCH_DEPTH:
        current = queue[position]
        position += 1
        for user in current.users:
            found = _layer(gm, user, current)
            if found is not None:
                return found
            if user not in seen and user.op != "output":
                seen.add(user)
                queue.append(user)
    return "", 0


def _layer(gm: fx.GraphModule, user: fx.Node, source: fx.Node) -> tuple[str, int] | None:
    if user.op == "call_module":
        return _module_layer(get_attr(gm, str(user.target)))
    if user.op != "call_function" or user.args[:1] == () or len(user.args) < 2:
        return None
    weight = _weight_of(gm, user.args[1])
    packet = getattr(user.target, "overloadpacket", user.target)
    if packet in (F.embedding, torch.embedding) or packet is torch.ops.aten.embedding:
        return "tokens", 0
    if weight is None or user.args[0] is not source:
        return None
    if packet in (F.linear, torch.ops.aten.linear):
        return "linear", weight.shape[-1]
    n_dims = _CONV_DIM.get(packet) or (weight.dim() - 2 if "conv" in getattr(packet, "__name__", "") else 0)
    if n_dims > 0:
        groups = user.kwargs.get("groups", user.args[6] if len(user.args) > 6 else 1)
        return f"conv{n_dims}", weight.shape[1] * (groups if isinstance(groups, int) else 1)
    return None


def _weight_of(gm: fx.GraphModule, argument: Any) -> torch.Tensor | None:
    """The tensor behind an operand; looks through parameter arithmetic to the first parameter."""
    while isinstance(argument, fx.Node) and argument.op != "get_attr" and argument.all_input_nodes:
        argument = argument.all_input_nodes[0]
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        value = get_attr(gm, str(argument.target))
        return value if isinstance(value, torch.Tensor) else None
    return None


def _module_layer(module: nn.Module) -> tuple[str, int] | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "tokens", 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"conv{len(module.kernel_size)}", module.in_channels
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return "linear", module.in_features if isinstance(module, nn.Linear) else module.in1_features
    if isinstance(module, nn.RNNBase):
        return "linear", module.input_size
    if isinstance(module, nn.modules.batchnorm._NormBase):
        space = {"1d": "conv1", "2d": "conv2", "3d": "conv3"}.get(type(module).__name__[-2:], "norm")
        return space, module.num_features
    if isinstance(module, (nn.GroupNorm,)):
        return "norm", module.num_channels
    if isinstance(module, nn.LayerNorm):
        return "linear", module.normalized_shape[-1]
    if isinstance(module, nn.MultiheadAttention):
        return "linear", module.embed_dim
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return "linear", module.self_attn.embed_dim
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
        return None
    return None
