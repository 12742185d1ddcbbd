import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srfx.nn.removed import RemovedConstants, pack_numbers, unpack_numbers

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=12)


@given(VALUES, VALUES)
def test_merge_is_the_summary_of_both(left: list[float], right: list[float]) -> None:
    merged = RemovedConstants.from_values(left).merge(RemovedConstants.from_values(right))
    whole = RemovedConstants.from_values(left + right)
    scale = max((abs(v) for v in left + right), default=0.0)
    assert merged.n_values == whole.n_values
    assert math.isclose(merged.mean, whole.mean, rel_tol=1e-14, abs_tol=1e-14 * scale)
    assert math.isclose(merged.m2, whole.m2, rel_tol=1e-12, abs_tol=1e-25 * scale**2)


@given(VALUES)
def test_sums_are_those_of_the_values(values: list[float]) -> None:
    removed = RemovedConstants.from_values(torch.tensor(values, dtype=torch.float64))
    assert math.isclose(removed.sum, math.fsum(values), rel_tol=1e-12, abs_tol=1e-8)
    assert math.isclose(removed.sum_squares, math.fsum(v * v for v in values), rel_tol=1e-12, abs_tol=1e-12)
    again = RemovedConstants.from_sums(removed.n_values, removed.sum, removed.sum_squares)
    assert math.isclose(again.m2, removed.m2, rel_tol=1e-9, abs_tol=1e-12 * removed.sum_squares)


def test_m2_survives_where_the_sums_cancel() -> None:
    values = [1000.0 + 1e-6 * i for i in range(16)]
    exact = RemovedConstants.from_values(values)
    assert math.isclose(exact.m2, 340e-12, rel_tol=1e-6)
    from_sums = RemovedConstants.from_sums(16, math.fsum(values), math.fsum(v * v for v in values))
    assert not math.isclose(from_sums.m2, 340e-12, rel_tol=1e-2)


def test_repeat_counts_every_value_again() -> None:
    once = RemovedConstants.from_values([1.0, 2.0] * 3)
    assert RemovedConstants.from_values([1.0, 2.0], repeat=3) == once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0.0, 0.0), "at least 0"),
        ((1, math.nan, 0.0), "finite"),
        ((1, 0.0, math.inf), "finite"),
        ((2, 0.0, -1.0), "sum of squares"),
        ((0, 1.0, 0.0), "no values"),
    ],
)
def test_refuses_impossible_numbers(arguments: tuple[int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemovedConstants(*arguments)


def test_refuses_impossible_sums_and_values() -> None:
    with pytest.raises(ValueError, match="cannot have sum of squares"):
        RemovedConstants.from_sums(2, 4.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        RemovedConstants.from_values([1.0, math.inf])
    with pytest.raises(ValueError, match="no values"):
        RemovedConstants.from_sums(0, 1.0, 1.0)


@given(st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), min_size=1))
def test_packing_loses_no_bit(rows: list[tuple[float, float]]) -> None:
    packed = pack_numbers(rows)
    assert packed.dtype == torch.int64
    assert unpack_numbers("here", packed, (len(rows), 2)) == [list(row) for row in rows]


@pytest.mark.parametrize("packed", [torch.zeros(1, 2), torch.zeros(2, 1, dtype=torch.int64), None])
def test_unpacking_names_what_came(packed: object) -> None:
    with pytest.raises(ValueError, match=r"here: extra state must be int64 \[1, 2\]"):
        unpack_numbers("here", packed, (1, 2))
