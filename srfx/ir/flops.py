"""Count floating-point operations while a graph runs on fake tensors; nothing is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_MISFITS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of everything that runs under it, by the formulas of torch.utils.flop_counter.

    Unlike ``FlopCounterMode`` it keeps no table of modules, knows attention on the CPU, and an operand a
    formula does not expect (fewer key heads than query heads) costs its count, not the run.  1 MAC = 2 FLOP;
    elementwise ops count 0, as in torch.

    Example:
        >>> with FlopCounter() as counter:
        ...     _ = torch.zeros(2, 3) @ torch.zeros(3, 5)
        >>> counter.total
        60
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the op, then count it."""
        kwargs = kwargs or {}
        formula = _formula(func)
        if formula is None:
            if torch.is_inference_mode_enabled() and getattr(func, "namespace", "") == "aten":
                with (
                    self
                ):  # elsewhere torch has decomposed linear, matmul and their like before they come here
                    found = func.decompose(*args, **kwargs)
                if found is not NotImplemented:
                    return found
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        with contextlib.suppress(*_MISFITS):
            self.total += int(formula(*args, **kwargs, out_val=out))  # when it fails only a count is missing
        return out


def _formula(func: Any) -> Callable[..., int] | None:
    packet = getattr(func, "_overloadpacket", None)
    if packet in _ATTENTION:
        return _attention_flops
    found: Callable[..., int] | None = flop_registry.get(packet)
    return found


_ATTENTION = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Q [N, H, T, D], k [N, Hk, S, D], v [N, Hk, S, E]: scores and their product with v."""
    n, h, t, d = query.shape
    s, e = value.shape[-2:]
    return int(2 * n * h * t * s * (d + e))
