"""What a layer's own attributes have to say once its tensors have other sizes, and which norms take its place.

A layer is known by its tensors, never by its name: the call in the small graph that reads a layer's weight says what
the layer computes now.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import srfx.nn.functional as compensated
from srfx.ir.attrs import get_attr, split_path
from srfx.nn import CompensatedGroupNorm, CompensatedLayerNorm, CompensatedRMSNorm, RemovedConstants

_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_NORMS = nn.modules.batchnorm._NormBase
NORMS = (CompensatedLayerNorm, CompensatedRMSNorm, CompensatedGroupNorm, nn.LayerNorm, nn.RMSNorm)


def readers(small: fx.GraphModule) -> dict[str, list[tuple[fx.Node, dict[str, Any]]]]:
    """For each path of a tensor the calls that read it, with their arguments by name."""
    found: dict[str, list[tuple[fx.Node, dict[str, Any]]]] = {}
    for node in small.graph.nodes:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                found.setdefault(str(source.target), []).append((node, _arguments(node)))
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        named = {a.name: a.default_value for a in schema}
        return {**named, **{a.name: v for a, v in zip(schema, node.args, strict=False)}, **node.kwargs}
    names = _SIGNATURES.get(node.target, ())
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


_SIGNATURES: dict[Any, tuple[str, ...]] = {
    compensated.compensated_layer_norm: (
        *(
            "input",
            "normalized_shape",
            "n_total",
            "removed_mean",
            "removed_m2",
            "weight",
            "bias",
            "eps",
            "emits",
        ),
        *("emit_shift", "outputs"),
    ),
    compensated.compensated_rms_norm: (
        *("input", "normalized_shape", "n_total", "removed_sum_squares", "weight", "eps", "emits", "outputs"),
    ),
    nn.functional.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    nn.functional.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    nn.functional.linear: ("input", "weight", "bias"),
}


def norm_of(
    small: fx.GraphModule, path: str, reads: dict[str, list[tuple[fx.Node, dict[str, Any]]]]
) -> nn.Module | None:
    """The norm that stands in the small model where a module at ``path`` stood, None when there is none."""
    try:
        found = small.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(found, NORMS):
        return found
    calls = reads.get(f"{path}.weight", [])
    if len(calls) != 1:
        return None
    node, named = calls[0]
    if node.target is compensated.compensated_layer_norm:
        shape = tuple(named["normalized_shape"])
        n_gone = named["n_total"] - torch.Size(shape).numel()
        removed = RemovedConstants(n_gone, named.get("removed_mean", 0.0), named.get("removed_m2", 0.0))
        return CompensatedLayerNorm(
            shape,
            removed,
            eps=named.get("eps", 1e-5),
            bias=named.get("bias") is not None,
            emits=named.get("emits", ()),
            emit_shift=named.get("emit_shift", 0.0),
            outputs=_stored(small, named.get("outputs")),
        )
    if node.target is compensated.compensated_rms_norm:
        (n_kept,) = named["normalized_shape"]
        squares = named.get("removed_sum_squares", 0.0)
        return CompensatedRMSNorm(
            n_kept,
            named["n_total"],
            squares,
            eps=named.get("eps"),
            emits=named.get("emits", ()),
            outputs=_stored(small, named.get("outputs")),
        )
    if node.target in (nn.functional.rms_norm, torch.rms_norm, torch.ops.aten.rms_norm.default):
        return nn.RMSNorm(list(named["normalized_shape"]), eps=named.get("eps"))
    return None


class _ChannelsFirst(nn.Module):
    """A norm over axis 1 of pictures, in the place of the classes that torchvision and timm have for it."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [N, K, H, W] -> the same, axis 1 as long as what the norm writes."""
        y: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class ChannelsFirstLayerNorm(_ChannelsFirst, CompensatedLayerNorm):
    """A compensated layer norm over axis 1 of pictures."""


class ChannelsFirstCompensatedRMSNorm(_ChannelsFirst, CompensatedRMSNorm):
    """A compensated RMS norm over axis 1 of pictures."""


class ChannelsFirstRMSNorm(_ChannelsFirst, nn.RMSNorm):
    """An RMS norm over axis 1 of pictures."""


CHANNELS_FIRST: dict[type[nn.Module], type[nn.Module]] = {
    CompensatedLayerNorm: ChannelsFirstLayerNorm,
    CompensatedRMSNorm: ChannelsFirstCompensatedRMSNorm,
    nn.RMSNorm: ChannelsFirstRMSNorm,
}
"""The form over axis 1 of each norm that is put in."""


def is_channels_first(path: str, reads: dict[str, list[tuple[fx.Node, dict[str, Any]]]]) -> bool:
    """Whether a norm that is no leaf of the graph turns pictures around itself, before and after."""
    calls = reads.get(f"{path}.weight", [])
    if len(calls) != 1 or not isinstance(calls[0][0].args[0], fx.Node):
        return False
    node = calls[0][0]
    turns = [_permutation(n) for n in (node.args[0], *node.users)]
    return turns[0] == (0, 2, 3, 1) and all(t == (0, 3, 1, 2) for t in turns[1:])


def _permutation(node: Any) -> tuple[int, ...]:
    if node.target not in ("permute", torch.permute, torch.ops.aten.permute.default):
        return ()
    dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return tuple(dims)


def _stored(small: fx.GraphModule, raw: Any) -> Tensor | None:
    """A tensor argument that stands in an attribute of the small model."""
    return get_attr(small, str(raw.target)) if isinstance(raw, fx.Node) else None


def settings(
    layer: nn.Module, calls: list[tuple[fx.Node, dict[str, Any]]], twin: nn.Module | None
) -> dict[str, Any] | None:
    """New values of the attributes of a layer of torch.nn whose tensors have their new sizes already.

    Args:
        layer: the layer.
        calls: what reads its weight in the small graph, when that has no modules.
        twin: the layer in the small graph, when that has modules.

    Returns:
        None for a layer that is not known.
    """
    if twin is not None and type(twin) is type(layer):
        plain = (bool, int, float, tuple)
        return {k: v for k, v in vars(twin).items() if isinstance(v, plain) and k != "training"}
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(layer, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(layer, _NORMS):
        return {"num_features": shape[0]}
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(layer, nn.GroupNorm):
        groups = next((c["num_groups"] for _, c in calls if "num_groups" in c), layer.num_groups)
        return {"num_channels": shape[0], "num_groups": groups}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(layer, _CONVOLUTIONS):
        groups = next((c["groups"] for _, c in calls if "groups" in c), layer.groups)
        wide, narrow = (
            ("in_channels", "out_channels")
            if isinstance(layer, _TRANSPOSED)
            else ("out_channels", "in_channels")
        )
        return {wide: shape[0], narrow: shape[1] * groups, "groups": groups}
    return None


def parent_of(name: str) -> str:
    """``"a.b.weight"`` -> ``"a.b"``."""
    return split_path(name)[0]
