"""What a user may hand in by mistake or on purpose: exact, or one clear error; nothing of his changes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import srfx
from srfx.errors import CaptureError, MissingShapesError, UnsupportedModelError
from srfx.ir.plan import Reason
from tests.helpers import check, count, kill, masked, randomized
from tests.snapshots import assert_same, assert_unchanged, snapshot, trace


def small_cnn(n: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, n, 3, padding=1),
        nn.BatchNorm2d(n),
        nn.ReLU(),
        nn.Conv2d(n, n, 3, padding=1),
        nn.BatchNorm2d(n),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(n, 5),
    )


def images(n: int = 2, side: int = 8) -> tuple[Tensor]:
    return (torch.randn(n, 3, side, side),)


def reasons(small: nn.Module) -> set[str]:
    return {r.reason for r in srfx.report(small).refusals}


# --- how much is dead ---------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_nothing_dead_comes_back_bitwise(route: str) -> None:
    model = randomized(small_cnn())
    traced = trace(model, images(), route)
    small = srfx.minimize(traced, images())
    wanted = dict(traced.named_parameters())
    assert set(dict(small.named_parameters())) == set(wanted)
    for name, p in small.named_parameters():
        assert torch.equal(p, wanted[name]), name
    x = images()[0]
    with torch.no_grad():
        assert torch.equal(small(x), model(x))


def test_everything_dead_is_a_constant_network() -> None:
    model = randomized(small_cnn())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.zero_()
    found = check(model, images(), others=[images(3, 11)])
    for outcome in found.values():
        assert count(outcome.small) < count(model) / 4


def test_every_parameter_zero() -> None:
    model = randomized(small_cnn())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    check(model, images(), others=[images(1, 9)])


@pytest.mark.parametrize("layer", [0, 3, 8])
def test_one_layer_all_dead(layer: int) -> None:
    model = randomized(small_cnn())
    with torch.no_grad():
        model[layer].weight.zero_()
    check(model, images(), others=[images(3, 10)])


def test_an_mlp_whose_hidden_layer_is_dead_keeps_its_interface() -> None:
    model = randomized(nn.Sequential(nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 4)))
    with torch.no_grad():
        model[0].weight.zero_()
    for outcome in check(model, (torch.randn(2, 7),)).values():
        assert outcome.small(torch.randn(9, 7).double()).shape == (9, 4)


# --- strange numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_non_finite_weights_are_a_barrier(value: float, route: str) -> None:
    model = randomized(small_cnn())
    kill(model[0], rows=[1, 4])
    with torch.no_grad():
        model[3].weight[1, 2, 0, 0] = value
    traced = trace(model, images(), route)
    before = snapshot(traced)
    small = srfx.minimize(traced, images())
    assert_unchanged(traced, before)
    refusals = [r for r in srfx.report(small).refusals if r.reason == Reason.NON_FINITE.name]
    assert [r.node for r in refusals] == [_node_of(traced, 3)]
    x = images()[0]
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)


class TwoHeads(nn.Module):
    """What is wrong in one branch must not change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = small_cnn(), small_cnn()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tensor", ["0.weight", "0.bias", "1.weight", "1.running_var", "3.weight", "8.weight", "8.bias"]
)
@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_non_finite_anywhere_leaves_finite_outputs_right(value: float, tensor: str, route: str) -> None:
    """0 times anything is taken for 0 (finite activations), so a nan may go where its reader is zero."""
    model = masked(randomized(TwoHeads()))
    with torch.no_grad():
        dict([*model.a.named_parameters(), *model.a.named_buffers()])[tensor][3] = value
    small = srfx.minimize(trace(model, images(), route), images())
    x = images()[0]
    with torch.no_grad():
        for wanted, found in zip(model(x), small(x), strict=True):
            usual = wanted.isfinite()
            torch.testing.assert_close(found[usual], wanted[usual], rtol=1e-4, atol=1e-5)
        assert bool(usual.all())


def _node_of(traced: fx.GraphModule, layer: int) -> str:
    convs = [n for n in traced.graph.nodes if "conv2d" in str(n.target) or n.target == str(layer)]
    return next(n.name for n in (convs[-1:] if len(convs) > 1 else convs))


class Complex(nn.Module):
    """A filter in frequency space between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.filter = nn.Parameter(torch.randn(8, 8, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.front(x)) * self.filter
        return self.back(torch.fft.irfft2(spectrum, s=(8, 8)))


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_complex_parameters(route: str) -> None:
    model = masked(randomized_real(Complex()))
    assert_stays_right(model, images(), route)


class ComplexProduct(nn.Module):
    """A product with a complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(6, 8)
        self.matrix = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.front(x).to(torch.complex64) @ self.matrix).abs()


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_a_complex_matrix_is_named(route: str) -> None:
    model = randomized_real(ComplexProduct())
    kill(model.front, [1, 5])
    with torch.no_grad():
        model.front.bias[5] = 0
    x = torch.randn(2, 6)
    small = srfx.minimize(trace(model, (x,), route), (x,))
    torch.testing.assert_close(small(x), model(x))
    assert tuple(small.front.weight.shape) == (7, 6)  # as a product of values: what is zero goes
    named = [(r.node, r.reason) for r in srfx.report(small).refusals if r.node == "matmul"]
    assert named == [("matmul", "UNSUPPORTED_DTYPE")]


class IntegerTable(nn.Module):
    """An integer buffer that permutes, an integer parameter that scales."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 5, 6, 4]))
        self.scale = nn.Parameter(torch.arange(8) - 3, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.relu(self.front(x))[:, self.order] * self.scale)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_integer_parameters(route: str) -> None:
    assert_stays_right(masked(randomized_real(IntegerTable())), (torch.randn(2, 6),), route)


class Quantized(nn.Module):
    """A quantized linear layer (packed weight, no tensors) between float ones."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(6, 8), nn.Linear(8, 3)
        self.packed = torch.ao.nn.quantized.dynamic.Linear.from_float(_observed(nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.packed(self.front(x)))


def _observed(layer: nn.Linear) -> nn.Linear:
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return layer


@pytest.mark.filterwarnings("ignore")
def test_quantized_modules_are_barriers() -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine on this machine")
    model = masked(Quantized().eval())
    small = srfx.minimize(fx.symbolic_trace(model), (torch.randn(2, 6),))
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
    assert list(srfx.report(small).unknown_ops.values()) == [1]


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized_layers_are_named() -> None:
    """Fake tensors cannot run them: they and what stands behind them are refused for their packed weights."""
    if torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine on this machine")
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    packed = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})
    model = randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), packed))
    kill(model[0], [1, 4])
    x = torch.randn(5, 6)
    small = srfx.minimize(fx.symbolic_trace(model), (x,))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
    assert tuple(small.get_submodule("0").weight.shape) == (6, 6)  # what lies before them shrinks
    found = {r.node: r.reason for r in srfx.report(small).refusals}
    assert found == dict.fromkeys(["_3_0", "_3_1", "_3_2"], "UNSUPPORTED_DTYPE")


# --- tensors without values ---------------------------------------------------------------------------


def test_meta_parameters_are_named() -> None:
    with torch.device("meta"):
        model = small_cnn()
    with pytest.raises(CaptureError, match=r"0\.weight"):
        srfx.minimize(model, images())


def test_lazy_modules_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"0\.weight"):
        srfx.minimize(model, torch.randn(2, 3))


def test_sparse_parameters_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].weight = nn.Parameter(torch.eye(4).to_sparse())
    with pytest.raises(UnsupportedModelError, match=r"0\.weight"):
        srfx.minimize(model, torch.randn(2, 4))


# --- graphs -------------------------------------------------------------------------------------------


def test_a_graph_that_fails_lint() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    nodes = {n.name: n for n in traced.graph.nodes}
    nodes["_1"].append(nodes["_0"])  # the operand now stands behind its reader
    with pytest.raises(CaptureError, match="lint"):
        srfx.minimize(traced, torch.randn(2, 3))


def test_a_graph_without_shapes_says_what_to_do() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.linalg.solve(x, y).reshape(13, 17, 19)

    with pytest.raises(MissingShapesError, match="example_inputs"):
        srfx.minimize(fx.symbolic_trace(Odd()))


def test_example_inputs_of_the_wrong_shape_name_the_node() -> None:
    with pytest.raises(CaptureError, match="_0"):
        srfx.minimize(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3))), torch.randn(2, 5))


@pytest.mark.parametrize("what", [3, "model", None, torch.zeros(2)])
def test_not_a_model(what: Any) -> None:
    with pytest.raises(CaptureError, match=type(what).__name__):
        srfx.minimize(what)


def test_a_model_that_no_tracer_takes() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match="Branches"):
        srfx.minimize(Branches())


# --- training mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_batch_norm_in_training_mode_is_a_barrier(route: str) -> None:
    model = masked(randomized(small_cnn())).double().train()
    x = images(4)[0].double()
    traced = trace(model, (x,), route)
    before = snapshot(traced)
    small = srfx.minimize(traced, x)
    assert_unchanged(traced, before)
    assert Reason.TRAINING_MODE.name in reasons(small)
    ours, theirs = copy.deepcopy(small), copy.deepcopy(model)
    for _ in range(3):  # the statistics move alike, too
        assert_same(theirs(x), ours(x))
    assert_unchanged(traced, before)
    if route == "symbolic":
        assert ours.training
        ours.eval(), theirs.eval()
        assert_same(theirs(x), ours(x))


def test_the_result_of_an_eval_model_trains_and_leaves_the_original_alone() -> None:
    model = masked(randomized(small_cnn()))
    before = snapshot(model)
    small = srfx.minimize(fx.symbolic_trace(model), images()).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    for _ in range(2):
        small(images(4)[0]).square().sum().backward()
        optimizer.step()
    assert_unchanged(model, before)


# --- ops nobody knows ---------------------------------------------------------------------------------


@fx.wrap
def strange(x: Tensor) -> Tensor:
    """Mixes all channels, depends on everything."""
    return x.sort(1).values.cumsum(1) * x.std()


class Negate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1).sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@fx.wrap
def custom(x: Tensor) -> Tensor:
    return Negate.apply(x)


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.fft(x, dim=1).real


def covariance(x: Tensor) -> Tensor:
    return x @ torch.linalg.matrix_exp(x.T @ x / 100)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda x: strange(x), "strange"),  # a wrapped function is a leaf only when looked up as a global
        (lambda x: custom(x), "custom"),
        (spectrum, "fft_fft"),
        (covariance, "linalg_matrix_exp"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_unknown_ops_anywhere_stay_exact_and_are_named(op: Any, name: str, place: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)])

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(op(x) if i == place else x)
                x = F.relu(x) if i < 3 else x
            return x

    model = masked(randomized(Net()))
    found = check(model, (torch.randn(2, 5),), routes=["symbolic"], reasons=[Reason.UNKNOWN_OP])
    small = found["symbolic"].small
    assert srfx.report(small).unknown_ops == {name: 1}
    assert count(small) < count(model)  # what does not touch it goes all the same


@pytest.mark.parametrize("op", [spectrum, covariance])
def test_unknown_aten_ops(op: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(op(self.a(x)))))

    model = masked(randomized(Net()))
    found = check(model, (torch.randn(2, 5),), routes=["export"])
    assert srfx.report(found["export"].small).unknown_ops


def test_a_module_with_a_hook_is_opaque_and_the_hook_still_runs() -> None:
    model = masked(randomized(small_cnn()))
    seen: list[tuple[int, ...]] = []
    model[2].register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape)) or output * 2
    )
    before = snapshot(model)
    small = srfx.minimize(fx.symbolic_trace(model), images())
    assert_unchanged(model, before)
    x = images()[0]
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert seen[-1] == seen[-2] == (2, 8, 8, 8)


# --- the interface ------------------------------------------------------------------------------------


class ManyOutputs(nn.Module):
    """Features, a constant, logits and a number, from two inputs of which one is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, unused: Tensor | None = None) -> dict[str, Any]:
        features = torch.relu(self.stem(x))
        body = torch.relu(self.body(features))
        return {"features": features, "logits": self.head(body.mean((2, 3))), "pair": (body, x), "n": 3}


@pytest.mark.parametrize("dead", ["nothing", "rows", "stem", "body", "head", "all"])
def test_outputs_keep_structure_and_shape_whatever_dies(dead: str) -> None:
    model = randomized(ManyOutputs())
    if dead == "rows":
        kill(model.stem, rows=[0, 3], columns=[1])
        kill(model.body, rows=[2, 5, 7], columns=[0, 4])
        kill(model.head, rows=[1], columns=[6])
    for layer in (model.stem, model.body, model.head):
        if dead == "all" or getattr(model, dead, None) is layer:
            kill(layer, rows=range(layer.weight.shape[0]))
    model = model.double()
    x = images()[0].double()
    small = srfx.minimize(fx.symbolic_trace(model), x)
    for n, side in ((2, 8), (1, 13), (5, 6)):
        given = images(n, side)[0].double()
        with torch.no_grad():
            assert_same(model(given), small(given))
            assert_same(model(given, unused=given), small(given, unused=given))


# --- surroundings -------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.float16),
        torch.autograd.set_detect_anomaly,
    ],
)
@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_whatever_is_switched_on_around_the_call(around: Any, route: str) -> None:
    model = masked(randomized(small_cnn()))
    traced = trace(model, images(), route)
    wanted = srfx.minimize(traced, images())
    x = images()
    arguments = (True,) if around is torch.autograd.set_detect_anomaly else ()
    with around(*arguments):
        small = srfx.minimize(traced, x)
    state = small.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert state[name].device == tensor.device
        assert torch.equal(state[name], tensor), name
    small(x[0]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = masked(randomized(small_cnn()))
    small = srfx.minimize(fx.symbolic_trace(model), images())
    assert not any(p.is_inference() for p in small.parameters())
    small(images()[0]).sum().backward()


# --- helpers ------------------------------------------------------------------------------------------


def randomized_real(model: nn.Module) -> nn.Module:
    """Like `randomized`, for models with integer or complex parameters: those stay."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn_like(p) * 0.5)
    return model.eval()


def assert_stays_right(model: nn.Module, inputs: tuple[Any, ...], route: str) -> None:
    """Exact to float32 rounding, untouched source, something smaller than before."""
    traced = trace(model, inputs, route)
    before = snapshot(traced)
    small = srfx.minimize(traced, inputs)
    assert_unchanged(traced, before)
    found = srfx.verify(traced, small, inputs)
    assert found.ok, str(found)
    assert count(small) <= count(model)
