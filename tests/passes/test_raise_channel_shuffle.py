"""Channel shuffles spelled by views: what is matched, what is left, and what minimize makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.passes import get_pass
from tests.helpers import Sandwich, assert_equivalent, check, kill, randomized

X = torch.randn(2, 3, 4, 6)
OTHER = (torch.randn(3, 3, 8, 2),)
Op = Callable[[Any], Any]


def view_shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


SHUFFLES: dict[str, Op] = {
    "torchvision": view_shuffle,
    "flatten": lambda x: x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2),
    "permute": lambda x: x.reshape(-1, 2, 4, x.size(2), x.size(3)).permute(0, 2, 1, 3, 4).reshape(x.shape),
    "minus one": lambda x: x.view(x.size(0), 2, -1, x.size(2), x.size(3)).transpose(2, 1).reshape_as(x),
    "unflatten": lambda x: x.unflatten(1, (2, 4)).swapaxes(1, 2).flatten(1, 2),
    "merged picture": lambda x: x.view(x.size(0), 4, 2, -1).permute(0, 2, 1, 3).contiguous().view(x.shape),
}


def model_of(op: Op) -> nn.Module:
    return randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(8, 4, 1))).double()


def raised(model: nn.Module) -> Any:
    gm = capture(fx.symbolic_trace(model), (X.double(),)).graph_module
    return get_pass("raise-channel-shuffle", hints=[X.double()])(gm)


@pytest.mark.parametrize("name", SHUFFLES)
def test_hit(name: str) -> None:
    model = model_of(SHUFFLES[name])
    done = raised(model)
    assert [e.groups for e in done.edits] == [4 if name == "merged picture" else 2]
    assert_equivalent(model, done.graph_module, (OTHER[0].double(),))
    again = get_pass("raise-channel-shuffle", hints=[X.double()])(done.graph_module)
    assert not again.modified


@pytest.mark.parametrize("name", SHUFFLES)
def test_every_channel_goes_by_itself(name: str) -> None:
    model = model_of(SHUFFLES[name])
    kill(model.front, [0, 3, 6])
    check(model, (X,), others=[OTHER], kept={"front.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)})


def test_without_dead_channels_no_index_is_made() -> None:
    small = check(model_of(view_shuffle), (X,), others=[OTHER])["symbolic"].small
    assert not list(small.named_buffers())
    assert not any(n.target is torch.index_select for n in small.graph.nodes)


NEAR: dict[str, Op] = {
    "identity": lambda x: x.view(x.size(0), 2, 4, x.size(2), x.size(3)).reshape(x.shape),
    "picture too": lambda x: x.view(x.size(0), 2, 4, 6, 4).transpose(1, 2).reshape(x.shape).transpose(2, 3),
    "read in between": lambda x: (
        view_shuffle(x) + x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).sum()
    ),
    "no way back": lambda x: (
        x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).relu().flatten(1, 2)
    ),
}


def test_near_misses() -> None:
    assert not raised(model_of(NEAR["identity"])).modified
    assert not raised(model_of(NEAR["no way back"])).modified
    for name in NEAR:
        model = model_of(NEAR[name])
        kill(model.front, [0, 3, 6])
        if name != "picture too":
            check(model, (X,), others=[OTHER])


def test_refuses_another_permutation() -> None:
    def three(x: Tensor) -> Tensor:
        return x.view(x.size(0), 2, 2, 2, x.size(2), x.size(3)).permute(0, 3, 2, 1, 4, 5).reshape(x.shape)

    done = raised(model_of(three))
    assert not done.modified
    assert [r.reason for r in done.refusals] == [Reason.CHANNEL_MIXING]


def test_a_chain_on_the_input_is_left() -> None:
    class Front(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 2, 4, x.size(2), x.size(3)).transpose(1, 2).reshape(x.shape)

    gm = capture(fx.symbolic_trace(Front()), (torch.randn(2, 8, 3, 3),)).graph_module
    assert not get_pass("raise-channel-shuffle", hints=[torch.randn(2, 8, 3, 3)])(gm).modified


def test_indexing_by_a_computed_tensor_is_no_step() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.front(x)[x.sum((1, 2, 3)).argsort()])

    x = X.double()
    model = randomized(Sorted()).double()
    for traced in (fx.symbolic_trace(model), torch.export.export(model, (x,), strict=False).module()):
        gm = capture(traced, (x,)).graph_module
        assert not get_pass("raise-channel-shuffle", hints=[x])(gm).modified


def test_two_shuffles_in_a_row() -> None:
    """The second reads what replaces the first: it waits for the next round."""
    model = model_of(lambda x: view_shuffle(view_shuffle(x)))
    kill(model.front, [1, 4], bias=True)
    check(model, (X,), others=[OTHER], kept={"front.weight": (6, 3, 1, 1), "back.weight": (4, 6, 1, 1)})
