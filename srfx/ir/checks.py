"""Checks of what the user gave: each failure is one clear error that names the tensor."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from srfx.errors import CaptureError, UnsupportedModelError


def check_tensors(module: nn.Module) -> None:
    """Refuse models whose parameters or buffers hold no readable strided values.

    Complex, integer and boolean tensors pass: no rule reads them, so the analysis keeps all their channels.
    Quantized *modules* pass as well (they hold packed objects, no tensors) and are barriers.

    Raises:
        CaptureError: a tensor is on the meta device or fake: there are no values to read zeros from.
        UnsupportedModelError: a tensor is lazy (uninitialised), quantized, sparse, or a wrapper subclass
            (DTensor, torchao weights): its values cannot be cut channel by channel.
    """
    for name, tensor in _named_tensors(module):
        if is_lazy(tensor):
            raise UnsupportedModelError(
                f"{name} is not initialised yet (lazy module): run the model on a batch, then minimize it"
            )
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            raise CaptureError(
                f"{name} has no values (device {tensor.device}, {type(tensor).__name__}): "
                "load the trained weights before minimizing"
            )
        if tensor.is_quantized:
            raise UnsupportedModelError(
                f"{name} is quantized ({tensor.dtype}): minimize the float model, then quantize"
            )
        if tensor.layout is not torch.strided:
            raise UnsupportedModelError(f"{name} has layout {tensor.layout}: call .to_dense() on it first")
        is_wrapper: bool = is_traceable_wrapper_subclass(tensor)
        if is_wrapper:
            raise UnsupportedModelError(
                f"{name} is a {type(tensor).__name__}: give a model of plain tensors (unsharded, unquantized)"
            )


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = [*module.named_parameters(), *module.named_buffers()]
    for path, child in module.named_modules():  # a weight that a pruning hook set is a plain attribute
        plain = [(key, value) for key, value in vars(child).items() if isinstance(value, torch.Tensor)]
        found += [(f"{path}.{key}" if path else key, value) for key, value in plain]
    return found


def check_graph(gm: fx.GraphModule) -> None:
    """Check that the graph is well formed and that everything it names exists.

    Raises:
        CaptureError: with fx's own complaint.
    """
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise CaptureError(f"the graph fails fx's lint, so it cannot be read: {error}") from error
    if not any(node.op == "output" for node in gm.graph.nodes):
        raise CaptureError("the graph has no output node")
