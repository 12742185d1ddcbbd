"""The tensors of a model as entries of a file: ties, shared memory, strides and devices come back as they were."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from srfx.errors import DamagedFileError, FileError, UnsavableError
from srfx.files.container import Fetch, has_name, tensor_digest


class TensorWriter:
    """Names the tensors of a model and prepares them for the file.

    A tensor that has its memory to itself is stored under its own name and shape.  Tensors that share memory (one is
    a view of the other) are stored as that memory, once, in bytes.

    Args:
        every: all tensors that will be asked for.
    """

    def __init__(self, every: Iterable[Tensor]) -> None:
        distinct = {id(t): t for t in every}
        self.n_users = Counter(_memory(t) for t in distinct.values())
        self.table: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, Tensor] = {}
        self.known: dict[int, str] = {}
        self.memories: dict[int, str] = {}

    def key(self, tensor: Tensor, name: str) -> str:
        """The key of a tensor in the table; ``name`` is where it was met first.

        Raises:
            UnsavableError: it has no values, or is no plain dense tensor.
        """
        if id(tensor) not in self.known:
            _check(tensor, name)
            self.known[id(tensor)] = name
            self.table[name] = self._entry(tensor, name)
        return self.known[id(tensor)]

    def _entry(self, tensor: Tensor, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "device": str(tensor.device),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }
        plain = tensor.detach()
        if self.n_users[_memory(tensor)] > 1:
            entry |= {"stride": list(tensor.stride()), "offset": tensor.storage_offset()}
            return entry | {"memory": self._memory(plain, name)}
        if not plain.is_contiguous():
            entry["stride"] = list(plain.stride())
            for axis, step in enumerate(plain.stride()):
                if step == 0:  # expanded: one slice says it all
                    plain = plain.narrow(axis, 0, min(1, plain.shape[axis]))
        return entry | self._store(plain.contiguous(), name)

    def _memory(self, tensor: Tensor, name: str) -> dict[str, Any]:
        address = _memory(tensor)
        if address not in self.memories:
            self.memories[address] = f"{name}.memory"
            storage = tensor.untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            return self._store(flat, self.memories[address])
        known = self.memories[address]
        return next(e["memory"] for e in self.table.values() if e.get("memory", {}).get("stored") == known)

    def _store(self, tensor: Tensor, name: str) -> dict[str, Any]:
        plain = tensor if has_name(tensor.dtype) else tensor.reshape(-1).view(torch.uint8)
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        self.stored[name] = plain
        return {"stored": name, "sha256": tensor_digest(plain.cpu())}


class TensorReader:
    """Gives the tensors of a file, each made once.

    Args:
        table: what `TensorWriter` listed.
        fetch: the stored tensor of a name and digest.
        device: where to put them; None is where they were.
    """

    def __init__(self, table: dict[str, dict[str, Any]], fetch: Fetch, device: torch.device | None) -> None:
        self.table = table
        self.fetch = fetch
        self.device = device
        self.made: dict[str, Tensor] = {}
        self.memories: dict[str, Tensor] = {}

    def __call__(self, key: str) -> Tensor:
        """The tensor of a key.

        Raises:
            DamagedFileError: the file does not hold it, or not in the listed form.
            FileError: the device it was on does not exist here.
        """
        if key not in self.made:
            if key not in self.table:
                raise DamagedFileError(f"the file is damaged: no tensor {key!r} is listed")
            try:
                self.made[key] = self._make(key, self.table[key])
            except (RuntimeError, AssertionError) as error:  # torch says so when there is no such device
                raise FileError(
                    f"the tensor {key!r} cannot be made ({error}); load(..., device='cpu')?"
                ) from error
        return self.made[key]

    def _make(self, key: str, entry: dict[str, Any]) -> Tensor:
        dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
        stride: tuple[int, ...] | None = tuple(entry["stride"]) if "stride" in entry else None
        if not isinstance(dtype, torch.dtype):
            raise DamagedFileError(f"the file is damaged: {key!r} has dtype {entry['dtype']!r}")
        device = torch.device(entry["device"]) if self.device is None else self.device
        if "memory" in entry:
            new = torch.empty(0, dtype=dtype, device=device)
            memory = self._shared(entry["memory"], device)
            new.set_(memory.untyped_storage(), entry["offset"], shape, tuple(entry["stride"]))
        else:
            new = self._own(key, entry, dtype, shape, stride).to(device)
        return (
            nn.Parameter(new, entry["requires_grad"])
            if entry["parameter"]
            else new.requires_grad_(entry["requires_grad"])
        )

    def _own(
        self,
        key: str,
        entry: dict[str, Any],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None,
    ) -> Tensor:
        steps = stride if stride is not None else (1,) * len(shape)
        held = tuple(min(1, n) if step == 0 else n for n, step in zip(shape, steps, strict=True))
        found = self.fetch(entry["stored"], entry["sha256"])
        if found.dtype != dtype:
            if found.element_size() * math.prod(found.shape) != dtype.itemsize * math.prod(held):
                raise DamagedFileError(
                    f"the file is damaged: {key!r} is {_plain(found.dtype)} in the file, listed as {_plain(dtype)}"
                )
            found = found.view(dtype).reshape(held)
        if tuple(found.shape) != held:
            raise DamagedFileError(
                f"the file is damaged: {key!r} is {list(found.shape)}, should be {list(held)}"
            )
        if stride is None:
            return found
        if held != shape:
            return found.expand(shape)
        if not _is_dense(shape, stride):
            return found
        return torch.empty_strided(shape, stride, dtype=dtype).copy_(found)

    def _shared(self, memory: dict[str, Any], device: torch.device) -> Tensor:
        name = memory["stored"]
        if name not in self.memories:
            self.memories[name] = self.fetch(name, memory["sha256"]).to(device)
        return self.memories[name]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(tensor: Tensor, name: str) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UnsavableError(f"{name} is a {type(tensor).__name__}; only plain tensors can be saved")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsavableError(
            f"{name} is {tensor.layout}, quantized {tensor.is_quantized}; only dense ones can be saved"
        )
    if tensor.is_meta:
        raise UnsavableError(f"{name} has no values (device meta)")


def _memory(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return -id(tensor)
    return tensor.untyped_storage().data_ptr()


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill their memory without gaps, in some order of the axes."""
    expected = 1
    for step, n in sorted((step, n) for step, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return math.prod(shape) > 0
