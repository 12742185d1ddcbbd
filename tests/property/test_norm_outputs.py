"""Random stacks whose norms are read in part: what comes out is exact, and has the widths of theory's Lemmas N6 to N8."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srfx.analysis.solver import WEIGHTS_PER_CHANNEL
from tests.helpers import check, kill, randomized

N_TOKENS, N_IN, N_SIDE = 2, 5, 3


@dataclass(frozen=True)
class Block:
    """One norm, the channels that its readers skip, and what reads beside the wide layer."""

    norm: str
    rows: int
    skipped: tuple[frozenset[int], frozenset[int]]
    side: str


@dataclass(frozen=True)
class Stack:
    """A stream, its constant channels and whether these are 0, and the blocks that read it."""

    width: int
    constants: frozenset[int]
    are_zeros: bool
    blocks: tuple[Block, ...]
    seed: int
    route: str


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    width = draw(st.integers(8, 18))
    some = st.frozensets(st.integers(0, width - 1), max_size=width - 3)
    few = st.frozensets(st.integers(0, width - 1), max_size=width // 3)
    block = st.builds(
        Block,
        st.sampled_from(("layer", "layer_plain", "rms")),
        st.sampled_from((4, 40, 70)),
        st.tuples(some, some),
        st.sampled_from(("layer", "product", "none")),
    )
    blocks = draw(st.lists(block, min_size=1, max_size=2))
    seed, route = draw(st.integers(0, 10_000)), draw(st.sampled_from(("symbolic", "export")))
    return Stack(width, draw(few), draw(st.booleans()), tuple(blocks), seed, route)


class Part(nn.Module):
    """x + down(gelu(up(y))) of a norm's result y, and a number that a second reader makes of y."""

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.norm = {
            "layer": lambda: nn.LayerNorm(width),
            "layer_plain": lambda: nn.LayerNorm(width, elementwise_affine=False),
            "rms": lambda: nn.RMSNorm(width, eps=1e-6),
        }[block.norm]()
        self.up, self.down, self.kind = nn.Linear(width, block.rows), nn.Linear(block.rows, width), block.side
        self.side = nn.Linear(width, N_SIDE) if block.side == "layer" else None
        self.product = nn.Parameter(torch.ones(width, N_SIDE)) if block.side == "product" else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        x = x + self.down(F.gelu(self.up(y)))
        if self.side is not None:
            return x, self.side(y).sum()
        return x, y.new_zeros(()) if self.product is None else (y @ self.product).sum()


class Network(nn.Module):
    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(N_IN, stack.width), nn.Linear(stack.width, N_SIDE)
        self.parts = nn.ModuleList(Part(b, stack.width) for b in stack.blocks)
        randomized(self, stack.seed)
        gone = sorted(stack.constants)
        for part, block in zip(self.parts, stack.blocks, strict=True):
            kill(part.up, columns=block.skipped[0])
            kill(part.down, rows=gone, bias=stack.are_zeros)
            if part.side is not None:
                kill(part.side, columns=block.skipped[1])
            if part.product is not None:  # it has no bias for constants, and would keep those that it reads
                with torch.no_grad():
                    part.product[sorted(block.skipped[1] | stack.constants)] = 0
        kill(self.stem, rows=gone, bias=stack.are_zeros)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, numbers = self.stem(x), []
        for part in self.parts:
            x, found = part(x)
            numbers.append(found)
        return self.head(x), numbers


def widths(stack: Stack) -> dict[str, tuple[int, ...]]:
    """The shapes that the lemmas promise."""
    gone = stack.constants
    n_stream = stack.width - len(gone)
    wanted: dict[str, tuple[int, ...]] = {"stem.weight": (n_stream, N_IN), "head.weight": (N_SIDE, n_stream)}
    for i, block in enumerate(stack.blocks):
        up, side = (set(range(stack.width)) - skipped for skipped in block.skipped)
        side = {"layer": side, "product": side - gone, "none": set[int]()}[block.side]
        read = up | side
        n_gone, is_centred = len(read & gone), block.norm != "rms"
        n_statistics = int(is_centred and n_gone > 0) if stack.are_zeros else min(n_gone, 1 + is_centred)
        n_plain = len(read - gone)
        n_left, n_written = n_stream - n_plain, n_plain + n_statistics
        rows = block.rows + (N_SIDE if block.side != "none" else 0)
        rows += {"layer": 2, "layer_plain": 0, "rms": 1}[block.norm]  # scale and shift
        if n_left * rows < WEIGHTS_PER_CHANNEL * n_written:
            n_plain, n_written = n_stream, n_stream + n_statistics
        name = f"parts.{i}."
        wanted |= {f"{name}up.weight": (block.rows, n_written), f"{name}down.weight": (n_stream, block.rows)}
        if block.norm != "layer_plain":
            wanted[f"{name}norm.weight"] = (n_plain,)
        if block.side == "layer":
            wanted[f"{name}side.weight"] = (N_SIDE, n_written)
        if block.side == "product":
            wanted[f"{name}product"] = (n_plain, N_SIDE)
    return wanted


def hold(stack: Stack) -> None:
    assume(all(set(range(stack.width)) - b.skipped[0] - stack.constants for b in stack.blocks))
    x = torch.randn(2, N_TOKENS, N_IN, generator=torch.Generator().manual_seed(stack.seed))
    check(Network(stack), (x,), kept=widths(stack), routes=(stack.route,))


@settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(stacks())
def test_norms_read_in_part(stack: Stack) -> None:
    hold(stack)


@pytest.mark.timeout(1800)
@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(stacks())
def test_many_norms_read_in_part(stack: Stack) -> None:
    hold(stack)
