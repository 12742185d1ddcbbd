"""Views, permutations, slices and copies: channels are followed through them, sizes and positions rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class Rows(nn.Module):
    """back(op(front(x))) where ``op`` picks ``n`` of eight channels."""

    def __init__(self, op: Op, n: int) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(n, 4, 1)
        self.op = op
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.op(self.front(x)))


INDEX = torch.tensor([6, 1, 1, 3])
PICKS: dict[str, tuple[Op, list[int]]] = {
    "slice": (lambda x: x[:, 2:6], [2, 3, 4, 5]),
    "slice from the end": (lambda x: x[:, -5:-1], [3, 4, 5, 6]),
    "stride": (lambda x: x[:, ::2], [0, 2, 4, 6]),
    "stride and offset": (lambda x: x[:, 1::3], [1, 4, 7]),
    "half": (lambda x: x[:, : x.size(1) // 2], [0, 1, 2, 3]),
    "other half": (lambda x: x[:, x.shape[1] // 2 :], [4, 5, 6, 7]),
    "narrow": (lambda x: x.narrow(1, 3, 4), [3, 4, 5, 6]),
    "torch.narrow": (lambda x: torch.narrow(x, 1, 0, 4), [0, 1, 2, 3]),
    "flip": (lambda x: x.flip(1)[:, :3], [7, 6, 5]),
    "roll": (lambda x: x.roll(3, 1)[:, :4], [5, 6, 7, 0]),
    "pair of slices": (lambda x: torch.cat([x[:, :2], x[:, 5:]], 1), [0, 1, 5, 6, 7]),
    "select": (lambda x: x[:, 5].unsqueeze(1), [5]),
    "select method": (lambda x: x.select(1, -3).unsqueeze(1), [5]),
    "select two": (lambda x: torch.stack([x[:, 5], torch.select(x, 1, 2)], 1), [5, 2]),
    "step in the last axes": (lambda x: x[:, 2:6, ::2, :], [2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", PICKS)
@pytest.mark.parametrize("dead", [[], [2, 5], [0, 3, 4], [1, 6, 7]])
def test_picks(name: str, dead: list[int]) -> None:
    """Channels nobody picks go; constants among the picked ones are folded."""
    op, picked = PICKS[name]
    model = Rows(op, len(picked))
    kill(model.front, dead)
    kept = [c for c in dict.fromkeys(picked) if c not in dead]
    if (name == "select two" and len(kept) < 2) or not kept:  # a selected position has to be there
        check(model, (X,), others=[OTHER])
        return
    check(model, (X,), others=[OTHER], kept={"front.weight": (len(kept), 3, 1, 1)})


class Buffered(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("index", INDEX)
        self.spelling = spelling
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x)
        picked = {
            "function": lambda: torch.index_select(y, 1, self.index),
            "method": lambda: y.index_select(1, self.index),
            "getitem": lambda: y[:, self.index],
        }[self.spelling]()
        return self.back(picked)


@pytest.mark.parametrize("spelling", ["function", "method", "getitem"])
def test_constant_index(spelling: str) -> None:
    """Positions 6, 1, 1, 3: five of the channels are read by nobody."""
    model = Buffered(spelling)
    check(model, (X,), others=[OTHER], kept={"front.weight": (3, 3, 1, 1), "back.weight": (4, 4, 1, 1)})
    kill(model.front, [1])
    check(model, (X,), others=[OTHER], kept={"front.weight": (2, 3, 1, 1), "back.weight": (4, 2, 1, 1)})


def test_index_that_depends_on_the_input_keeps_the_axis() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(3, 6), nn.Linear(1, 2)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.back(torch.index_select(self.front(x), 1, index).mean(1, keepdim=True))

    model = randomized(Chosen())
    kill(model.front, [0, 1])
    inputs = (torch.randn(4, 3), torch.tensor([3, 1]))
    check(model, inputs, kept={"front.weight": (6, 3)}, reasons=[Reason.DATA_DEPENDENT], routes=["symbolic"])


# ---------------------------------------------------------------------------------------- flatten
class Classifier(nn.Module):
    """features -> pool -> flatten -> linear, each channel standing for h * w columns."""

    def __init__(self, flatten: Op | nn.Module, pool: int = 2, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if batch_norm else nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.fc = nn.Linear(6 * pool * pool, 5)
        if isinstance(flatten, nn.Module):
            self.flatten: Any = flatten
        else:
            object.__setattr__(self, "flatten", flatten)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.features(x))))


FLATTENS: dict[str, Op | nn.Module] = {
    "module": nn.Flatten(),
    "torch": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "literal": lambda x: x.view(-1, 24),
    "sizes": lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)),
    "twice": lambda x: x.flatten(2).flatten(1),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_flatten_after_pooling(name: str) -> None:
    model = Classifier(FLATTENS[name])
    kill(model.features[0], [1, 4])
    kept = {"features.0.weight": (4, 3, 3, 3), "fc.weight": (5, 16)}
    check(model, (X,), others=[(torch.randn(2, 3, 7, 9),)], kept=kept)


def test_flatten_keeps_a_channel_of_which_one_position_is_read() -> None:
    model = Classifier(nn.Flatten())
    kill(model.fc, columns=[4, 5, 6])  # position 3 of channel 1 is read still
    check(model, (X,), kept={"fc.weight": (5, 24)})
    kill(model.fc, columns=[7])
    check(model, (X,), kept={"features.0.weight": (5, 3, 3, 3), "fc.weight": (5, 20)})


def test_flatten_without_pooling_keeps_the_picture_size() -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 20, 3))
    )
    kill(model[0], [2])
    check(model, (torch.randn(2, 1, 4, 5),), kept={"0.weight": (3, 1, 3, 3), "3.weight": (3, 60)})


# ---------------------------------------------------------------------------------------- blocks
def heads(x: Tensor) -> Tensor:
    """[N, T, 12] as three heads of four; attention with itself."""
    n, t = x.shape[0], x.shape[1]
    q = x.view(n, t, 3, 4).transpose(1, 2)
    return (torch.softmax(q @ q.transpose(-2, -1), -1) @ q).transpose(1, 2).reshape(n, t, 12)


@pytest.mark.parametrize("dead", [[4, 5, 6, 7], [0, 5, 10], [0, 1, 5], [0, 4, 5, 6, 7, 11]])
def test_heads_stay_rectangular(dead: list[int]) -> None:
    model = randomized(Sandwich(nn.Linear(3, 12), heads, nn.Linear(12, 2)))
    kill(model.front, dead, bias=True)
    check(model, (torch.randn(2, 5, 3),), others=[(torch.randn(2, 7, 3),)])


def test_a_view_of_a_block_revives_to_equal_counts() -> None:
    """Eight channels as two rows of four; dead 0 and 3 in one row, 7 in the other: 3 lanes stay in each."""
    model, _ = same(lambda x: x.view(-1, 2, 4, x.size(2), x.size(3)).transpose(1, 2).sum(1))
    model.back = randomized(nn.Conv2d(2, 4, 1))
    check(model, (X,), others=[OTHER])


@pytest.mark.parametrize(("dead", "n_kept"), [([0, 1, 2, 3, 4, 5], 1), ([1, 2, 4, 5], 2), ([0, 3], 4)])
def test_a_view_of_copies_has_as_many_rows_as_its_lanes_ask_for(dead: list[int], n_kept: int) -> None:
    """Six channels, twice, as four rows of three: rows 0 and 2 are one row, and a lane of it keeps both."""

    def twice(x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return torch.cat([x, x], 1).view(n, 4, 3, h, w).transpose(1, 2).reshape(n, -1, h, w)

    model = randomized(Sandwich(nn.Conv2d(3, 6, 1, bias=False), twice, nn.Identity()))
    kill(model.front, dead)
    check(model, (X,), others=[OTHER], kept={"front.weight": (n_kept, 3, 1, 1)})


def test_what_only_lends_its_batch_keeps_a_channel() -> None:
    """A norm whose result is read by nothing but ``shape[0]`` still runs, and so it has a width."""

    class Lent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.norm = nn.RNNCell(3, 6), nn.LayerNorm(6)
            self.token, self.back = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.cell(x))
            return self.back(self.token.repeat(y.shape[0], 1))

    model = randomized(Lent())
    check(model, (torch.randn(2, 3),), others=[(torch.randn(5, 3),)], idempotent=False)
