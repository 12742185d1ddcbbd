"""What arithmetic and copies cost on a machine: measured once, kept in the user's cache, or given."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from srfx.ir.timing import best_s
from srfx.nn.selection import select, spread


@dataclass(frozen=True)
class MachineCosts:
    """Seconds that things take, as `srfx.minimize(..., ragged="auto")` weighs them; float32, warm.

    Attributes:
        call_s: one more call in the graph.
        mac_s: one multiplication and addition in a matrix product.
        conv_mac_s: the same in a convolution of small pictures.
        weight_s: one weight of a linear layer that is read, which counts where few positions share it.
        conv_weight_s: one weight of a convolution that is read, and laid out anew, for each call.
        byte_s: one byte read or written by an elementwise op.
        select_s: one byte selected by an index, along the axis where that takes longest.
        spread_s: one byte of a result that is spread by an index, likewise.

    The same numbers have to hold for a run that torch.compile made. So copies have the price of their worst layout
    (inductor puts the channels of pictures last, where a selection takes one number at a time).

    Example:
        >>> costs = MachineCosts(4e-6, 2e-11, 5e-11, 2e-10, 9e-10, 1e-10, 2e-9, 1e-9)
        >>> MachineCosts.from_json(costs.to_json()) == costs
        True
    """

    call_s: float
    mac_s: float
    conv_mac_s: float
    weight_s: float
    conv_weight_s: float
    byte_s: float
    select_s: float
    spread_s: float

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> MachineCosts:
        """What `to_json` wrote.

        Raises:
            ValueError: it is not that.
        """
        data = json.loads(text)
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"expected the numbers {sorted(names)}, got {text[:80]!r}")
        return cls(**{name: float(value) for name, value in data.items()})


def machine_costs(device: str = "cpu") -> MachineCosts:
    """The costs of this machine: from the cache, else measured (about a second) and put there.

    The file is ``$XDG_CACHE_HOME/srfx/machine-<key>.json`` (``~/.cache`` without that variable); the key tells
    processors, numbers of threads and versions of torch apart.  A file that cannot be read is measured again, one
    that cannot be written is left out.
    """
    path = _cache_path(device)
    with contextlib.suppress(OSError, ValueError):
        return MachineCosts.from_json(path.read_text())
    found = measure_costs(device)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(found.to_json())
        os.replace(name, path)
    return found


def _cache_path(device: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    parts = (
        "3",
        platform.machine(),
        place,
        device.split(":")[0],
        str(torch.get_num_threads()),
        torch.__version__,
    )
    return base / "srfx" / f"machine-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.json"


def measure_costs(device: str = "cpu") -> MachineCosts:
    """Measure the costs on this machine."""
    with torch.no_grad():
        small = torch.zeros(1, 8, device=device)
        a, b = torch.randn(512, 512, device=device), torch.randn(512, 512, device=device)
        plane, row = torch.randn(4, 256, 28, 28, device=device), torch.randn(4, 128, 512, device=device)
        picture, kernel = (
            torch.randn(1, 128, 14, 14, device=device),
            torch.randn(128, 128, 3, 3, device=device),
        )
        point, wide = torch.randn(1, 256, 2, 2, device=device), torch.randn(256, 256, 3, 3, device=device)
        vector, matrix = torch.randn(1, 1024, device=device), torch.randn(1024, 1024, device=device)
        some = _half(8, device)
        call_s = _best_s(lambda: small.index_select(1, some), device)
        return MachineCosts(
            call_s,
            _best_s(lambda: a @ b, device) / 512**3,
            _best_s(lambda: F.conv2d(picture, kernel, padding=1), device) / (128 * 128 * 9 * 14 * 14),
            _best_s(lambda: F.linear(vector, matrix), device) / matrix.numel(),
            _best_s(lambda: F.conv2d(point, wide, padding=1), device) / wide.numel(),
            _best_s(lambda: torch.relu(plane), device) / (2 * plane.numel() * 4),
            max(_select_s(plane, -3, device), _select_s(row, -1, device)),
            max(_spread_s(plane, -3, device), _spread_s(row, -1, device)),
        )


def _half(n: int, device: str) -> Tensor:
    """Half of n positions, ascending."""
    return (
        torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // 2].sort().values.int().to(device)
    )


def _select_s(x: Tensor, dim: int, device: str) -> float:
    index = _half(x.shape[dim], device)
    return _best_s(lambda: select(x, dim, index), device) / (x.numel() * 2)


def _spread_s(x: Tensor, dim: int, device: str) -> float:
    index = _half(x.shape[dim], device)
    part = x.index_select(dim, index)
    return _best_s(lambda: spread(part, dim, index, x.shape[dim]), device) / (x.numel() * 4)


def _best_s(run: Callable[[], object], device: str) -> float:
    return best_s([run], device, n_rounds=200, limit_s=0.15)[0]
