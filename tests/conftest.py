"""Test session setup: one thread, fixed seeds, Hypothesis profiles.

`HYPOTHESIS_PROFILE=deep` searches longer with fresh randomness; the default, `ci`, is derandomised, so that a
change never fails for an example that the change before it did not try.
"""

import os

import hypothesis
import pytest
import torch

SEED = 0

# pytest-timeout ends what hangs; a deadline per example only measures how busy the machine is.
_shared = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=50, database=None, **_shared)
hypothesis.settings.register_profile("deep", max_examples=2000, print_blob=True, **_shared)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Workers already share the cores between them; more threads in each would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, in whatever order the tests run."""
    torch.manual_seed(SEED)
