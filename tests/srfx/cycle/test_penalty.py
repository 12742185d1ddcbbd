"""The penalties: value, gradient, what counts, and on which tensors."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import srfx
from srfx.errors import ShapeMismatchError


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def by_hand(net: nn.Sequential) -> Tensor:
    rows, columns = net[0].weight, net[2].weight
    return sum(
        ((rows[i].square().sum() + columns[:, i].square().sum() + 1e-12) * (4 + 2)).sqrt() for i in range(3)
    )  # type: ignore[return-value]


def test_value_and_gradient() -> None:
    net, x = mlp(), torch.zeros(1, 4, dtype=torch.float64)
    penalty = srfx.GroupPenalty(net, x)
    other = copy.deepcopy(net)
    found, wanted = penalty(net), by_hand(other)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    (3 * found).backward()
    (3 * wanted).backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or not bool(p.grad.any())
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)
    assert penalty.sizes.tolist() == [6, 6, 6]
    torch.testing.assert_close(
        penalty.norms(net).square().sum(), sum(m.weight.square().sum() for m in (net[0], net[2]))
    )


def test_overlapping_and_ragged_slices_have_the_right_gradient() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).double()
    penalty = srfx.GroupPenalty(net, torch.zeros(1, 3, 5, 5, dtype=torch.float64), biases=True)
    names = [n for n, _ in net.named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        scratch = nn.Module()
        for i in (0, 1, 3):
            scratch.add_module(str(i), nn.Module())
        for name, t in zip(names, tensors, strict=True):
            scratch.get_submodule(name[0]).register_buffer(name[2:], t)
        return penalty(scratch)

    given = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(function, given)
    assert penalty.sizes.sum() == sum(
        net.get_parameter(s.name).numel() for s in penalty.groups.slices if bool((s.groups >= 0).all())
    )


def test_a_group_at_zero_stays_there() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[2].weight[:, 1] = 0
    penalty = srfx.GroupPenalty(net, torch.zeros(1, 4, dtype=torch.float64))
    penalty(net).backward()
    assert not bool(net[0].weight.grad[1].any())
    assert bool(net[0].weight.grad[0].all())


def test_what_counts() -> None:
    net, x = mlp(), torch.zeros(1, 4, dtype=torch.float64)
    assert srfx.GroupPenalty(net, x, biases=True).sizes.tolist() == [7, 7, 7]
    assert srfx.GroupPenalty(net, x, inputs=True).sizes.tolist() == [6, 6, 6, 3, 3, 3, 3]
    assert srfx.GroupPenalty(net, x, parameters=lambda name: name == "0.weight").sizes.tolist() == [4, 4, 4]
    frozen = mlp()
    frozen[2].requires_grad_(False)
    assert srfx.GroupPenalty(frozen, x).sizes.tolist() == [4, 4, 4]


def test_scale_may_be_replaced() -> None:
    net, x = mlp(), torch.zeros(1, 4, dtype=torch.float64)
    penalty = srfx.GroupPenalty(net, x)
    penalty.scale = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(penalty(net), (penalty.norms(net)[1].square() + 1e-12).sqrt())


@pytest.mark.parametrize("wrap", ["hooks", "parametrization", "DataParallel"])
def test_it_sees_the_tensors_that_train(wrap: str) -> None:
    net, x = mlp(), torch.zeros(1, 4, dtype=torch.float64)
    model: nn.Module = net
    if wrap == "hooks":
        prune.l1_unstructured(net[0], "weight", 0.5)
    elif wrap == "parametrization":
        nn.utils.parametrize.register_parametrization(net[0], "weight", nn.Hardshrink(0.2))
    else:
        model = nn.DataParallel(net)
    for penalty in (srfx.GroupPenalty(model, x), srfx.L1Penalty(model, x)):
        net.zero_grad()
        value = penalty(model)
        effective = copy.deepcopy(mlp())
        with torch.no_grad():
            for i in (0, 2):
                mask = getattr(net[i], "weight_mask", 1)
                effective[i].weight.copy_(getattr(net[i], "weight_orig", net[i].weight) * mask)
        wanted = (
            by_hand(effective)
            if isinstance(penalty, srfx.GroupPenalty)
            else sum(effective[i].weight.abs().sum() for i in (0, 2))
        )
        torch.testing.assert_close(value, wanted)
        value.backward()
        if wrap == "hooks":
            assert not bool(net[0].weight_orig.grad[net[0].weight_mask == 0].any())
            assert bool(net[0].weight_orig.grad.any())


def test_l1_counts_biases_on_request() -> None:
    net, x = mlp(), torch.zeros(1, 4, dtype=torch.float64)
    total = sum(p.abs().sum() for p in net.parameters())
    torch.testing.assert_close(srfx.L1Penalty(net, x, biases=True)(net), total)
    assert srfx.L1Penalty(net, x).names == ["0.weight", "2.weight"]


def test_half_precision_is_summed_in_float32() -> None:
    net = mlp().to(torch.bfloat16)
    value = srfx.GroupPenalty(net, torch.zeros(1, 4, dtype=torch.bfloat16))(net)
    value.backward()
    assert value.dtype == torch.float32
    assert net[0].weight.grad.dtype == torch.bfloat16


def test_a_smaller_model_needs_a_new_penalty() -> None:
    net, x = mlp(), torch.zeros(1, 4, dtype=torch.float64)
    penalty = srfx.GroupPenalty(net, x)
    with torch.no_grad():
        net[0].weight[1] = 0
    with pytest.raises(ShapeMismatchError, match=r"0\.weight is \[2, 4\]"):
        penalty(srfx.minimize(net.eval(), x))
    with pytest.raises(ShapeMismatchError, match="no parameter"):
        penalty(nn.Linear(1, 1))


def test_fused_projections_are_warned_about() -> None:
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    with pytest.warns(UserWarning, match="in_proj_weight"):
        srfx.GroupPenalty(attention, torch.zeros(1, 3, 4))
