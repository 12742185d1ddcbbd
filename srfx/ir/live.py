"""The tensors that train, by the names that the graph has for them."""

from __future__ import annotations

from torch import Tensor, nn

from srfx.errors import ShapeMismatchError
from srfx.ir.attrs import split_path
from srfx.ir.capture import unwrap


def effective_name(name: str) -> str:
    """The name of the tensor that a pruning hook or a parametrization computes from the parameter ``name``."""
    head, found, tail = name.rpartition("parametrizations.")
    if found:
        return head + tail.split(".")[0]
    return name.removesuffix("_orig")


def live_tensor(model: nn.Module, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The parameter as the forward pass uses it: masked where a pruning hook masks it, whole where it is sharded.

    Args:
        model: may be wrapped (DistributedDataParallel, torch.compile).
        name: without the suffix of a hook.
        shape: sizes to check; 1 fits any.

    Raises:
        ShapeMismatchError: there is no such tensor, or it has another shape.
    """
    path, last = split_path(name)
    try:
        found = _effective(unwrap(model).get_submodule(path), last)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise ShapeMismatchError(f"the model has no parameter {name!r}; was it made for another model?")
    if hasattr(found, "full_tensor"):  # a DTensor: gathered, and its gradient scattered again
        found = found.full_tensor()
    got = tuple(found.shape)
    if shape is not None and (
        len(got) != len(shape) or any(n not in (1, m) for n, m in zip(shape, got, strict=True))
    ):
        raise ShapeMismatchError(
            f"{name} is {list(got)}, expected {['any' if n == 1 else n for n in shape]}: make the penalty again "
            "after the model was minimized"
        )
    return found


def _effective(module: nn.Module, name: str) -> object:
    """The parameter itself, what its pruning hook makes of it, or what a parametrization computes."""
    if module._parameters.get(name) is not None:
        return module._parameters[name]
    source, mask = module._parameters.get(name + "_orig"), module._buffers.get(name + "_mask")
    if source is not None and mask is not None:
        return source * mask
    return getattr(module, name)
