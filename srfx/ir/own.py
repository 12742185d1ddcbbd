"""Give a graph tensors of its own, so that training it never touches the model it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, fx, nn

from srfx.ir.clone import clone_structure


def storages(modules: Iterable[nn.Module]) -> set[int]:
    """Addresses of the storages of all tensors that the modules hold as parameters, buffers or attributes."""
    return {_address(t) for module in modules for t in _tensors(module)}


def own_tensors(gm: fx.GraphModule, foreign: set[int]) -> fx.GraphModule:
    """A clone of the graph module whose tensors share no storage with ``foreign``; the others are taken over.

    Ties stay ties, views of one storage stay views of one storage, and shapes, strides, Parameter-ness and
    requires_grad stay as they are; gradients are not carried over.

    Args:
        gm: the graph module; not changed.
        foreign: what `storages` found in the model that must not be shared.
    """
    uses = Counter(address for address, _ in {(_address(t), id(t)) for t in _tensors(gm)})
    copies: dict[int, torch.UntypedStorage] = {}

    def owned(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in foreign:
            return tensor
        if uses[address] > 1 and tensor.layout is torch.strided:
            if address not in copies:
                copies[address] = tensor.untyped_storage().clone()
            new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            new.set_(copies[address], tensor.storage_offset(), tensor.shape, tensor.stride())
        else:
            new = tensor.detach().clone()  # keeps the strides of a dense tensor (channels last)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(new, tensor.requires_grad)
        return new.requires_grad_(tensor.requires_grad)

    return cast(fx.GraphModule, clone_structure(gm, owned))


def _tensors(root: nn.Module) -> Iterable[Tensor]:
    for module in root.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            yield from (t for t in store.values() if isinstance(t, Tensor))


def _address(tensor: Tensor) -> int:
    """Of the storage; of the tensor object where there is no storage to compare (sparse, meta)."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return -id(tensor)
    return tensor.untyped_storage().data_ptr()
