"""The outside of a file: safetensors, with a JSON document as one of its tensors and checksums over all of it.

A safetensors file is a length, a header in JSON and the bytes of the tensors.  The document stands among the tensors
as bytes, because a header may not grow over 100 MB.  Any reader of safetensors can open the file.

    metadata    format = pt, srfx = version of the form, sha256 = of the document
    tensors     __srfx__ (uint8): the document;   all others: as the document lists them, each with its sha256
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srfx.errors import DamagedFileError, FileError, NewerFileError
from srfx.files.atomic import replacing

VERSION = 1
"""Version of the form; a reader refuses newer ones."""

DOCUMENT = "__srfx__"

Fetch = Callable[[str, str], Tensor]
"""Gives the stored tensor of a name, after checking its digest."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def has_name(dtype: torch.dtype) -> bool:
    """Whether safetensors of every version stores this dtype."""
    return dtype in _NAMES


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the values of a contiguous tensor on the CPU."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def write(
    path: str | os.PathLike[str], document: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a document and the tensors it lists; the file at ``path`` is replaced at once or not at all.

    Args:
        path: where to; its folder has to exist.
        document: plain data.
        tensors: by name, dense and contiguous, of a dtype that `has_name`, in the order they shall have.

    Memory: one tensor at a time is copied.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    entries = [(name, tensor) for name, tensor in tensors]
    # Alignment: readers map the file, and a tensor has to start at a multiple of its item size.
    entries.sort(key=lambda entry: -entry[1].dtype.itemsize)
    entries.append((DOCUMENT, torch.frombuffer(bytearray(text), dtype=torch.uint8)))
    metadata = {"format": "pt", "srfx": str(VERSION), "sha256": hashlib.sha256(text).hexdigest()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in entries:
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for _, tensor in entries:
            file.write(_bytes(tensor.cpu()))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Fetch]:
    """The document of a file, and a function that gives the tensor of a name after checking its digest.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: cut short, or not what was written.
        NewerFileError: of a newer version.
        FileError: no safetensors file, or none that `write` wrote.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; srfx.save writes one file")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        opened: Any = safe_open(str(path), framework="pt")
        metadata = opened.metadata() or {}
        names = set(opened.keys())
    except SafetensorError as error:
        raise _not_safetensors(path, error) from error
    if "srfx" not in metadata:
        raise FileError(
            f"{path} is a safetensors file, but not one of srfx.save: its weights are for the original model"
        )
    version = metadata["srfx"]
    if version != str(VERSION):
        if version.isdecimal() and int(version) > VERSION:
            raise NewerFileError(
                f"{path} has form {version}, this srfx reads up to {VERSION}: install a newer one"
            )
        raise DamagedFileError(f"{path} is damaged: its version reads {version!r}")

    def tensor(name: str, digest: str) -> Tensor:
        if name not in names:
            raise DamagedFileError(f"{path} is damaged: the tensor {name!r} is missing")
        try:
            found: Tensor = opened.get_tensor(name).clone()  # memory of its own, not the mapped file
        except SafetensorError as error:
            raise DamagedFileError(f"{path} is damaged: {name!r} cannot be read ({error})") from error
        if tensor_digest(found) != digest:
            raise DamagedFileError(
                f"{path} is damaged: the bytes of {name!r} are not those that were written"
            )
        return found

    text = _bytes(tensor(DOCUMENT, metadata.get("sha256", "")))
    document = json.loads(text)
    assert isinstance(document, dict)
    return document, tensor


def _not_safetensors(path: Path, error: SafetensorError) -> FileError:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if b'"srfx":"' in head:  # our header, or what is left of it
        return DamagedFileError(f"{path} is damaged or was cut short ({error})")
    what = (
        "a zip archive, as torch.save and torch.export.save write"
        if head[:2] == b"PK"
        else "no safetensors file"
    )
    return FileError(f"{path} is no file of srfx.save: it is {what} ({error})")


def _bytes(tensor: Tensor) -> bytes:
    assert tensor.is_contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
