"""One function for each tool: a masked model (its own copy) and an input, to whatever the tool makes of it.

All are asked for the same thing: take the zeros that are there, choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import srfx


def aligned(model: nn.Module, x: Tensor) -> nn.Module:
    """The defaults of srfx.minimize."""
    return srfx.minimize(model, x)


def simplify(model: nn.Module, x: Tensor) -> nn.Module:
    """torch-simplify, as its documentation calls it."""
    import simplify as library

    return library.simplify(model, x[:1])  # type: ignore[no-any-return]


def zero_rows(model: nn.Module, x: Tensor) -> nn.Module:
    """Torch-Pruning, asked to drop each layer's rows of zeros: what a user would write.  Biases are lost."""
    return _torch_pruning(model, x, is_careful=False)


def zero_groups(model: nn.Module, x: Tensor) -> nn.Module:
    """Torch-Pruning, asked to drop only channels that are zero in every member of their group."""
    return _torch_pruning(model, x, is_careful=True)


def _torch_pruning(model: nn.Module, x: Tensor, is_careful: bool) -> nn.Module:
    import torch_pruning as library

    graph = library.DependencyGraph().build_dependency(model, x)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    prune = {nn.Linear: library.prune_linear_out_channels}
    for layer in layers[:-1]:
        zero = (layer.weight.flatten(1) == 0).all(1)
        rows = zero.nonzero().flatten().tolist()
        if not rows or len(rows) == len(zero):
            continue
        how = prune.get(type(layer), library.prune_conv_out_channels)
        group = graph.get_pruning_group(layer, how, idxs=rows)
        if is_careful:
            rows = [row for i, row in enumerate(rows) if _is_zero_everywhere(group, i)]
            if not rows:
                continue
            group = graph.get_pruning_group(layer, how, idxs=rows)
        if graph.check_pruning_group(group):
            group.prune()
    return model


def _is_zero_everywhere(group: Any, position: int) -> bool:
    """Whether every tensor that the group would cut holds zeros there: weights, biases, norm scales and shifts."""
    for dependency, indices in group:
        module, index = dependency.target.module, indices[position]
        is_input = "in_channels" in dependency.handler.__name__
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if weight.dim() > 1 and is_input:
            if bool(weight[:, index % weight.shape[1]].any()):
                return False
        elif bool(weight[index % weight.shape[0]].any()):
            return False
        bias = getattr(module, "bias", None)
        if not is_input and bias is not None and bool(bias[index % len(bias)] != 0):
            return False
    return True


def sparsifier(model: nn.Module, x: Tensor) -> nn.Module:
    """torch.ao.pruning's structured pruner with the rows of zeros as its mask."""
    from torch.ao.pruning._experimental.pruner.base_structured_sparsifier import BaseStructuredSparsifier

    class ZeroRows(BaseStructuredSparsifier):  # type: ignore[misc]
        def update_mask(self, module: nn.Module, tensor_name: str, **_: Any) -> None:
            held = getattr(module.parametrizations, tensor_name)
            held[0].mask.data = (held.original.flatten(1) != 0).any(1)

    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    pruner = ZeroRows({})
    pruner.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers[:-1]])
    pruner.step()
    return pruner.prune()  # type: ignore[no-any-return]


def speedup(model: nn.Module, x: Tensor) -> nn.Module:
    """NNI's ModelSpeedup with the zeros as its masks."""
    from nni.compression.speedup import ModelSpeedup

    masks = {
        name: {"weight": (module.weight != 0).to(x.dtype)}
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    return ModelSpeedup(model, x, masks).speedup_model()  # type: ignore[no-any-return]


def openvino(model: nn.Module, x: Tensor) -> nn.Module:
    """OpenVINO's offline pruning transformation."""
    import openvino as library
    from openvino._offline_transformations import apply_pruning_transformation

    converted = library.convert_model(model, example_input=x)
    apply_pruning_transformation(converted)
    return _Converted(converted)


class _Converted(nn.Module):
    """An OpenVINO model that is called like a module; `n_weights` counts its float constants of two and more axes."""

    def __init__(self, converted: Any) -> None:
        import openvino as library

        super().__init__()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
        self.compiled = library.compile_model(converted, "CPU", options)
        constants = [op for op in converted.get_ops() if op.get_type_name() == "Constant"]
        floats = [op for op in constants if op.get_element_type().is_real()]
        self.n_weights = sum(op.data.size for op in floats)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(x.numpy())[0])


TOOLS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "srfx": aligned,
    "torch-simplify": simplify,
    "Torch-Pruning, zero rows": zero_rows,
    "Torch-Pruning, zero groups": zero_groups,
    "torch.ao.pruning": sparsifier,
    "OpenVINO": openvino,
    "NNI": speedup,
}
SINGLE = ("torch-simplify", "OpenVINO")
"""Tools that only know float32; all others get float64, where rounding hides nothing."""
