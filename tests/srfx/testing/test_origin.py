"""A leftover that never varies is followed back to the op that makes it, which says why it is not known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.analysis.why import READ, RELATED, STEPS
from srfx.ir.plan import Reason
from srfx.ops.attention import Attention
from srfx.testing import probe
from tests.helpers import kill, randomized

X = torch.randn(4, 6, 5)


class Masked(nn.Module):
    """Values that are one constant, under a mask that is an input; two layers more behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o, self.back = (
            nn.Linear(5, 4),
            nn.Linear(5, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 2),
        )
        randomized(self)
        kill(self.v, rows=(1,))
        kill(self.o, rows=(2,))
        self.o.weight.data[2, 1] = 1.0  # reads the constant, and nothing else

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        mask = None if seen is None else seen[:, None, :]
        y: Tensor = self.back(
            torch.relu(self.o(F.scaled_dot_product_attention(self.q(x), self.q(x), self.v(x), mask)))
        )
        return y


def test_a_query_that_may_see_no_key() -> None:
    """The lane itself, and a channel two ops further on."""
    seen = torch.ones(4, 6).bool()
    found = probe(Masked(), (X, seen))
    assert found.reasons == {Reason.MASKED.name: 2}
    assert {left.site for left in found.leftovers} == {"scaled_dot_product_attention"}
    assert not probe(Masked(), X).leftovers


def test_a_rule_that_knows_too_little_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reason is given for it, so that it counts as lost."""
    monkeypatch.setattr(Attention, "sees_a_key", lambda self, call: False)
    monkeypatch.setattr(Attention, "drops", lambda self, call: True)
    found = probe(Masked(), X)
    assert found.reasons == {READ: 2}
    assert {left.site for left in found.leftovers} == {"scaled_dot_product_attention"}


class Equal(nn.Module):
    """A norm of two equal numbers is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.b, self.back = (
            nn.Linear(5, 3),
            nn.Linear(2, 3),
            nn.Linear(5, 2),
            nn.Linear(5, 2),
        )
        self.register_buffer("twice", torch.tensor([1, 1]))

    def forward(self, x: Tensor) -> Tensor:
        equal = torch.relu(self.mid(F.group_norm(self.a(x)[:, self.twice], 1)))
        y: Tensor = self.back(torch.cat([equal, self.b(x)], 1))
        return y


def test_lanes_that_are_equal() -> None:
    found = probe(randomized(Equal()), X[:, 0])
    assert found.reasons == {RELATED: 3}
    assert {left.site for left in found.leftovers} == {"group_norm"}


class Cut(nn.Module):
    """Only the first step of a layer is read: no state before it."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.layer, self.back, self.step = nn.GRU(5, 4, batch_first=True), nn.Linear(3, 2), step

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.layer(x)[0][:, self.step, 1:])
        return y


def test_a_layer_of_which_one_step_is_read() -> None:
    assert probe(randomized(Cut(0)), X).reasons == {STEPS: 1}
    assert probe(randomized(Cut(1)), X).n_removable == 0


class Free(nn.Module):
    """A layer that reads nothing of its operand goes its own way, the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mid, self.b, self.back = (
            nn.LSTM(5, 4),
            nn.Linear(4, 3),
            nn.Linear(5, 2),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        last = torch.sigmoid(self.mid(self.layer(x)[1][0][0]))
        y: Tensor = self.back(torch.cat([last, self.b(x[0])], 1))
        return y


def test_a_layer_that_runs_by_itself() -> None:
    model = randomized(Free())
    model.layer.weight_ih_l0.data.zero_()
    assert probe(model, X).reasons == {STEPS: 3}


class Length(nn.Module):
    """Channel 1 is sigmoid(0) wherever it is divided by a length of which it is a part; nobody reads it behind."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.front, self.back, self.p = nn.Linear(5, 4), nn.Linear(4, 2), p
        randomized(self)
        kill(self.front, rows=(1,))
        kill(self.back, columns=(1,))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(F.normalize(torch.sigmoid(self.front(x)), p=self.p, dim=-1))
        return y


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_constant_that_is_part_of_a_length(p: float) -> None:
    found = probe(Length(p), X)
    assert found.reasons == {Reason.CHANNEL_MIXING.name: 1}
    assert found.leftovers[0].site == "normalize"


@torch.fx.wrap
def nobody_knows(x: Tensor) -> Tensor:
    return x + x.detach().sort(-1).values.mean() * 0


class Odd(nn.Module):
    """An op without a rule makes a constant of constants; what reads it knows nothing of that."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(5, 4), nn.Linear(4, 2)
        randomized(self)
        self.front.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(nobody_knows(self.front(x)))
        return y


def test_an_op_that_nobody_knows_is_named() -> None:
    found = probe(Odd(), X)
    assert set(found.reasons) == {Reason.UNKNOWN_OP.name}
    assert {left.site for left in found.leftovers} == {"nobody_knows"}
