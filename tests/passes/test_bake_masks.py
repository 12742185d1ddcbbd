from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.passes import get_pass
from tests.snapshots import assert_same, assert_unchanged, snapshot


def small() -> nn.Sequential:
    return (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    )


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def masked(how: str) -> nn.Sequential:
    model = small()
    layer = model[2]
    if how == "l1":
        prune.l1_unstructured(layer, "weight", 0.5)
    elif how == "random":
        prune.random_unstructured(layer, "bias", 0.5)
    elif how == "ln_structured":
        prune.ln_structured(layer, "weight", 0.4, n=2, dim=0)
    elif how == "random_structured":
        prune.random_structured(layer, "weight", 0.4, dim=1)
    elif how == "custom":
        prune.custom_from_mask(layer, "weight", torch.eye(5))
    elif how == "identity":
        prune.identity(layer, "weight")
    elif how == "several":
        for amount in (0.2, 0.3, 0.4):
            prune.random_unstructured(layer, "weight", amount)
        prune.l1_unstructured(layer, "bias", 2)
    elif how == "global":
        parameters = [(m, "weight") for m in model if isinstance(m, nn.Linear)]
        prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.6)
    elif how == "parametrize":
        parametrize.register_parametrization(layer, "weight", Mask(torch.rand(5, 5) > 0.5))
        parametrize.register_parametrization(layer, "weight", Mask(torch.rand(5, 5) > 0.3))
        parametrize.register_parametrization(layer, "bias", Mask(torch.tensor([1, 0, 1, 0, 1])))
    elif how == "sparsifier":
        from torch.ao.pruning import WeightNormSparsifier

        sparsifier = WeightNormSparsifier(sparsity_level=0.6, sparse_block_shape=(1, 1))
        sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}, {"tensor_fqn": "4.weight"}])
        sparsifier.step()
    elif how == "old_weight_norm":
        old_weight_norm(layer)
    elif how == "old_spectral_norm":
        old_spectral_norm(layer)
    elif how == "weight_norm":
        parametrizations.weight_norm(layer)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(layer)
    elif how == "orthogonal":
        parametrizations.orthogonal(layer)
    elif how == "pruned_weight_norm":
        old_weight_norm(layer)
        prune.l1_unstructured(layer, "weight_v", 0.5)
    elif how == "pruned_parametrization":
        parametrizations.weight_norm(layer)
        prune.l1_unstructured(layer.parametrizations["weight"], "original1", 0.5)
    return model.double().eval()


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


HOW = [
    "l1", "random", "ln_structured", "random_structured", "custom", "identity", "several", "global",
    "parametrize", "sparsifier", "old_weight_norm", "old_spectral_norm", "weight_norm", "spectral_norm",
    "orthogonal", "pruned_weight_norm", "pruned_parametrization",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("given", ["module", "graph"])
@pytest.mark.parametrize("how", HOW)
def test_every_mechanism_becomes_plain_parameters(how, given):
    model = masked(how)
    want = model(X)
    before = snapshot(model)
    if given == "module":
        gm = capture(model).graph_module
    else:
        gm = capture(fx.symbolic_trace(model)).graph_module
        result = get_pass("bake-masks")(gm)
        assert result.modified
        assert not result.refusals
        assert not get_pass("bake-masks")(gm).modified
    assert_same(want, gm(X))
    assert sorted(gm.state_dict()) == sorted(small().state_dict())
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            assert type(module) in (nn.Module, nn.Linear, nn.ReLU)
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
    for name, parameter in gm.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.is_leaf
        assert parameter.dtype == torch.float64
    assert_unchanged(model, before)


def test_gradients_reach_the_baked_parameter_and_deepcopy_works():
    gm = capture(masked("several")).graph_module
    copy.deepcopy(gm)(X).sum().backward()
    gm(X).sum().backward()
    assert gm.get_parameter("2.weight").grad is not None


def test_frozen_stays_frozen_and_half_stays_half():
    model = masked("l1").to(torch.bfloat16)
    model[2].weight_orig.requires_grad_(False)
    model(X.to(torch.bfloat16))
    weight = capture(model).graph_module.get_parameter("2.weight")
    assert weight.dtype == torch.bfloat16
    assert not weight.requires_grad


def test_value_is_that_of_the_sources_not_the_stale_attribute():
    model = masked("l1")
    model(X)
    with torch.no_grad():
        model[2].weight_orig.mul_(
            3
        )  # an optimizer step; model[2].weight is the old product until the next forward
    stale = model[2].weight.clone()
    gm = capture(fx.symbolic_trace(model)).graph_module
    get_pass("bake-masks")(gm)
    assert not torch.equal(gm.get_parameter("2.weight"), stale)
    assert_same(model(X), gm(X))


def test_inf_and_nan_under_a_zero_mask_give_nan_as_in_the_model():
    model = masked("custom")
    with torch.no_grad():
        model[2].weight_orig[0, 1], model[2].weight_orig[1, 0] = torch.inf, torch.nan
    gm = capture(model).graph_module
    assert gm.get_parameter("2.weight")[0, 1].isnan()
    assert_same(model(X), gm(X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x) + self.b(torch.relu(x))


def test_prune_on_one_of_two_tied_weights_masks_only_that_use():
    model = Tied().double()
    prune.l1_unstructured(model.b, "weight", 0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    want = model(x)
    before = snapshot(model)
    gm = capture(model).graph_module
    assert_same(want, gm(x))
    assert gm.a.weight is model.a.weight
    assert (gm.a.weight != 0).all()
    assert (gm.b.weight == 0).sum() == 8
    assert_unchanged(model, before)


@pytest.mark.parametrize("is_same_mask", [True, False])
def test_tied_and_masked_alike_stays_tied(is_same_mask):
    model = Tied().double()
    shared = model.a.weight
    mask = torch.tril(torch.ones(4, 4))
    prune.custom_from_mask(model.a, "weight", mask)
    model.b.weight = shared
    prune.custom_from_mask(model.b, "weight", mask if is_same_mask else mask.T)
    assert model.a.weight_orig is model.b.weight_orig
    gm = capture(model).graph_module
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_same(model(x), gm(x))
    assert (gm.a.weight is gm.b.weight) == is_same_mask


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


def test_out_proj_of_attention_keeps_the_value_it_computes_with():
    model = Attention().double().eval()
    prune.l1_unstructured(model.mha.out_proj, "weight", 0.5)
    prune.l1_unstructured(model.mha, "in_proj_weight", 0.5)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model.mha.out_proj.weight_orig.mul_(2)  # without effect: the hook never runs
    want = model(x)
    gm = capture(model).graph_module
    assert_same(want, gm(x))
    assert sorted(gm.state_dict()) == sorted(Attention().state_dict())


def test_recurrent_layer_uses_the_baked_weight():
    model = nn.LSTM(4, 4, batch_first=True).double()
    prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = model

        def forward(self, x):
            return self.rnn(x)[0]

    want = model(x)[0]
    gm = capture(Holder()).graph_module
    assert_same(want, gm(x))
    assert gm.rnn._flat_weights[1] is gm.rnn.weight_hh_l0
    assert model._flat_weights[1] is not gm.rnn.weight_hh_l0


def test_spectral_norm_in_training_mode_is_refused_and_no_buffer_moves():
    for how in ("spectral_norm", "old_spectral_norm"):
        model = masked(how).train()
        before = snapshot(model)
        gm = capture(fx.symbolic_trace(model)).graph_module
        result = get_pass("bake-masks")(gm)
        assert not result.modified
        assert [(r.node, r.reason) for r in result.refusals] == [("2", Reason.TRAINING_MODE)]
        assert_unchanged(model, before)


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


def test_random_parametrization_is_refused_and_the_random_state_is_put_back():
    model = small()
    parametrize.register_parametrization(model[2], "weight", Noise())
    parametrize.register_parametrization(model[2], "bias", Mask(torch.zeros(5)))
    gm = capture(fx.symbolic_trace(model)).graph_module
    state = torch.get_rng_state()
    result = get_pass("bake-masks")(gm)
    assert torch.equal(state, torch.get_rng_state())
    assert [r.reason for r in result.refusals] == [Reason.TRAINING_MODE]
    assert parametrize.is_parametrized(model[2], "weight")


def test_user_hooks_stay():
    model = masked("l1")
    hook = lambda module, args: (args[0] + 1,)  # noqa: E731
    model[2].register_forward_pre_hook(hook)
    gm = capture(model).graph_module
    assert list(gm.get_submodule("2")._forward_pre_hooks.values()) == [hook]
    assert_same(model(X), gm(X))


class ReadsOrig(nn.Module):
    """The graph itself reads a source of a mask that a called layer has, too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + self.fc.weight_orig.sum()


def test_source_that_the_graph_reads_is_kept():
    model = ReadsOrig().double()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    x = torch.randn(2, 4, dtype=torch.float64)
    gm = capture(fx.symbolic_trace(model)).graph_module
    get_pass("bake-masks")(gm)
    assert "fc.weight" in gm.state_dict()
    assert "fc.weight_orig" in gm.state_dict()
    assert_same(model(x), gm(x))
