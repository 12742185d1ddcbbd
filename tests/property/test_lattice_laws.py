"""Laws of the constancy lattice, and closure properties of the class solver."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch import Tensor

from srfx.lattice.classes import Classes, connected_components
from srfx.lattice.constancy import Constancy
from srfx.lattice.labels import LabelTable

N = 4


@st.composite
def facts(draw: st.DrawFn) -> Constancy:
    varies = torch.tensor(draw(st.lists(st.booleans(), min_size=N, max_size=N)))
    value = torch.tensor(draw(st.lists(st.sampled_from((0.0, 1.0, -2.0)), min_size=N, max_size=N)))
    return Constancy(varies, torch.where(varies, 0.0, value))


def same(a: Constancy, b: Constancy) -> bool:
    return a.leq(b) and b.leq(a)


@given(facts(), facts(), facts())
def test_join_is_a_least_upper_bound(a: Constancy, b: Constancy, c: Constancy) -> None:
    assert same(a.join(a), a)
    assert same(a.join(b), b.join(a))
    assert same(a.join(b).join(c), a.join(b.join(c)))
    assert a.leq(a.join(b))
    assert b.leq(a.join(b))
    if a.leq(c) and b.leq(c):
        assert a.join(b).leq(c)
    assert a.leq(Constancy.top(1))


@given(facts(), facts(), facts())
def test_leq_is_a_partial_order(a: Constancy, b: Constancy, c: Constancy) -> None:
    assert a.leq(a)
    if a.leq(b) and b.leq(c):
        assert a.leq(c)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=14))
def test_components_are_those_of_the_pairs(pairs: list[tuple[int, int]]) -> None:
    wanted = list(range(12))
    for _ in range(12):
        for a, b in pairs:
            wanted[a] = wanted[b] = min(wanted[a], wanted[b])
    links = [(torch.tensor([a]), torch.tensor([b])) for a, b in pairs]
    assert connected_components(12, links).tolist() == wanted


@st.composite
def tables(draw: st.DrawFn) -> tuple[LabelTable, int]:
    table = LabelTable()
    table.fresh(12)
    label = st.integers(1, 12)
    for a, b in draw(st.lists(st.tuples(label, label), max_size=4)):
        table.tie(torch.tensor([a]), torch.tensor([b]))
    for a, b, g in draw(st.lists(st.tuples(label, label, label), max_size=4)):
        table.imply(torch.tensor([a]), torch.tensor([b]), [torch.tensor([g])])
    for _ in range(draw(st.integers(0, 2))):
        lanes = draw(st.permutations(range(1, 13)))
        guards = [torch.tensor(lanes[6:8])] if draw(st.booleans()) else []
        table.block(torch.tensor(lanes[:6]).view(2, 3), guards, "a view")
    for a in draw(st.lists(label, max_size=1)):
        table.pin(torch.tensor([a]), "here", "UNKNOWN_OP")
    return table, draw(st.sampled_from((1, 1, 2)))


def seed_of(classes: Classes, labels: set[int]) -> Tensor:
    seed = torch.zeros(classes.representative.numel(), dtype=torch.bool)
    seed[classes.representative[torch.tensor(sorted(labels), dtype=torch.long)]] = True
    return seed


@given(tables(), st.sets(st.integers(1, 12), max_size=5))
def test_close_is_extensive_idempotent_and_satisfies_every_constraint(
    drawn: tuple[LabelTable, int], labels: set[int]
) -> None:
    table, multiple = drawn
    classes = Classes.of(table, multiple)
    rep = classes.representative
    kept = classes.close(seed_of(classes, labels))
    assert bool(kept[rep[torch.tensor(sorted(labels), dtype=torch.long)]].all())
    assert torch.equal(classes.close(kept.clone()), kept)
    for pin in table.pins:
        assert bool(kept[rep[pin.labels]].all())
    for a, b in table.ties:
        assert torch.equal(kept[rep[a]], kept[rep[b]])
    for guards, _, target in table.implications:
        assert bool((~kept[rep[guards]].all(0) | kept[rep[target]]).all())
    for block in table.blocks:
        lanes, guards = kept[rep[block.rows]], kept[rep[block.guards]]
        present = guards.all(1) if block.guards.shape[1] else lanes.any().expand(lanes.shape[0])
        assert not bool((lanes.any(1) & ~present).any())
        if bool(present.any()):
            assert lanes.sum(1)[present].unique().numel() == 1


@given(tables(), st.sets(st.integers(1, 12), max_size=4), st.sets(st.integers(1, 12), max_size=3))
def test_close_without_blocks_is_monotone(
    drawn: tuple[LabelTable, int], labels: set[int], more: set[int]
) -> None:
    """With blocks a larger seed may fill other lanes, so only the Horn clauses are monotone channel by channel."""
    table, _ = drawn
    table.blocks.clear()
    classes = Classes.of(table)
    small, large = classes.close(seed_of(classes, labels)), classes.close(seed_of(classes, labels | more))
    assert not bool((small & ~large).any())
