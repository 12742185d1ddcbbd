"""Movement in every spelling: channels are followed, positions rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 4, 6)
OTHER = (torch.randn(3, 3, 8, 2),)
Op = Callable[[Any], Any]


def same(op: Op) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """``op`` gives back a map of eight channels; three of them are constant in front of it."""
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7])
    return model, {"front.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)}


SAME: dict[str, Op] = {
    "copies": lambda x: x.contiguous().clone().detach() + x.to(x.dtype).float().to(x),
    "permute": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "permute function": lambda x: torch.permute(x, (0, 2, 3, 1)).permute((0, 3, 1, 2)),
    "transpose": lambda x: x.transpose(1, 3).transpose(-1, 1),
    "transpose function": lambda x: torch.transpose(x, 1, 2).swapaxes(1, 2),
    "swapdims": lambda x: torch.swapdims(x.swapdims(0, 1), 0, 1),
    "movedim": lambda x: torch.movedim(x.movedim(1, -1), -1, 1),
    "movedim of several": lambda x: torch.moveaxis(x, (1, 2), (2, 1)).movedim((1, 2), (2, 1)),
    "squeeze and unsqueeze": lambda x: torch.squeeze(x.unsqueeze(1), 1).unsqueeze(-1).squeeze(-1),
    "squeeze of several": lambda x: x[:, None, ..., None].squeeze((1, -1)),
    "flip space": lambda x: x.flip(2, 3),
    "flip channels twice": lambda x: torch.flip(x.flip(1), (1,)),
    "fliplr twice": lambda x: torch.fliplr(torch.fliplr(x)),
    "roll space": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "roll channels": lambda x: x.roll(2, 1).roll(-2, 1),
    "view": lambda x: x.view(x.shape[0], 8, -1).view(x.shape[0], 8, x.size(2), x.size(3)),
    "reshape by sizes": lambda x: x.reshape(x.size(0), x.size(1), -1).reshape(x.shape),
    "flatten and unflatten": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(-1, 8, x.size(2), x.size(3)),
    "split of the channel axis": lambda x: x.view(-1, 2, 4, x.size(2), x.size(3)).flatten(1, 2),
    "view of a computed half": lambda x: x.view(x.size(0), x.size(1) // 2, 2, x.size(2), x.size(3)).view(
        x.shape
    ),
    "unflatten of channels": lambda x: x.unflatten(1, (4, 2)).flatten(1, 2),
    "merge with the batch": lambda x: x.reshape(-1, x.size(2), x.size(3)).reshape(
        -1, 8, x.size(2), x.size(3)
    ),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1, -1).mean(1),
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x,
    "broadcast_to": lambda x: x.amax((2, 3), keepdim=True).broadcast_to(x.shape) + x,
    "repeat space": lambda x: x.repeat(1, 1, 2, 1),
    "tile": lambda x: torch.tile(x, (1, 1, 1, 2)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "narrow space": lambda x: torch.narrow(x, 2, 1, 2),
    "slice space": lambda x: x[:, :, ::2, 1:],
    "ellipsis": lambda x: x[..., :-1],
    "none": lambda x: x[:, None][:, 0],
    "all channels": lambda x: x[:, :],
    "adjoint": lambda x: x.mT.relu().mT,
    "view_as": lambda x: x.flatten(2).view_as(x),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
}


@pytest.mark.parametrize("name", SAME)
def test_channels_pass(name: str) -> None:
    model, kept = same(SAME[name])
    found = check(model, (X,), others=[OTHER], kept=None)
    for outcome in found.values():
        assert Reason.UNKNOWN_OP not in outcome.reasons, outcome.refusals
    equal_halves = {"split of the channel axis": 6, "view of a computed half": 6, "unflatten of channels": 6}
    blocks = equal_halves.get(name)
    if blocks is None:
        check(model, (X,), kept=kept)
