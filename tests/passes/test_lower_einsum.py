"""Einsum becomes permutations, products and sums: the same numbers, and what is dead goes as it does from those."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from srfx.ir.plan import Reason
from srfx.minimize import CANONICALISE, minimize
from srfx.passes import get_pass
from srfx.passes.lower_einsum import LowerEinsums
from tests.helpers import ROUTES, check, kill, randomized, relative_error
from tests.snapshots import trace

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6}


class Einsum(nn.Module):
    """The op alone."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


def graph_of(equation: str, n: int) -> fx.GraphModule:
    """The op as torch.fx writes it, with one placeholder for each operand."""
    graph = fx.Graph()
    operands = [graph.placeholder(f"x{i}") for i in range(n)]
    graph.output(graph.call_function(torch.einsum, (equation, *operands)))
    return fx.GraphModule(nn.Module(), graph)


def lowered(equation: str, operands: list[Tensor]) -> fx.GraphModule:
    gm = graph_of(equation, len(operands))
    assert LowerEinsums(operands)(gm).modified
    assert not [n for n in gm.graph.nodes if n.target is torch.einsum]
    return gm


EQUATIONS = (
    "ab,bc->ac", "ab,cb->ac", "ab,bc", "ba,bc->ca", "abc,abd->acd", "abcd,abed->abce", "abcd,aecd->acbe", "abc,cd->abd",
    "abc,bcd->ad", "ab,cd->abcd", "ab,a->ab", "abcd,ab->abcd", "ab,b->a", "a,a->", "a,b->ba", "abc->ca", "abc->b", "abc->",
    "ab,bc,cd->ad", "abc,abd,abe->cde", "abc,b,c->a", "...a,ba->...b", "...ab,...bc->...ac", "a...,b->b...a", "abc,abc->abc",
    "abc,de->ade", "abcd,bce->ade", "abcd,abce->abde", "abcd,acbe->cabde", "ab->ab", "... a, b a -> ... b",
)  # fmt: skip


@pytest.mark.parametrize("equation", EQUATIONS)
def test_same_numbers(equation: str) -> None:
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    shapes = [[SIZES[i] for i in t.replace("...", "ed")] for t in terms]
    operands = [torch.randn(s, dtype=torch.float64) for s in shapes]
    wanted, found = torch.einsum(equation, *operands), lowered(equation, operands)(*operands)
    assert found.shape == wanted.shape
    assert relative_error(wanted, found) < 1e-13


@st.composite
def equations(draw: st.DrawFn) -> str:
    """One to three operands of distinct indices, and some of them in the result."""
    letters = "abcde"
    one = st.lists(st.sampled_from(letters), min_size=1, max_size=4, unique=True).map("".join)
    terms = draw(st.lists(one, min_size=1, max_size=3))
    used = sorted(set("".join(terms)))
    output = draw(st.lists(st.sampled_from(used), max_size=4, unique=True).map("".join))
    return ",".join(terms) + "->" + output


@given(equations())
def test_any_equation(equation: str) -> None:
    terms = equation.partition("->")[0].split(",")
    operands = [torch.randn([SIZES[i] for i in t], dtype=torch.float64) for t in terms]
    gm = graph_of(equation, len(operands))
    LowerEinsums(operands)(gm)
    assert relative_error(torch.einsum(equation, *operands), gm(*operands)) < 1e-12


@pytest.mark.parametrize(("equation", "shapes"), [("aab->b", [(3, 3, 2)]), ("ab,bc->ac", [(2, 1), (3, 4)])])
def test_diagonals_and_sizes_that_broadcast_are_refused(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [torch.randn(s) for s in shapes]
    gm = graph_of(equation, len(operands))
    done = LowerEinsums(operands)(gm)
    assert not done.modified
    assert [r.reason for r in done.refusals] == [Reason.UNRECOGNISED_CALL]


def test_is_a_step_of_minimize_and_has_a_fixpoint() -> None:
    assert LowerEinsums.name in CANONICALISE
    gm = lowered("abc,cd->abd", [torch.randn(2, 3, 4), torch.randn(4, 5)])
    assert not get_pass("lower-einsum", hints=[torch.randn(2, 3, 4), torch.randn(4, 5)])(gm).modified


# ---------------------------------------------------------------------- what goes
class Projections(nn.Module):
    """Two layers and a product with a stored weight in between, spelled by einsum."""

    def __init__(self, equation: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.empty(shape))
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.einsum(self.equation, self.first(x), self.weight)))


@pytest.mark.parametrize(
    ("equation", "shape"), [("btc,dc->btd", (6, 8)), ("btc,cd->btd", (8, 6)), ("...c,dc->...d", (6, 8))]
)
def test_a_weight_loses_rows_and_columns(equation: str, shape: tuple[int, ...]) -> None:
    model = randomized(Projections(equation, shape))
    # constants fold into a bias of `linear`; x @ W has no place for one (Lemma L6) and takes zeros
    kill(model.first, rows=[0, 3], bias=shape[0] == 8)
    kill(model.last, columns=[1, 2])
    with torch.no_grad():
        rows = model.weight if shape[0] == 6 else model.weight.t()
        rows[:, 5] = 0
        rows[4] = 0
    left = (3, 5) if shape[0] == 6 else (5, 3)
    check(
        model, (torch.randn(2, 4, 5),), kept={"weight": left, "first.weight": (5, 5), "last.weight": (3, 3)}
    )


class Attention(nn.Module):
    """Attention whose scores and mixture are einsums, as vision models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def test_attention_loses_a_head_and_widths() -> None:
    model = randomized(Attention())
    kill(model.v, rows=[4, 5, 6, 7])  # the second head
    kill(model.q, rows=[1], bias=True)
    kill(model.v, rows=[0, 2])
    check(
        model,
        (torch.randn(2, 3, 8),),
        kept={"q.weight": (3, 8), "k.weight": (3, 8), "v.weight": (2, 8), "out.weight": (8, 2)},
    )


class Gate(nn.Module):
    """Squeeze and excite whose product is an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        s = torch.sigmoid(self.gate(torch.einsum("bchw->bc", x) / 16))
        return self.last(torch.einsum("bchw,bc->bchw", x, s))


def test_an_elementwise_product_passes_what_is_dead() -> None:
    model = randomized(Gate())
    kill(model.first, rows=[0, 1], bias=True)
    kill(model.last, columns=[2])
    kill(model.gate, columns=[2])
    check(model, (torch.randn(2, 3, 4, 4),), kept={"gate.weight": (5, 5), "last.weight": (4, 5, 1, 1)})


@pytest.mark.parametrize("route", ROUTES)
def test_another_batch_and_length(route: str) -> None:
    model = randomized(Attention()).double()
    kill(model.v, rows=[0, 4])
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    longer = torch.randn(5, 3 if route == "export" else 7, 8, dtype=torch.float64)
    small = minimize(trace(model, (x,), route), (x,))
    with torch.no_grad():
        assert relative_error(model(longer), small(longer)) < 1e-12
