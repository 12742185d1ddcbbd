"""Small transformers of every common kind: exact, and smaller.  Needs the transformers library."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks.hf_models import KINDS
from benchmarks.models import in_child

STUCK = {"convnextv2": 1.0, "squeezebert": 0.99, "mixtral": 0.99, "qwen2-moe": 0.95, "swinv2": 0.95}
"""Share of the parameters that may stay where it is more than 0.85: what is refused stands in docs/models.md."""


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_exact_and_smaller(name: str) -> None:
    row = in_child(name, 200)
    if row["status"] == "no export":
        pytest.skip(row["message"])
    assert row["status"] == "exact", row
    assert row["after"] <= STUCK.get(name, 0.85) * row["before"], row
