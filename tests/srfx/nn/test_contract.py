"""What every compensated norm can do as a module: gradients, state, copies, moves, compilers, exporters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import srfx.nn
from srfx.nn import CompensatedGroupNorm, CompensatedLayerNorm, CompensatedRMSNorm, RemovedConstants

GONE = RemovedConstants.from_values([1.5, -0.5, 0.25])
NONE = RemovedConstants()
GROUPS = [RemovedConstants.from_values([2.0]), NONE, RemovedConstants.from_values([1.0, -3.0, 0.5])]

Make = Callable[[], nn.Module]
CASES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "layer": (lambda: CompensatedLayerNorm(6, GONE), (6,)),
    "layer, all emitted": (
        lambda: CompensatedLayerNorm(6, GONE, emits=("r", "mu_r", "one"), emit_shift=0.5),
        (6,),
    ),
    "layer, no bias": (lambda: CompensatedLayerNorm(6, GONE, bias=False, emits=("mu_r",)), (6,)),
    "layer, not affine": (lambda: CompensatedLayerNorm(6, GONE, elementwise_affine=False), (6,)),
    "layer, several axes": (lambda: CompensatedLayerNorm((6, 2), GONE), (6, 2)),
    "layer, some outputs": (lambda: CompensatedLayerNorm(6, GONE, outputs=[0, 2, 5], emits=("r",)), (6,)),
    "layer, statistics alone": (lambda: CompensatedLayerNorm(6, GONE, outputs=[], emits=("r", "mu_r")), (6,)),
    "rms": (lambda: CompensatedRMSNorm(6, 9, 2.5), (6,)),
    "rms, statistics alone": (lambda: CompensatedRMSNorm(6, 9, 2.5, eps=1e-5, outputs=[]), (6,)),
    "rms, all emitted": (lambda: CompensatedRMSNorm(6, 9, 2.5, eps=1e-5, emits=("r", "one")), (6,)),
    "rms, nothing emitted": (lambda: CompensatedRMSNorm(6, 9, 2.5, emits=()), (6,)),
    "rms, not affine": (lambda: CompensatedRMSNorm(6, 9, 2.5, elementwise_affine=False), (6,)),
    "group": (lambda: CompensatedGroupNorm([0, 0, 1, 1, 1], GROUPS), (5, 4)),
    "group, pictures": (lambda: CompensatedGroupNorm([1, 0, 1, 0, 1], GROUPS), (5, 2, 3)),
    "group, not affine": (lambda: CompensatedGroupNorm([0, 0, 1, 1, 1], GROUPS, affine=False), (5, 4)),
}
SOME = ["layer, all emitted", "rms, all emitted", "group"]

every = pytest.mark.parametrize("name", CASES)


def make(name: str, n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The norm with parameters away from their defaults, and n inputs."""
    g = torch.Generator().manual_seed(0)
    build, shape = CASES[name]
    norm = build()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(1.0 + 0.3 * torch.randn(p.shape, generator=g))
    return norm.to(dtype), torch.randn(n, *shape, generator=g).to(dtype)


def test_no_module_is_left_out() -> None:
    found = {name for name in srfx.nn.__all__ if name.startswith("Compensated")}
    assert found == {type(build()).__name__ for build, _ in CASES.values()}
    assert {type(CASES[name][0]()).__name__ for name in SOME} == found


@every
def test_gradients(name: str) -> None:
    """Of the input and of every parameter, first and second."""
    norm, x = make(name, dtype=torch.float64)
    names = [n for n, _ in norm.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        found: Tensor = functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))
        return found

    tensors = [t.detach().clone().requires_grad_() for t in (x, *norm.parameters())]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@every
def test_state_dict(name: str) -> None:
    """A norm of the same structure takes over weights and constants, bit by bit, also from a cast state dict."""
    norm, x = make(name)
    stream = io.BytesIO()
    torch.save(norm.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    other = CASES[name][0]()
    other.load_state_dict(state)
    assert torch.equal(other(x), norm(x))
    assert repr(other) == repr(norm)
    cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    half = CASES[name][0]().bfloat16()
    half.load_state_dict(cast)
    assert repr(half) == repr(norm)


@every
def test_copies(name: str) -> None:
    norm, x = make(name)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert repr(other) == repr(norm)
        assert torch.equal(other(x), norm(x))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in norm.parameters()}


@every
def test_moves(name: str) -> None:
    """To the meta device and back, and to other dtypes; nothing of the constants is lost on the way."""
    norm, x = make(name)
    state, wanted = norm.state_dict(), norm(x)
    meta = copy.deepcopy(norm).to("meta")
    assert meta(x.to("meta")).shape == wanted.shape
    assert meta(x.to("meta")).device.type == "meta"
    back = meta.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), wanted)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        moved = copy.deepcopy(norm).to(dtype)
        assert repr(moved) == repr(norm)
        out = moved(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)


@every
def test_compiled(name: str) -> None:
    """One graph, for any number of positions, with the gradients of the eager form."""
    norm, _ = make(name)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5):
        x = make(name, n)[1]
        found = []
        for call in (norm, compiled):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            gradients = torch.autograd.grad(y.square().sum(), [leaf, *call.parameters()])
            found.append([y, *gradients])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_inductor(name: str) -> None:
    norm, x = make(name, 4)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True)(x), norm(x))


@every
@pytest.mark.parametrize("strict", [True, False])
def test_exported(name: str, strict: bool) -> None:
    """With any number of positions; saved and loaded it computes the same, and its gradients too."""
    norm, x = make(name)
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(norm, (x,), dynamic_shapes=shapes, strict=strict)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    leaf = make(name, 7)[1].requires_grad_()
    wanted, found = norm(leaf), loaded(leaf)
    torch.testing.assert_close(found, wanted)
    a, b = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (wanted, found))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    norm, x = make(name)
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    path = tmp_path / "norm.onnx"
    torch.onnx.export(norm.eval(), (x,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = make(name, 7)[1]
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), norm(x).detach(), rtol=1e-5, atol=1e-5)
