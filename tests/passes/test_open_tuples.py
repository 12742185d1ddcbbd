"""A tuple of pieces that is joined again becomes a list, and the pieces lose what they lose in a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srfx.ir.plan import Reason
from srfx.passes.open_tuples import OpenTuples
from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 4, 4)
JOINED: dict[str, tuple[Callable[[Any], Any], int]] = {
    "split backwards": (lambda x: torch.cat(torch.split(x, [3, 5], 1)[::-1], 1), 8),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1), 1), 8),
    "keyword": (lambda x: torch.cat(tensors=x.chunk(4, 1)[1:], dim=1), 6),
    "slice of a slice": (lambda x: torch.cat(x.split(2, 1)[::-1][:3][1:], dim=1), 4),
}


def model_of(op: Callable[[Any], Any], width: int) -> nn.Module:
    return randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(width, 4, 1)))


@pytest.mark.parametrize("name", JOINED)
def test_pieces_lose_channels(name: str) -> None:
    op, width = JOINED[name]
    model = model_of(op, width)
    kill(model.get_submodule("front"), rows=[1, 5])
    x = torch.arange(8.0).view(1, 8, 1, 1)
    left = [int(c) for c in op(x).flatten() if int(c) not in (1, 5)]
    check(model, (X,), kept={"front.weight": (len(set(left)), 3, 1, 1), "back.weight": (4, len(left), 1, 1)})


@pytest.mark.parametrize("name", JOINED)
def test_has_a_fixpoint(name: str) -> None:
    traced = fx.symbolic_trace(model_of(*JOINED[name]))
    assert OpenTuples([X])(traced).modified
    assert not OpenTuples([X])(traced).modified
    assert not [n for n in traced.graph.nodes if any(isinstance(a, slice) for a in n.args)]


def test_as_many_pieces_as_examples_stay_a_tuple() -> None:
    def op(x: Tensor) -> Tensor:
        return torch.cat(x.split(1, 0), 1).view(-1, 8, 4, 4)

    traced = fx.symbolic_trace(model_of(op, 8))
    done = OpenTuples([X])(traced)
    assert not done.modified
    assert [r.reason for r in done.refusals] == [Reason.DATA_DEPENDENT]


def test_other_tuples_are_left_alone() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor, parts: Any) -> Tensor:
            return torch.cat(parts, 1).sum() + x

    assert not OpenTuples([X, (X, X)])(fx.symbolic_trace(Sizes())).modified
