"""Every CNN of torchvision, and timm's families: no error, and exact in float64."""

from __future__ import annotations

import pytest

from tests.helpers import ROUTES

pytestmark = pytest.mark.slow
pytest.importorskip("torchvision")
pytest.importorskip("timm")

from benchmarks.sweep import run, timm_names, torchvision_names  # noqa: E402

MODELS = [("torchvision", n) for n in torchvision_names()] + [("timm", n) for n in timm_names()]

LIMIT = 150e6


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("collection", "name"), MODELS)
def test_exact(collection: str, name: str, route: str) -> None:
    rows = list(run(collection, name, [route], most=LIMIT))
    if not rows:
        pytest.skip(f"more than {LIMIT / 1e6:.0f} M parameters: python -m benchmarks.sweep runs it")
    for row in rows:
        if "skipped" in row:
            pytest.skip(row["skipped"])
        assert row["error"] <= 1e-9
        assert row["after"] <= row["before"]
