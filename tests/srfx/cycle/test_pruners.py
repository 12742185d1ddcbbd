"""Which weights each pruner zeroes."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import srfx
from srfx.cycle.pruners import prune_weights
from srfx.errors import CycleError

X = torch.zeros(1, 4)


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    return model


def share(p: torch.Tensor) -> float:
    return float((p == 0).double().mean())


def test_global_and_layer() -> None:
    model = net()
    masks = prune_weights(model, "global", 0.25)
    assert share(model[2].weight) > 0.7
    assert (model[0].weight == 0).sum() + (model[2].weight == 0).sum() == 9
    assert set(masks) <= {"0.weight", "2.weight"}
    assert torch.equal(masks["2.weight"], model[2].weight != 0)
    model = net()
    prune_weights(model, "layer", 0.25)
    assert share(model[0].weight) == share(model[2].weight) == 0.25
    assert bool(model[0].bias.all())


def test_the_amount_counts_what_is_zero_already() -> None:
    model = net()
    for _ in range(2):
        prune_weights(model, "global", 0.25)
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == 9


def test_on_an_exported_graph_and_chosen_parameters() -> None:
    model = torch.export.export(net(), (X,)).module()
    masks = prune_weights(model, "layer", 0.5, prunable=lambda name: name == "0.bias")
    assert list(masks) == ["0.bias"]
    assert int((model.get_parameter("0.bias") == 0).sum()) == 3


def test_groups_go_whole() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[[1, 4]] *= 1e-3
    prune_weights(model, "groups", 0.4, groups=lambda: srfx.GroupPenalty(model, X))
    assert (model[0].weight == 0).all(1).tolist() == [False, True, False, False, True, False]
    assert (model[2].weight == 0).all(0).tolist() == [False, True, False, False, True, False]
    assert srfx.minimize(model.eval(), X).get_submodule("0").weight.shape == (4, 4)


def test_a_function_may_zero_or_install_hooks() -> None:
    model = net()

    def hooks(module: nn.Module, amount: float) -> None:
        prune.ln_structured(module[0], "weight", amount, n=2, dim=0)
        with torch.no_grad():
            module[2].weight[0, 0] = 0

    held = model[2].weight
    masks = prune_weights(model, hooks, 0.5)
    assert not hasattr(model[0], "weight_mask")
    assert int((~masks["0.weight"]).all(1).sum()) == 3
    assert int((~masks["2.weight"]).sum()) == 1
    assert model[2].weight is held


def test_errors() -> None:
    with pytest.raises(CycleError, match="0 <= amount < 1"):
        prune_weights(net(), "global", 1.0)
    with pytest.raises(CycleError, match="one of global, layer, groups"):
        prune_weights(net(), "magnitude", 0.5)  # type: ignore[arg-type]
