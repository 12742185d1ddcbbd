"""FLOPs of a graph on fake tensors are those that torch counts on real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from srfx.ir.flops import FlopCounter
from srfx.ir.shapes import survey


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(7, 5), (3, 7)),
        (nn.Linear(7, 5), (2, 3, 7)),
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False), (2, 4, 9, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(81, 4)), (2, 2, 5, 5, 5)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_like_torch(model: nn.Module, shape: tuple[int, ...], inference: bool) -> None:
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as wanted:
        model(x)
    with torch.inference_mode(inference), FlopCounter() as counter:
        model(x)
    assert counter.total == wanted.get_total_flops() > 0
    assert sum(survey(fx.symbolic_trace(nn.Sequential(model)), [x]).flops.values()) == counter.total


def attend(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k)


def attend_grouped(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], k[:, :1], enable_gqa=True)


@pytest.mark.parametrize("function", [attend, attend_grouped])
def test_attention_on_the_cpu_counts(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with torch.no_grad(), FlopCounter() as counter:
        function(q, k)
    assert counter.total == 2 * 2 * (2 * 3 * 5 * 7 * 8)


def test_by_node() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)))
    found = {node.name: n for node, n in survey(gm, [torch.zeros(2, 3)]).flops.items()}
    assert found == {"_0": 48, "_2": 80}
