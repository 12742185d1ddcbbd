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
    found = whole(found)
    got = tuple(found.shape)
    if shape is not None and (
        len(got) != len(shape) or any(n not in (1, m) for n, m in zip(shape, got, strict=True))
    ):
        raise ShapeMismatchError(
            f"{name} is {list(got)}, expected {['any' if n == 1 else n for n in shape]}: make the penalty again "
            "after the model was minimized"
        )
    return found


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter object of this name in the module inside all wrappers.

    Raises:
        ShapeMismatchError: there is none.
    """
    try:
        return unwrap(model).get_parameter(name)
    except AttributeError as error:
        raise ShapeMismatchError(
            f"the model has no parameter {name!r}; was it made for another model?"
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, a DTensor gathered (its gradient is scattered again)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor laid out like another one: sharded the same way if that is a DTensor."""
    if not hasattr(model, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # may be missing from a build of torch

    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)  # type: ignore[attr-defined]


def add_to_gradient(p: nn.Parameter, more: Tensor) -> None:
    """Add a whole tensor to the gradient of a parameter, in place."""
    assert p.grad is not None
    p.grad.add_(like(more, p.grad).to(p.grad.dtype))


def _effective(module: nn.Module, name: str) -> object:
    """The parameter itself, what its pruning hook makes of it, or what a parametrization computes."""
    if module._parameters.get(name) is not None:
        return module._parameters[name]
    source, mask = module._parameters.get(name + "_orig"), module._buffers.get(name + "_mask")
    if source is not None and mask is not None:
        return source * mask
    return getattr(module, name)
