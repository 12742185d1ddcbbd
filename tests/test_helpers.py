"""The helpers themselves: each kind of wrong result has to be noticed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from tests.helpers import (
    assert_equivalent,
    assert_no_dead_weight,
    check,
    kill,
    masked,
    randomized,
    relative_error,
)
from tests.snapshots import assert_same, trace

X = (torch.randn(4, 5),)


def net() -> nn.Sequential:
    model = randomized(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    assert isinstance(model, nn.Sequential)
    return model


def test_equal_models_pass() -> None:
    model = net()
    assert_equivalent(model, fx.symbolic_trace(copy.deepcopy(model)), X)


def test_a_flipped_sign_fails() -> None:
    wrong = copy.deepcopy(net())
    with torch.no_grad():
        wrong[2].bias[1] *= -1
    with pytest.raises(AssertionError, match="relative error"):
        assert_equivalent(net(), wrong, X)


def test_a_small_error_fails() -> None:
    wrong = copy.deepcopy(net())
    with torch.no_grad():
        wrong[2].bias[1] += 1e-7
    with pytest.raises(AssertionError, match="relative error"):
        assert_equivalent(net(), wrong, X)


def test_a_dropped_output_fails() -> None:
    class Pair(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.body, self.n = net(), n

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.body(x), x)[: self.n]

    with pytest.raises(AssertionError, match="structure"):
        assert_equivalent(Pair(2), Pair(1), X)


def test_another_shape_or_dtype_fails() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_equivalent(net(), nn.Sequential(net(), nn.Unflatten(1, (3, 1))), X)

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    with pytest.raises(AssertionError, match="dtype"):
        assert_equivalent(net(), nn.Sequential(net(), Narrow()), X)


def test_a_wrong_gradient_fails() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).detach() + 0 * x.sum()

    with pytest.raises(AssertionError, match="gradient"):
        assert_equivalent(net(), Detached(), X)


def test_idle_nodes_and_tensors_fail() -> None:
    gm = fx.symbolic_trace(net())
    gm.register_buffer("forgotten", torch.ones(2))
    with pytest.raises(AssertionError, match="forgotten"):
        assert_no_dead_weight(gm)
    gm = fx.symbolic_trace(net())
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.get_attr("0.weight")
    with pytest.raises(AssertionError, match="nobody reads"):
        assert_no_dead_weight(gm)


def test_nan_is_an_error_unless_both_have_it() -> None:
    a, b = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert relative_error(a, b) == float("inf")
    assert relative_error(a, a) == 0


def test_check_notices_what_is_kept_for_nothing() -> None:
    model = net()
    kill(model[0], [1, 2])
    check(model, X, kept={"0.weight": (4, 5)}, parameters=4 * 5 + 4 + 3 * 4 + 3)
    with pytest.raises(AssertionError, match="should be"):
        check(model, X, kept={"0.weight": (5, 5)})
    with pytest.raises(AssertionError, match="parameters, should be"):
        check(model, X, parameters=1)


def test_masks_leave_biases_and_put_negative_zeros() -> None:
    model = masked(net(), rows=0.5, columns=0.2, zeros=0.3)
    weight = model.get_submodule("0").weight
    dead = (weight == 0).all(1)
    assert int(dead.sum()) >= 3
    assert bool((model.get_submodule("0").bias[dead] != 0).all())
    assert bool((torch.signbit(weight) & (weight == 0)).any())
    assert bool((masked(net(), whole=["0"]).get_submodule("0").weight == 0).all())


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.body, self.scale = net(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def test_what_is_exported_has_the_numbers_and_the_attributes_of_its_model() -> None:
    """Though torch.export runs once for all models of one structure."""
    models = [Scaled(1.0), Scaled(1.0), Scaled(2.0), Scaled(1.0), Scaled(1.0), Scaled(1.0)]
    kill(models[1].body[0], rows=[1])
    models[3].body[0].register_forward_hook(lambda module, args, y: y + 1)
    models[4].body[2].weight = models[4].body[0].weight = nn.Parameter(torch.randn(5, 5))  # tied
    models[4].body[0].bias = models[4].body[2].bias = None
    traced = [trace(model, X, "export") for model in models]
    for model, gm in zip(models, traced, strict=True):
        assert_same(model(*X), gm(*X))
        assert all(dict(gm.named_parameters())[name] is p for name, p in model.named_parameters())
    assert len({gm.code for gm in traced}) > 1
