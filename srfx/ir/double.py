"""A model in float64: copies of its tensors, and a mode in which the float dtypes that it writes down mean float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from srfx.ir.clone import clone_structure
from srfx.ir.exported import strip_export
from srfx.ir.surroundings import ONE_AT_A_TIME

_LOW = (torch.float16, torch.bfloat16, torch.float32)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def copy_for_comparison(model: nn.Module, tensor_map: Callable[[Tensor], Tensor]) -> nn.Module:
    """A model with tensors of its own, modules of dropout switched off, the guards of export taken off."""

    def mapped(tensor: Tensor) -> Tensor:
        new = tensor_map(tensor)
        return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new

    clone = clone_structure(model, mapped)
    for module in clone.modules():
        if isinstance(module, _DROPOUTS):
            module.training = False
        if isinstance(module, fx.GraphModule):
            strip_export(module)  # guards would refuse another batch size or dtype
            module.recompile()
    return clone


def to_double(tensor: Tensor) -> Tensor:
    """A copy in float64 or complex128; integers stay integers."""
    if tensor.is_floating_point():
        return tensor.detach().double()
    return tensor.detach().to(torch.complex128) if tensor.is_complex() else tensor.detach().clone()


class _Double(TorchDispatchMode):
    """Float dtypes written down in a model (casts, factories) mean float64."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the op with its dtype arguments raised."""
        args, kwargs = pytree.tree_map_only(torch.dtype, _raised, (args, kwargs or {}))
        return func(*args, **kwargs)


def _raised(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in _LOW else dtype


@contextlib.contextmanager
def float64_default() -> Iterator[None]:
    """Factories that are told no dtype give float64."""
    with ONE_AT_A_TIME:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@contextlib.contextmanager
def float64_mode() -> Iterator[None]:
    """Casts and factories of any float dtype give float64; every op costs a little more."""
    with float64_default(), _Double():  # type: ignore[no-untyped-call]
        yield


def writes_dtypes(gm: fx.GraphModule) -> bool:
    """Whether a float dtype below float64 may be written down somewhere, so that `float64_mode` is needed."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            home = type(gm.get_submodule(str(node.target))).__module__
            if not home.startswith(("torch.nn.", "srfx.nn.")):
                return True
        dtypes = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, torch.dtype)]
        if any(d in _LOW for d in dtypes) or node.target in ("float", "half", "bfloat16", "type"):
            return True
    return False
