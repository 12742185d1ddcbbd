"""What a caller may have switched on around a call of ours, switched off for its duration."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

ONE_AT_A_TIME = threading.RLock()
"""Held by whoever changes what torch keeps for the whole process."""


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """No inference mode (its tensors could never train), no autocast, the default float dtype float32.

    One thread at a time: torch keeps the default dtype for the whole process, and torch.fx replaces
    ``nn.Module.__call__`` while it traces, under the feet of every other thread.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(ONE_AT_A_TIME)
        dtype = torch.get_default_dtype()
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", torch.accelerator.current_accelerator()):
            name = device if isinstance(device, str) or device is None else device.type
            if name is not None and torch.is_autocast_enabled(name):
                stack.enter_context(torch.autocast(name, enabled=False))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Layers of ``nn.TransformerEncoder`` compute what they compute while training: their fast path is off.

    The fast path writes zeros at padded positions, where the plain one has values; which of the two runs depends on
    whether gradients are recorded.
    """
    with ONE_AT_A_TIME:
        was = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(was)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Tensors made without a device come to life on the CPU, whatever the default device is."""
    if torch.get_default_device().type == "cpu":
        yield  # a device context costs time at every call
        return
    with torch.device("cpu"):
        yield
