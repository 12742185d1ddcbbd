"""What run_decompositions makes of every elementwise op loses what the op itself loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srfx.minimize import minimize
from tests.helpers import relative_error, shapes
from tests.srfx.ops.test_pointwise import (
    FUNCTIONS,
    KEPT,
    MODULES,
    PARTIAL,
    WITH_ARGUMENTS,
    Total,
    X,
    chunks,
    sandwich,
)

REPLACED: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.where(torch.isnan(x), 0.0, x),
    lambda x: torch.where(x > 1, x, 0.5),
    lambda x: x.masked_fill(torch.isinf(x), -1.0),
]


def stays(op: Any) -> bool:
    """What decomposes into something whose constants are not followed: a pair with the noise, and a choice of nan."""
    if isinstance(op, nn.Module):
        return isinstance(op, nn.RReLU)
    return bool({"rrelu", "xlogy"} & set(op.__code__.co_names)) if hasattr(op, "__code__") else False


OPS: list[list[Any]] = [
    *chunks([op for op in (*FUNCTIONS, *WITH_ARGUMENTS, *PARTIAL, *REPLACED) if not stays(op)]),
    *chunks([op for op in MODULES if not stays(op)], 8),
]


@pytest.mark.parametrize("ops", OPS)
def test_decomposed(ops: list[Any]) -> None:
    is_modules = all(isinstance(op, nn.Module) for op in ops)
    model, x = sandwich(nn.Sequential(*ops) if is_modules else Total(ops)).double(), X.double()
    small = minimize(torch.export.export(model, (x,)).run_decompositions().module(), (x,))
    assert {name: shapes(small)[name] for name in KEPT} == KEPT
    with torch.no_grad():
        assert relative_error(model(x), small(x)) < 1e-9
