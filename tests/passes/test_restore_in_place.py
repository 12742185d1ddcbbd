"""Activations that were in place are so again in the result, where neither values nor gradients can notice."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import srfx
from srfx.ir.effects import is_mutating
from srfx.ir.in_place import make_functional, mark
from srfx.ir.plan import Reason
from srfx.ir.twins import functional_target
from srfx.passes import PassResult, get_pass
from srfx.passes.functionalize import FunctionalizePass
from srfx.passes.restore_in_place import RestoreInPlacePass
from tests.helpers import kill, randomized
from tests.snapshots import trace

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution whose dead channels go, what is tested, and a reader that takes the rest in."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
        self.plain, self.linear = nn.ReLU(), nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(8, 4, 4))
        self.head = nn.Linear(8, 2)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, x).mean((2, 3)))


def net(middle: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    model = randomized(Net(middle)).double().eval()
    kill(model.conv, [1, 4])
    return model


HITS = {
    "norm": lambda s, x: s.relu(s.norm(s.conv(x))),
    "convolution": lambda s, x: s.relu6(s.conv(x)),
    "linear": lambda s, x: s.relu(s.linear(s.conv(x))),
    "sum": lambda s, x: s.relu(s.conv(x) + s.norm(s.conv(x))),
    "keyword": lambda s, x: F.silu(s.conv(x), inplace=True),
    "position": lambda s, x: F.elu(s.conv(x), 0.5, True),
    "function": lambda s, x: torch.relu_(s.conv(x)),
    "method": lambda s, x: s.conv(x).clamp_(min=0.0),
    "two calls": lambda s, x: s.relu(s.conv(x)) * s.relu(s.norm(s.conv(x))),
}
MISSES = {
    "scale is not made here": lambda s, x: s.conv(x) * F.relu(s.scale, inplace=True),
    "x is not made here": lambda s, x: s.conv(s.relu(x)),
    "it takes several operands": lambda s, x: s.conv(x).clamp_(min=s.conv(x).mean()),
    "the backward of sigmoid may read": lambda s, x: s.relu(torch.sigmoid(s.conv(x))),
    "the backward of plain may read": lambda s, x: s.relu(s.plain(s.conv(x))),
    "conv may be read under another name": lambda s, x: operator.mul(
        *(lambda y: (y.exp(), s.relu6(y)))(s.conv(x))
    ),
    "the backward of getitem may read": lambda s, x: F.pad(s.relu(s.conv(x)[:, :, 1:]), (0, 0, 1, 0)),
}


def writes(gm: fx.GraphModule) -> int:
    return sum(is_mutating(node) for node in gm.graph.nodes)


def assert_like(model: nn.Module, small: nn.Module) -> None:
    """The same values, and the same gradient of the input."""
    found = []
    for m in (model, small):
        x = X.clone().requires_grad_(True)
        y = m(x * 1.0)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y, gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("name", HITS)
def test_what_was_in_place_is_so_again(name: str, route: str) -> None:
    model = net(HITS[name])
    traced = trace(model, (X,), route)
    small = srfx.minimize(traced, X)
    assert writes(small) == writes(traced) == (2 if name == "two calls" else 1)
    assert small.get_parameter("conv.weight").shape[0] == 6
    assert_like(model, small)
    again = srfx.minimize(small, X)
    assert again.code == small.code
    assert writes(again) == writes(small)


def test_what_was_functional_stays_so() -> None:
    small = srfx.minimize(net(lambda s, x: F.relu(s.plain(s.conv(x)) + 0.0)), X)
    assert not writes(small)


@pytest.mark.parametrize("reason", MISSES)
def test_what_could_be_noticed_stays_functional(reason: str) -> None:
    """Marked as what was in place, and yet it must not be so: here the user did not write it in place."""
    gm = fx.symbolic_trace(net(MISSES[reason]))
    for node in gm.graph.nodes:
        if is_mutating(node):
            found = written(gm, node)
            break
    assert [r.reason for r in found.refusals] == [Reason.MUTATION]
    assert reason in found.refusals[0].detail
    assert not found.edits


def written(gm: fx.GraphModule, node: fx.Node) -> PassResult:
    """Make one write functional, whatever it does to others, and ask for it back."""
    if node.op == "call_module":
        gm.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
        mark(node, node.target)
    else:
        make_functional(node, functional_target(node))
    return RestoreInPlacePass()(gm)


def test_a_module_is_in_place_in_all_its_calls_or_in_none() -> None:
    model = net(lambda s, x: s.relu(s.relu(s.conv(x)).sigmoid() + s.conv(x)) * s.relu(s.conv(x).abs()))
    small = srfx.minimize(model, X)
    assert not writes(small)
    assert not small.get_submodule("relu").inplace
    assert_like(model, small)


def test_a_mark_says_nothing_of_another_op() -> None:
    gm = fx.symbolic_trace(net(lambda s, x: F.relu(s.conv(x), inplace=True)))
    FunctionalizePass()(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=F.relu)
    node.target = torch.sigmoid
    node.kwargs = {}
    assert not RestoreInPlacePass()(gm).edits
    assert not writes(gm)


@pytest.mark.parametrize("name", ["norm", "keyword", "function", "method"])
def test_results_in_place_are_saved_exported_and_trained(name: str, tmp_path: Path) -> None:
    model = net(HITS[name])
    small = srfx.minimize(model, X)
    srfx.save(small, tmp_path / "small.srfx")
    loaded = srfx.load(tmp_path / "small.srfx")
    assert writes(loaded) == 1
    exported = torch.export.export(small, (X,)).module()
    for other in (loaded, exported, pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert_like(small, other)
    small.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p is not small.get_parameter("head.bias"))
    assert get_pass("restore-in-place").name == RestoreInPlacePass.name


class Chain(nn.Module):
    """Steps of a producer and an activation in place, some with a second reader of what the activation writes over."""

    def __init__(self, steps: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in steps)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in steps)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = 0.0
        for (kind, is_read), layer, norm in zip(self.steps, self.layers, self.norms, strict=True):
            y = layer(x)
            y = norm(y) if kind == "norm" else y + x if kind == "sum" else y.tanh() if kind == "tanh" else y
            if is_read:
                seen = seen + y.exp().mean()
            x = F.relu(y, inplace=True) if kind != "tanh" else F.relu(y).clone()
        return self.head(x.mean((2, 3))) + seen


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.sampled_from(["layer", "norm", "sum", "tanh"]), st.booleans()), min_size=1, max_size=4
    )
)
def test_any_chain_of_writes(steps: list[tuple[str, bool]]) -> None:
    """Values and gradients are those of the original, and all writes that nobody can notice are there."""
    model = randomized(Chain(steps)).double().eval()
    small = srfx.minimize(fx.symbolic_trace(model), X)
    assert writes(small) == sum(kind != "tanh" and not is_read for kind, is_read in steps)
    assert_like(model, small)
