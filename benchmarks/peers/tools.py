"""One function for each tool: a masked model (its own copy) and an input, to whatever the tool makes of it.

All are asked for the same thing: take the zeros that are there, choose nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import srfx


def aligned(model: nn.Module, x: Tensor) -> nn.Module:
    """The defaults of srfx.minimize."""
    return srfx.minimize(model, x)


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """And batch norms that follow a convolution become part of it, by torch.fx's own pass."""
    from torch.fx.experimental.optimization import fuse

    return fuse(srfx.minimize(model, x))  # type: ignore[no-any-return]


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
        if layer not in graph.module2node:
            continue  # it does not follow inside nn.MultiheadAttention
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
    """torch.ao.pruning's structured pruner with the rows of zeros as its mask, on the layers that it takes at all."""
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
    taken = _taken(model, layers)
    return _row_pruner(model, taken).prune() if taken else model  # type: ignore[no-any-return]


def _taken(model: nn.Module, layers: list[str]) -> list[str]:
    """It raises when a layer fits none of its patterns; those that fit have lost their mask by then."""
    from torch.ao.pruning._experimental.pruner.parametrization import FakeStructuredSparsity
    from torch.ao.pruning.sparsifier.utils import module_contains_param

    trial = _row_pruner(copy.deepcopy(model), layers)
    try:
        trial.prune()
    except Exception:  # noqa: BLE001  it raises nothing more precise
        if not hasattr(trial, "traced"):
            return []  # it cannot trace the model
        done = dict(trial.traced.named_modules())
        return [name for name in layers if not module_contains_param(done[name], FakeStructuredSparsity)]
    return layers


def _row_pruner(model: nn.Module, layers: list[str]) -> Any:
    from torch.ao.pruning._experimental.pruner.base_structured_sparsifier import BaseStructuredSparsifier

    class ZeroRows(BaseStructuredSparsifier):  # type: ignore[misc]
        def update_mask(self, module: nn.Module, tensor_name: str, **_: Any) -> None:
            held = getattr(module.parametrizations, tensor_name)
            held[0].mask.data = (held.original.flatten(1) != 0).any(1)

    pruner = ZeroRows({"prune_bias": False})
    pruner.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers])
    pruner.step()
    return pruner


def speedup(model: nn.Module, x: Tensor) -> nn.Module:
    """NNI's ModelSpeedup with the zeros as its masks."""
    from nni.compression.speedup import ModelSpeedup

    _fit_nni_to_torch()
    masks = {
        name: {"weight": (module.weight != 0).to(x.dtype)}
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    return ModelSpeedup(model, x, masks).speedup_model()  # type: ignore[no-any-return]


def _fit_nni_to_torch() -> None:
    """NNI 3.0 is older than today's torch: its tracer stops at functions that name no module, and at a new argument."""
    from nni.common.concrete_trace_utils import concrete_tracer as tracer

    leaves = tracer.ConcreteTracer.default_autowrap_leaf_function
    known = ("_TensorBase", "_VariableFunctionsClass")
    for function in list(leaves):
        is_plain = type(function).__name__ not in ("method_descriptor", "method-wrapper")
        if is_plain and function.__module__ is None and not function.__qualname__.startswith(known):
            del leaves[function]
    is_impure = tracer.node_is_impure_wrapper
    tracer.node_is_impure_wrapper = lambda node, impure_random=True: is_impure(node)


def openvino(model: nn.Module, x: Tensor) -> nn.Module:
    """OpenVINO's offline pruning transformation."""
    from openvino._offline_transformations import apply_pruning_transformation

    converted = _converted(model, x)
    n_before = _n_constants(converted)
    apply_pruning_transformation(converted)
    return Converted(converted, _n_constants(converted) / n_before)


def convert(model: nn.Module, x: Tensor) -> nn.Module:
    """A model as OpenVINO runs it, nothing pruned."""
    return Converted(_converted(model, x), 1.0)


def _converted(model: nn.Module, x: Tensor) -> Any:
    import openvino as library

    torch.backends.mha.set_fastpath_enabled(
        False
    )  # its traces of nn.MultiheadAttention differ from run to run
    return library.convert_model(model, example_input=x)


def _n_constants(converted: Any) -> int:
    """Numbers in its float constants: weights, and what it makes of norms."""
    constants = [op for op in converted.get_ops() if op.get_type_name() == "Constant"]
    return sum(op.data.size for op in constants if op.get_element_type().is_real())


class Converted(nn.Module):
    """An OpenVINO model that is called like a module, on one thread; ``share`` of the constants are left."""

    def __init__(self, converted: Any, share: float) -> None:
        import openvino as library

        super().__init__()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
        self.compiled = library.compile_model(converted, "CPU", options)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """One run in its engine."""
        return torch.from_numpy(self.compiled(x.numpy())[0])


FOLDED = "srfx, norms folded"
TOOLS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "srfx": aligned,
    FOLDED: folded,
    "torch-simplify": simplify,
    "Torch-Pruning, zero rows": zero_rows,
    "Torch-Pruning, zero groups": zero_groups,
    "torch.ao.pruning": sparsifier,
    "OpenVINO": openvino,
    "NNI": speedup,
}
SINGLE = ("torch-simplify", "OpenVINO", "NNI")
"""Tools that only know float32; all others get float64, where rounding hides nothing."""
FOLDS = (FOLDED, "torch-simplify")
"""Tools that fold batch norms into convolutions, which has nothing to do with zeros: compared among themselves."""
