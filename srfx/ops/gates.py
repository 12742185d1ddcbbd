"""What the weights of one recurrent layer say about its hidden units; no graph in here (theory: section 15).

    LSTM  c_t = f c_{t-1} + i g,    h_t = o tanh(c_t), or W_hr (o tanh(c_t)) with projections
    GRU   n = tanh(W_in x + b_in + r (W_hn h_{t-1} + b_hn)),    h_t = (1 - z) n + z h_{t-1}
    RNN   h_t = act(W_ih x + b_ih + W_hh h_{t-1} + b_hh)

A *unit* is a lane of c (LSTM) or of h, a *state* a lane of h; without projections they are the same.  Weights are
viewed by gate: W_ih [G, H, I], W_hh [G, H, P], W_hr [P, H] with H units, P states, in torch's order of gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One of the recurrent layers: its number of gates and which of them is the candidate."""

    name: str
    n_gates: int
    candidate: int
    activation: Callable[[Tensor], Tensor] = torch.tanh

    @property
    def has_cell(self) -> bool:
        """Whether there is a cell state beside the hidden one."""
        return self.name == "lstm"


LSTM = Kind("lstm", 4, 2)  # i, f, g, o
GRU = Kind("gru", 3, 2)  # r, z, n
RNN_TANH = Kind("rnn", 1, 0)
RNN_RELU = Kind("rnn", 1, 0, torch.relu)


@dataclass(frozen=True)
class Weights:
    """Which entries of the weights are not zero (uint8, by gate), and what the constants of the operand add up to.

    ih [G, H, I], hh [G, H, P], hr [P, H] or None; shift_x and shift_h [G, H] in float64: b_ih and the constants of x
    through W_ih, b_hh and the constants of h through W_hh.
    """

    kind: Kind
    ih: Tensor
    hh: Tensor
    hr: Tensor | None
    shift_x: Tensor
    shift_h: Tensor


@dataclass(frozen=True)
class Constants:
    """What is known of the states of a layer (all [H] or [P]).

    still: states that are 0 before the first step and after every step; nobody has to read them.
    steady: states that have one value after every step, ``value`` (before the first they may have another).
    empty: units whose cell state is 0 before and after every step, for its candidate is (of an LSTM).
    null: units whose candidate is 0 at every step.
    apart: units of a GRU whose candidate does not read the states, and so not the reset gate.
    cell: cell states after the step (of an LSTM).
    """

    still: Tensor
    steady: Tensor
    value: Tensor
    empty: Tensor
    null: Tensor
    apart: Tensor
    cell: Known


@dataclass(frozen=True)
class Known:
    """Numbers some of which are known: ``value`` where ``fixed``, of the others nothing (0 is stored)."""

    fixed: Tensor
    value: Tensor

    def __add__(self, other: Known) -> Known:
        return _known(self.fixed & other.fixed, self.value + other.value)

    def __mul__(self, other: Known) -> Known:
        """A product with a 0 is 0, whatever the other factor is."""
        return _known((self.fixed & other.fixed) | self.is_zero | other.is_zero, self.value * other.value)

    def map(self, f: Callable[[Tensor], Tensor]) -> Known:
        """A function of each."""
        return _known(self.fixed, f(self.value))

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What is known, and what it is."""
        return self.fixed, self.value

    @property
    def is_zero(self) -> Tensor:
        """Which are known to be 0."""
        return self.fixed & (self.value == 0)


def _known(fixed: Tensor, value: Tensor) -> Known:
    return Known(fixed, torch.where(fixed, value, 0.0))


def _zeros(fixed: Tensor) -> Known:
    return Known(fixed, torch.zeros(fixed.shape, dtype=torch.float64))


def constants(w: Weights, varies_x: Tensor, rest_h: Tensor, rest_c: Tensor) -> Constants:
    """Lemmas Q1 and Q2, the greatest set that confirms itself: all that starts at rest is at rest until disproved.

    Args:
        w: the weights.
        varies_x: channels of the operand that vary, [I].
        rest_h: states that are 0 before the first step, [P].
        rest_c: units whose cell state is, [H]; all of a layer without one.
    """
    kind, row = w.kind, w.kind.candidate
    reads_x, reads_h = read_by(w.ih[row], varies_x), w.hh[row]
    total = w.shift_x[row] + w.shift_h[row]
    offset = (
        (w.shift_x[row] != 0) | (w.shift_h[row] != 0) if kind.name == "gru" else kind.activation(total) != 0
    )
    disturbed = reads_x | offset  # candidates that are not 0
    steady_u = ~reads_x  # candidates of which nothing is known to vary
    upset = disturbed | ~rest_c
    moving = ~rest_h | (upset if w.hr is None else read_by(w.hr, upset))  # states known not to be at rest
    frontier = moving
    while bool(frontier.any()):
        hit = read_by(reads_h, frontier)
        steady_u, disturbed = steady_u & ~hit, disturbed | hit
        reached = hit if w.hr is None else read_by(w.hr, hit)
        frontier = reached & ~moving
        moving = moving | frontier
    null = ~disturbed
    apart = ~read_by(reads_h, moving) & (w.shift_h[row] == 0)
    if kind.name == "rnn":
        value = torch.where(steady_u, kind.activation(total), 0.0)
        return Constants(~moving, steady_u, value, null, null, apart, _zeros(null))
    if kind.name == "gru":
        return Constants(~moving, ~moving, torch.zeros_like(total), null, null, apart, _zeros(null))
    empty = null & rest_c
    steady = empty if w.hr is None else ~read_by(w.hr, ~empty)
    return Constants(~moving, *_zeros(steady).parts, empty, null, apart, _zeros(empty))


def cell_constants(w: Weights, varies_x: Tensor, h: Known, c: Known) -> Constants:
    """The same for one step, from states of which something is known (Lemma Q4): the step is taken with what is.

    Args:
        w: the weights, with the constants of x and of h in their shifts.
        varies_x: channels of the operand that vary, [I].
        h: the state before the step, [H].
        c: the cell state before it; all 0 where there is none.
    """
    kind, row = w.kind, w.kind.candidate
    of_x = Known(~read_by(w.ih.flatten(0, 1), varies_x).view_as(w.shift_x), w.shift_x)
    of_h = Known(~read_by(w.hh.flatten(0, 1), ~h.fixed).view_as(w.shift_h), w.shift_h)
    gates = [Known(*pair) for pair in zip(*(of_x + of_h).parts, strict=True)]
    apart = _known(of_h.fixed[row], of_h.value[row]).is_zero
    nothing = _zeros(torch.zeros_like(apart))
    if kind.name == "rnn":
        after = gates[0].map(kind.activation)
        return Constants(h.is_zero, *after.parts, after.is_zero, after.is_zero, apart, nothing)
    if kind.name == "gru":
        reset, update = (gate.map(torch.sigmoid) for gate in gates[:2])
        n = (Known(of_x.fixed[2], of_x.value[2]) + reset * Known(of_h.fixed[2], of_h.value[2])).map(
            torch.tanh
        )
        after = update.map(lambda z: 1 - z) * n + update * h
        same = n.fixed & h.fixed & (n.value == h.value)  # then z does not matter
        after = Known(after.fixed | same, torch.where(same, n.value, after.value))
        return Constants(h.is_zero, *after.parts, n.is_zero, n.is_zero, apart, nothing)
    i, f, o = (gates[k].map(torch.sigmoid) for k in (0, 1, 3))
    g = gates[2].map(torch.tanh)
    cell = f * c + i * g
    after = o * cell.map(torch.tanh)
    return Constants(h.is_zero, *after.parts, g.is_zero & c.is_zero, g.is_zero, apart, cell)


def needed_gates(w: Weights, known: Constants, rest_h: Tensor) -> Tensor:
    """Gates whose pre-activation matters to a unit that is live, [G, H]: the others may be anything finite (Q3)."""
    needed = torch.ones(w.ih.shape[:2], dtype=torch.bool)
    if w.kind.name == "lstm":
        needed[:, known.empty] = False
        needed[0, known.null] = False
        needed[2, known.null] = False
    elif w.kind.name == "gru":
        needed[0, known.apart] = False
        needed[2, known.null] = False
        needed[:, known.null & rest_h] = False
    else:
        needed[:, known.steady & (known.value == 0)] = False
    return needed


@dataclass
class Liveness:
    """States [P], units by their cell state and by what they give out [H], and rows [G, H] that have to be right."""

    states: Tensor
    cells: Tensor
    outs: Tensor
    rows: Tensor


def liveness(
    w: Weights, states: Tensor, cells: Tensor, needed: Tensor, readable: Tensor, readable_units: Tensor
) -> Liveness:
    """The least set that contains what is read from outside and what live rows read through W_hh (Lemma Q3).

    Args:
        w: the weights.
        states: read from outside, [P].
        cells: cell states read from outside, [H].
        needed: from `needed_gates`.
        readable: states that count when a row reads them, [P].
        readable_units: units that count when the projection reads them, [H].
    """
    live = Liveness(states, cells, torch.zeros_like(cells), torch.zeros_like(needed))
    frontier, pending = states, cells
    while bool(frontier.any()) or bool(pending.any()):
        given = frontier if w.hr is None else read_from(w.hr, frontier) & readable_units
        outs = given & ~live.outs
        live.outs = live.outs | outs
        cells = (outs & ~live.cells) | pending
        live.cells = live.cells | cells
        rows = needed & cells
        if w.kind.has_cell:
            rows[3] = needed[3] & outs
        live.rows = live.rows | rows
        frontier = read_from(w.hh.flatten(0, 1), rows.flatten()) & readable & ~live.states
        live.states = live.states | frontier
        pending = torch.zeros_like(pending)
    return live


def read_by(reads: Tensor, columns: Tensor) -> Tensor:
    """Rows that read some flagged column: [R, C] uint8 and [C] bool give [R] bool."""
    chosen = columns.nonzero().flatten()
    if not chosen.numel():
        return torch.zeros(reads.shape[0], dtype=torch.bool)
    part = reads if chosen.numel() == reads.shape[1] else reads.index_select(1, chosen)
    return part.amax(1) > 0


def read_from(reads: Tensor, rows: Tensor) -> Tensor:
    """Columns that some flagged row reads: [R, C] uint8 and [R] bool give [C] bool."""
    chosen = rows.nonzero().flatten()
    if not chosen.numel():
        return torch.zeros(reads.shape[1], dtype=torch.bool)
    part = reads if chosen.numel() == reads.shape[0] else reads.index_select(0, chosen)
    return part.amax(0) > 0
