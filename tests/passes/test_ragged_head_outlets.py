"""What a result with groups of heads can do: files, ONNX, compilers, a user's module, training, minimize again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import srfx
from srfx.errors import ApplyError
from srfx.minimize import minimize
from tests.helpers import shapes
from tests.passes.test_group_heads import (
    HALF,
    Heads,
    calls_are_free,  # noqa: F401  # a fixture
    narrowed,
    products,
    rows_of,
    tokens,
)

KINDS = ("fused", "rotary", "spelled", "slopes")
pytestmark = pytest.mark.usefixtures("calls_are_free")


def grouped(kind: str = "fused") -> tuple[Heads, fx.GraphModule, tuple[Tensor]]:
    model, x = narrowed(Heads(kind=kind), HALF).double().eval(), tokens()
    small = minimize(model, x, ragged=True)
    assert len(products(small)) == 2
    return model, small, x


def sizes(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for p in gm.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_exported_files_compute_the_same_and_are_settled(kind: str, tmp_path: Path) -> None:
    _, small, x = grouped(kind)
    torch.export.save(torch.export.export(small, x), tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2")
    torch.testing.assert_close(loaded.module()(*x), small(*x), rtol=1e-9, atol=1e-12)
    again = minimize(loaded, x, ragged=True)
    assert sizes(again) == sizes(small)
    assert len(products(again)) == 2
    torch.testing.assert_close(again(*x), small(*x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_onnx(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, small, x = grouped(kind)
    small, x, file = small.float(), (x[0].float(),), str(tmp_path / "small.onnx")
    torch.onnx.export(small, x, file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(*x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind: str) -> None:
    """Forward and gradients, in code that inductor wrote."""
    model, small, x = grouped(kind)
    compiled = torch.compile(copy.deepcopy(small), fullgraph=True)
    found = []
    for call in (compiled, small, model):
        leaf = x[0].clone().requires_grad_()
        y = call(leaf)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-11)


def test_loaded_from_a_file_it_is_minimized_further(tmp_path: Path) -> None:
    """Settled as it was; more lanes gone from one group are gone from that group."""
    _, small, x = grouped("rotary")
    srfx.save(small, tmp_path / "small.safetensors")
    loaded = srfx.load(tmp_path / "small.safetensors")
    assert sizes(minimize(loaded, x, ragged=True)) == sizes(small)
    name = next(n for n in ("v", "v_1") if shapes(small)[f"{n}.weight"][0] == 48)
    layer = loaded.get_submodule(name)
    lanes = torch.tensor([h * 16 + i for h in range(3) for i in (0, 5, 7)])
    with torch.no_grad():
        layer.weight[lanes] = 0
        layer.bias[lanes] = 0
    more = minimize(loaded, x, ragged=True)
    assert sorted(rows_of(more, "v")) == [18, 39]
    assert shapes(more)["o.weight"][1] == 18 + 39
    torch.testing.assert_close(more(*x), loaded(*x), rtol=1e-9, atol=1e-12)


def test_a_plan_is_written_down_and_read() -> None:
    """The columns of the output projection, in the order of the groups, are those of the user's weight."""
    model, small, _ = grouped()
    plan = srfx.plan(small)
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    kept = again.kept("o.weight", 1)
    torch.testing.assert_close(small.get_parameter("o.weight"), model.o.weight[:, kept])


def test_a_users_module_has_one_call_and_is_left_as_it_was() -> None:
    """Its forward calls one attention: it refuses, and nothing in it has changed."""
    model, small, x = grouped("rotary")
    before, wanted = copy.deepcopy(model.state_dict()), model(*x)
    with pytest.raises(ApplyError):
        srfx.apply_(model, small, inputs=x)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(*x), wanted)


def test_steps_of_training_are_those_of_the_masked_model() -> None:
    """Moments follow heads into their groups: three steps of Adam, the masks held by hand, end at the same function."""
    model, x = narrowed(Heads(kind="masked"), HALF).double(), tokens()
    masks = {n: p != 0 for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(net: torch.nn.Module, which: torch.optim.Optimizer) -> None:
        which.zero_grad()
        net(*x).square().sum().backward()
        which.step()
        with torch.no_grad():
            for n, p in net.named_parameters():
                if net is model:
                    p.mul_(masks[n])

    for _ in range(2):
        step(model, optimizer)
    small = minimize(model, x, ragged=True)
    assert len(products(small)) == 2
    other = torch.optim.Adam(model.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    srfx.plan(small).apply_to_optimizer(other, model, small)
    held = {id(p) for group in other.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    start = small(*x).detach()
    for _ in range(3):
        step(model, optimizer)
        step(small, other)
    assert not torch.allclose(small(*x), start, rtol=1e-6)
    torch.testing.assert_close(small(*x), model(*x), rtol=1e-9, atol=1e-9)
