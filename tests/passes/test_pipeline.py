"""The passes outside minimize: in torch.fx's PassManager, in a Pipeline, and in a pipeline of somebody else's."""

import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import srfx
from srfx.passes import Pipeline
from tests.helpers import assert_equivalent


class Residual(nn.Module):
    """Two branches of 8 channels; five are dead in both, and the norm's shift makes three of them constants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight[3:] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        y += self.b(x)
        return self.head(torch.relu(y))


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Residual().eval().double())


X = torch.randn(4, 6, dtype=torch.float64)


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_pass_manager_reaches_what_minimize_reaches() -> None:
    before, wanted = traced(), srfx.minimize(traced(), X)
    done = PassManager(srfx.default_passes(X), steps=10)(traced())
    assert done.modified
    assert n_parameters(done.graph_module) == n_parameters(wanted) < n_parameters(before)
    assert_equivalent(before, done.graph_module, (X,))


def test_pipeline_reaches_what_minimize_reaches() -> None:
    gm = traced()
    done = Pipeline(srfx.default_passes(X))(gm)
    assert done.graph_module is gm
    assert n_parameters(gm) == n_parameters(srfx.minimize(traced(), X))
    assert_equivalent(traced(), gm, (X,))


def test_beside_a_pass_of_somebody_elses() -> None:
    def double_the_output(gm: fx.GraphModule) -> PassResult:
        output = gm.graph.output_node()
        (result,) = output.args
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(operator.mul, (result, 2)),)
        gm.recompile()
        return PassResult(gm, True)

    gm = PassManager([double_the_output, *srfx.default_passes(X)], steps=1)(traced()).graph_module
    torch.testing.assert_close(gm(X), 2 * traced()(X))
    assert gm.get_submodule("a").weight.shape == (3, 6)


def test_options_reach_the_pass() -> None:
    gm = PassManager(srfx.default_passes(X, multiple_of=4), steps=5)(traced()).graph_module
    assert gm.get_submodule("a").weight.shape == (4, 6)


@pytest.mark.parametrize("inputs", [(X,), X])
def test_one_input_needs_no_tuple(inputs: object) -> None:
    gm = PassManager(srfx.default_passes(inputs), steps=5)(traced()).graph_module
    assert gm.get_submodule("head").weight.shape == (3, 3)
