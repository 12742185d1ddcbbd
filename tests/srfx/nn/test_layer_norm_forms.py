"""Accuracy and gradients of both forms: every test runs the quick one (eager) and the plain one (traced)."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from srfx.nn import RemovedConstants
from srfx.nn.layer_norm_forms import Population, _normalise_quick, normalise, normalise_plain

EMITS = [(), ("r",), ("mu_r",), ("r", "mu_r", "one")]


def population(
    n_kept: int, values: Tensor, eps: float = 1e-5, emits: tuple[str, ...] = (), shift: float = 0.0
) -> Population:
    removed = RemovedConstants.from_values(values)
    return Population((n_kept,), n_kept + len(values), removed.mean, removed.m2, eps, emits, shift)


def with_constants(x: Tensor, values: Tensor) -> Tensor:
    return torch.cat([x, values.to(x).expand(*x.shape[:-1], -1)], dim=-1)


def run(form: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population) -> Tensor:
    if form == "plain":
        return normalise_plain(x, weight, bias, p)
    return _normalise_quick(x, weight, bias, p)[0]


# Offset and spread of the kept channels, offset and spread of the removed constants.
REGIMES = {
    "centred": (0.0, 1.0, 0.0, 0.0),
    "constants far": (0.0, 1.0, 50.0, 1.0),
    "all far": (300.0, 1.0, 300.0, 0.1),
    "kept far": (300.0, 1.0, 0.0, 0.0),
    "kept nearly equal": (1.0, 1e-4, 1.0, 1e-4),
    "large": (0.0, 1e4, 0.0, 1e4),
    "tiny": (0.0, 1e-4, 0.0, 0.0),
}


@pytest.mark.parametrize("form", ["quick", "plain"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_the_native_layer(form: str, regime: str, dtype: torch.dtype) -> None:
    offset, spread, offset_removed, spread_removed = REGIMES[regime]
    x = (offset + spread * torch.randn(200, 48, dtype=torch.float64)).to(dtype)
    values = (offset_removed + spread_removed * torch.randn(16, dtype=torch.float64)).to(dtype)
    weight, bias = (
        torch.randn(48, dtype=torch.float64).to(dtype),
        torch.randn(48, dtype=torch.float64).to(dtype),
    )
    pad = torch.zeros(16, dtype=dtype)
    full = with_constants(x, values)
    w, b = torch.cat([weight, pad]), torch.cat([bias, pad])
    truth = F.layer_norm(full.double(), (64,), w.double(), b.double())[:, :48]
    native = (F.layer_norm(full, (64,), w, b)[:, :48].double() - truth).abs()
    ours = (run(form, x, weight, bias, population(48, values)).double() - truth).abs()
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert ours.max() <= 1.5 * native.max() + 0.5 * floor
    assert ours.mean() <= 1.5 * native.mean() + 1e-3 * floor


@pytest.mark.parametrize("form", ["quick", "plain"])
def test_extra_channels_are_as_accurate(form: str) -> None:
    x = 300.0 + torch.randn(100, 48)
    values = 300.0 + torch.randn(16, dtype=torch.float64)
    p = population(48, values, emits=("r", "mu_r", "one"), shift=float(values.mean()))
    full = with_constants(x.double(), values)
    mu = full.mean(-1, keepdim=True)
    r = (full.var(-1, correction=0, keepdim=True) + p.eps).rsqrt()
    truth = torch.cat([r, (mu - p.shift) * r, torch.ones_like(r)], dim=-1)
    out = run(form, x, None, None, p)
    assert out.shape == (100, 51)
    # mu is a float32 mean of numbers near 300: a few units in its last place, whatever is done with it.
    assert torch.allclose(out[:, 48:].double(), truth, rtol=2e-6, atol=8 * 300 * 2**-24)
    assert torch.equal(out[:, 50], torch.ones(100))


@pytest.mark.parametrize("emits", EMITS)
@pytest.mark.parametrize(("has_weight", "has_bias"), [(True, True), (True, False), (False, False)])
def test_forms_agree(emits: tuple[str, ...], has_weight: bool, has_bias: bool) -> None:
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    weight = torch.randn(7, dtype=torch.float64) if has_weight else None
    bias = torch.randn(7, dtype=torch.float64) if has_bias else None
    p = population(7, torch.tensor([0.5, -3.0, 2.0]), emits=emits, shift=0.25)
    torch.testing.assert_close(
        run("quick", x, weight, bias, p), run("plain", x, weight, bias, p), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("emits", EMITS)
@pytest.mark.parametrize("has_weight", [True, False])
def test_first_and_second_gradients(emits: tuple[str, ...], has_weight: bool) -> None:
    p = population(4, torch.tensor([0.5, -1.0]), emits=emits, shift=0.25)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_weight else None
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_weight else None
    assert torch.autograd.gradcheck(lambda *inputs: normalise(*inputs, p), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *inputs: normalise(*inputs, p), (x, weight, bias))


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1])
def test_frozen_inputs_get_no_gradient(wanted: tuple[bool, bool, bool]) -> None:
    p = population(4, torch.tensor([0.5, -1.0]), emits=("r",))
    shapes = [(3, 4), (4,), (4,)]
    for form in (normalise, normalise_plain):
        torch.manual_seed(1)
        inputs = [
            torch.randn(s, dtype=torch.float64).requires_grad_(w) for s, w in zip(shapes, wanted, strict=True)
        ]
        form(*inputs, p).square().sum().backward()
        assert [t.grad is not None for t in inputs] == list(wanted)
        if form is normalise:
            quick = inputs
    for one, other in zip(quick, inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_of_half_precision_inputs() -> None:
    p = population(48, torch.randn(16, dtype=torch.float64))
    x = torch.randn(64, 48)
    weight = torch.randn(48)
    truth = x.double().requires_grad_(True)
    normalise(truth, weight.double(), None, p).square().sum().backward()
    half = x.bfloat16().requires_grad_(True)
    scale = weight.bfloat16().requires_grad_(True)
    normalise(half, scale, None, p).float().square().sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == scale.grad.dtype == torch.bfloat16
    assert torch.allclose(
        half.grad.double(), truth.grad, rtol=0.05, atol=0.05 * float(truth.grad.abs().max())
    )


def test_inputs_that_are_not_contiguous() -> None:
    p = population(4, torch.tensor([0.5, -1.0]), emits=("r", "mu_r"))
    x = torch.randn(2, 4, 5, dtype=torch.float64).transpose(1, 2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda t: normalise(t, None, None, p).transpose(0, 1), (x,))


def test_several_axes_of_which_one_lost_channels() -> None:
    values = torch.tensor([0.5, -1.0], dtype=torch.float64)
    removed = RemovedConstants.from_values(values, repeat=3)
    p = Population((4, 3), 18, removed.mean, removed.m2, 1e-5, (), 0.0)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    full = torch.cat([x, values[:, None].expand(2, 2, 3)], dim=1)
    truth = F.layer_norm(full, (6, 3))[:, :4]
    for form in ("quick", "plain"):
        torch.testing.assert_close(run(form, x, None, None, p), truth, rtol=1e-12, atol=1e-12)


def test_eps_zero_with_equal_kept_channels() -> None:
    p = population(3, torch.tensor([5.0, 5.0]), eps=0.0)
    full = torch.tensor([[1.0, 1.0, 1.0, 5.0, 5.0]])
    truth = F.layer_norm(full, (5,), eps=0.0)[:, :3]
    torch.testing.assert_close(normalise(full[:, :3], None, None, p), truth)


def test_one_kept_channel() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    x = torch.randn(10, 1, dtype=torch.float64)
    truth = F.layer_norm(with_constants(x, values), (4,))[:, :1]
    torch.testing.assert_close(normalise(x, None, None, population(1, values)), truth, rtol=1e-12, atol=1e-12)


def test_nothing_removed_is_the_native_layer() -> None:
    x = torch.randn(10, 6, dtype=torch.float64)
    p = population(6, torch.zeros(0))
    torch.testing.assert_close(normalise(x, None, None, p), F.layer_norm(x, (6,)), rtol=1e-13, atol=1e-13)


def test_no_positions() -> None:
    p = population(4, torch.tensor([1.0]), emits=("r",))
    x = torch.zeros(0, 4, requires_grad=True)
    out = normalise(x, None, None, p)
    assert out.shape == (0, 5)
    out.sum().backward()
    assert x.grad is not None


class TestTransforms:
    """What is not plain eager mode gets the plain form, and the right answer."""

    p = population(4, torch.tensor([0.5, -1.0]), emits=("r", "mu_r"))

    def test_vmap_over_inputs_and_weights(self) -> None:
        x, weights = torch.randn(3, 5, 4), torch.randn(3, 4)
        out = torch.func.vmap(lambda t, w: normalise(t, w, None, self.p))(x, weights)
        one_by_one = torch.stack([normalise(t, w, None, self.p) for t, w in zip(x, weights, strict=True)])
        torch.testing.assert_close(out, one_by_one)

    def test_forward_mode_and_reverse_mode_jacobians(self) -> None:
        x = torch.randn(4, dtype=torch.float64)

        def f(t: Tensor) -> Tensor:
            return normalise(t, None, None, self.p)

        reverse = torch.autograd.functional.jacobian(f, x)
        torch.testing.assert_close(torch.func.jacrev(f)(x), reverse)
        torch.testing.assert_close(torch.func.jacfwd(f)(x), reverse)

    def test_dual_numbers(self) -> None:
        x, tangent = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        with torch.autograd.forward_ad.dual_level():
            out = normalise(torch.autograd.forward_ad.make_dual(x, tangent), None, None, self.p)
            found = torch.autograd.forward_ad.unpack_dual(out).tangent
        assert found is not None
        jacobian = torch.autograd.functional.jacobian(lambda t: normalise(t, None, None, self.p), x)
        torch.testing.assert_close(found, jacobian @ tangent)

    def test_autocast_leaves_the_statistics_alone(self) -> None:
        x = torch.randn(8, 4) + 100.0
        weight = torch.randn(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = normalise(x, weight, None, self.p)
        assert torch.equal(inside, normalise(x, weight, None, self.p))

    def test_meta_tensors(self) -> None:
        out = normalise(torch.empty(2, 4, device="meta"), None, None, replace(self.p, emits=("r",)))
        assert out.device.type == "meta"
        assert out.shape == (2, 5)


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("outputs", [None, torch.tensor([0, 2])])
def test_fake_tensors_take_the_plain_form(is_inside: bool, outputs: Tensor | None) -> None:
    p, x = population(4, torch.zeros(2), emits=("mu_r",)), torch.randn(3, 4)
    wanted = normalise(x, None, None, p, outputs)  # the numbers it remembers are no fake ones
    mode = FakeTensorMode()
    fake, fake_outputs = mode.from_tensor(x), outputs if outputs is None else mode.from_tensor(outputs)
    with mode if is_inside else contextlib.nullcontext():
        found = normalise(fake, None, None, p, fake_outputs)
    assert type(found) is FakeTensor
    assert found.shape == wanted.shape
    assert torch.equal(normalise(x, None, None, p, outputs), wanted)  # nor has it remembered any


def test_what_is_remembered_in_inference_mode_serves_training() -> None:
    p, x = population(5, torch.ones(3)), torch.randn(3, 5, requires_grad=True)
    with torch.inference_mode():
        wanted = normalise(x, None, None, p)
    found = normalise(x, None, None, p)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert x.grad is not None
