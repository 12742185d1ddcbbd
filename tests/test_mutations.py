"""The list of ways to break the rewrite follows the code, and names tests that are there."""

from __future__ import annotations

import pytest

from benchmarks.mutants import ROOT, changed
from benchmarks.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.path}:{m.old.strip()[:40]}")
def test_every_line_to_break_is_there_once(mutation: Mutation) -> None:
    assert changed(mutation) != (ROOT / mutation.path).read_text()
    assert all((ROOT / path).is_file() for path in mutation.tests)
