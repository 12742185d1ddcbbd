"""Flags of a contraction's channels, by rows and columns of its weight in the form M [G, R, C, taps]."""

from __future__ import annotations

import torch
from torch import Tensor

from srfx.ir.program import rows_at_once


def flat_positions(t: Tensor) -> Tensor:
    """[outer.., G, C] as [positions, G, C]; a vector has one position."""
    return t.reshape(-1, *t.shape[-2:])


def is_uniform(t: Tensor, axis: int) -> bool:
    """Whether an element depends on its position along ``axis`` alone."""
    others = [a for a, n in enumerate(t.shape) if a != axis and n > 1]
    first = t[tuple(slice(0, 1) if a in others else slice(None) for a in range(t.dim()))]
    return not others or bool((t == first).all())


def split_axis(t: Tensor, axis: int, groups: int) -> Tensor:
    """The view of one axis as [groups, rest]."""
    found: Tensor = t.unflatten(axis, (groups, -1))
    return found


def nonzero(m: Tensor) -> Tensor:
    """Which entries of M [G, R, C, taps] have some nonzero tap, [G, R, C] uint8 on the CPU; in pieces."""
    found, n_rows = torch.empty(m.shape[:-1], dtype=torch.uint8), rows_at_once(m, 1)
    for into, part in zip(found.split(n_rows, 1), m.split(n_rows, 1), strict=True):
        size = part.abs().sum(-1) if m.shape[-1] > 1 else part[..., 0]
        into.copy_(size != 0)
    return found


def rows_reading(flags: Tensor, reads: Tensor) -> Tensor:
    """Rows that read some flagged column: [outer.., G, C] bool and [G, R, C] uint8 give [outer.., G, R] bool.

    uint8 AND and amax are vectorised on CPU; bool `any` and a float product are some forty times slower.
    """
    return (reads & flags.to(torch.uint8).unsqueeze(-2)).amax(-1) > 0


def columns_read(flags: Tensor, reads: Tensor) -> Tensor:
    """Columns that some flagged row reads: [outer.., G, R] bool and [G, R, C] uint8 give [outer.., G, C] bool."""
    return (reads & flags.to(torch.uint8).unsqueeze(-1)).amax(-2) > 0


def marked_at(like: Tensor, positions: dict[str, int] | None) -> Tensor:
    """False everywhere but at these positions of the last axis."""
    marked = torch.zeros_like(like)
    if positions:
        marked[..., list(positions.values())] = True
    return marked
