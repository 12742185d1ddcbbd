"""What a ragged result can do: train, carry an optimizer, export, compile, ONNX, plan, explain, report, minimize again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx.minimize import minimize
from srfx.nn.selection import add_at, select, spread
from tests.helpers import kill, randomized, shapes
from tests.passes.test_ragged_reads_writes import residual


class Blocks(nn.Module):
    """Three branches with norms on a stream of tokens; no order makes slices of all."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(width, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, width) for _ in range(3))
        self.head = nn.Linear(width, 5)
        g = torch.Generator().manual_seed(0)
        randomized(self)
        for i in range(3):
            kill(self.up[i], columns=torch.randperm(width, generator=g)[:12].tolist())
            kill(self.down[i], rows=torch.randperm(width, generator=g)[:14].tolist(), bias=i > 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(3):
            x = x + self.down[i](torch.tanh(self.up[i](self.norms[i](x))))
        y: Tensor = self.head(self.norms[3](x))
        return y


TOKENS = (torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1)),)
FORMS = (torch.index_select, torch.narrow, select, spread, add_at)


def ragged(model: nn.Module) -> fx.GraphModule:
    return minimize(fx.symbolic_trace(model), TOKENS, ragged=True)


def forms(gm: fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.target in FORMS]


def test_slices_and_selections_stand_side_by_side() -> None:
    model = Blocks().double()
    small = minimize(fx.symbolic_trace(model), TOKENS[0].double(), ragged=True)
    found = forms(small)
    assert torch.narrow in found
    assert select in found
    assert spread in found
    assert add_at in found
    assert all(shapes(small)[f"up.{i}.weight"][1] <= 22 for i in range(3))  # 20 and two statistics
    assert [shapes(small)[f"down.{i}.weight"][0] for i in range(3)] == [18] * 3
    x = TOKENS[0].double()
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert forms(minimize(small, x, ragged=True)) == found


def test_the_next_step_is_that_of_the_masked_model() -> None:
    """Moments follow the channels to their new places."""
    model = Blocks().double()
    x = TOKENS[0].double()
    masks = {n: p != 0 for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(net: nn.Module, which: torch.optim.Optimizer) -> None:
        which.zero_grad()
        net(x).square().sum().backward()
        which.step()

    for _ in range(2):
        step(model, optimizer)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.mul_(masks[n])
    small = minimize(model, x, ragged=True)
    before = copy.deepcopy(small)
    other = torch.optim.Adam(model.parameters(), lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    srfx.plan(small).apply_to_optimizer(other, model, small)
    step(model, optimizer)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.mul_(masks[n])
    step(small, other)
    assert not torch.equal(small(x), before(x))
    for path in (
        "stem.weight",
        "stem.bias",
        "down.1.weight",
        "down.2.weight",
    ):  # no border, no folded constant
        plan = next(t for t in srfx.plan(small).tensors if t.name == path)
        kept = model.get_parameter(path).detach()
        for cut in plan.cuts:
            kept = kept.index_select(cut.axis, torch.tensor(cut.kept))
        torch.testing.assert_close(small.get_parameter(path).detach(), kept, rtol=1e-9, atol=1e-12)


def test_export_compile_and_deep_copies() -> None:
    small, x = ragged(Blocks().double()), TOKENS[0].double()
    exported = torch.export.export(small, (x,))
    torch.testing.assert_close(exported.module()(x), small(x), rtol=1e-9, atol=1e-12)
    again = minimize(exported, (x,), ragged=True)
    torch.testing.assert_close(again(x), small(x), rtol=1e-9, atol=1e-12)
    compiled = torch.compile(copy.deepcopy(small), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["tokens", "pictures"])
def test_inductor(kind: str) -> None:
    """Slices, selections, spreads and add_at in code that inductor wrote, and their gradients."""
    model = (Blocks() if kind == "tokens" else residual()).double().eval()
    x = TOKENS[0].double() if kind == "tokens" else torch.randn(2, 3, 6, 6).double()
    small = minimize(fx.symbolic_trace(model), x, ragged=True)
    compiled, found = torch.compile(copy.deepcopy(small), fullgraph=True), []
    assert forms(small)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-11)
    for call in (compiled, small, model):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-11)


def test_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, file = ragged(Blocks()).eval(), str(tmp_path / "small.onnx")
    torch.onnx.export(small, TOKENS, file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: TOKENS[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(TOKENS[0]).detach(), rtol=1e-4, atol=1e-4)


def test_plan_report_and_explain(tmp_path: Path) -> None:
    model = Blocks()
    small = ragged(model)
    kept = next(t for t in srfx.plan(small).tensors if t.name == "down.0.weight").cuts
    rows = next(c.kept for c in kept if c.axis == 0)
    alive = model.get_submodule("down.0").weight.any(1).nonzero().flatten().tolist()
    assert sorted(rows) == alive
    report = srfx.report(small)
    assert all(
        n in dict(small.named_buffers()) or n in dict(small.named_parameters()) for n in report.created
    )
    assert str(srfx.explain(small, "down.0", channel=rows[0]))
    srfx.save(small, tmp_path / "small.safetensors")
    loaded = srfx.load(tmp_path / "small.safetensors")
    assert torch.equal(loaded(TOKENS[0]), small(TOKENS[0]))


def test_more_leaves_after_training() -> None:
    small, x = ragged(Blocks().double()), TOKENS[0].double()
    kill(small.get_submodule("up.1"), columns=range(4))
    kill(small.get_submodule("down.2"), rows=range(3), bias=True)
    more = minimize(small, x, ragged=True)
    assert shapes(more)["up.1.weight"][1] < shapes(small)["up.1.weight"][1]
    assert shapes(more)["down.2.weight"][0] == 15
    torch.testing.assert_close(more(x), small(x), rtol=1e-10, atol=1e-10)
    assert forms(minimize(more, x, ragged=True)) == forms(more)
