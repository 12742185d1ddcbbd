"""The functions as nodes of a torch.fx graph, and what they refuse."""

import copy
import pickle

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from srfx.nn import (
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    RemovedConstants,
    functional,
)
from srfx.nn.functional import compensated_group_norm, compensated_layer_norm, compensated_rms_norm

GONE = RemovedConstants.from_values([1.0, 2.0])


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(x)) * 2


CASES = [
    (CompensatedLayerNorm(4, GONE, emits=("r",)), functional.compensated_layer_norm, (3, 4)),
    (CompensatedLayerNorm(4, GONE, elementwise_affine=False), functional.compensated_layer_norm, (3, 4)),
    (CompensatedRMSNorm(4, 6, 1.5), functional.compensated_rms_norm, (3, 4)),
    (
        CompensatedGroupNorm([0, 1, 1], [RemovedConstants.from_values([2.0]), RemovedConstants()]),
        functional.compensated_group_norm,
        (2, 3, 5),
    ),
]


@pytest.mark.parametrize(("norm", "function", "shape"), CASES)
def test_symbolic_trace_shows_one_call(norm: nn.Module, function: object, shape: tuple[int, ...]) -> None:
    traced = torch.fx.symbolic_trace(Model(norm))
    calls = [node for node in traced.graph.nodes if node.target is function]
    assert len(calls) == 1
    assert calls[0].op == "call_function"
    attributes = {node.target for node in traced.graph.nodes if node.op == "get_attr"}
    assert attributes == {f"norm.{name}" for name in norm.state_dict() if not name.endswith("extra_state")}
    x = torch.randn(shape)
    again = pickle.loads(pickle.dumps(copy.deepcopy(traced)))
    for graph_module in (traced, again, torch.fx.symbolic_trace(traced)):
        assert [n.target for n in graph_module.graph.nodes].count(function) == 1
        assert torch.equal(graph_module(x), Model(norm)(x))


@pytest.mark.parametrize(("norm", "function", "shape"), CASES)
def test_a_tracer_may_keep_the_module(norm: nn.Module, function: object, shape: tuple[int, ...]) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, type(norm)) or super().is_leaf_module(m, module_qualified_name)

    graph = Tracer().trace(Model(norm))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["norm"]


def test_imported_by_name_it_is_one_node_too() -> None:
    def forward(x: Tensor) -> Tensor:
        y = compensated_layer_norm(x, (4,), 6, 1.5, 0.5)
        return compensated_rms_norm(y, (4,), 6, 1.0)

    traced = torch.fx.symbolic_trace(forward)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [compensated_layer_norm, compensated_rms_norm]


def test_layer_norm_refusals() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"must end in normalized_shape \[3\].*got \[2, 4\]"):
        compensated_layer_norm(x, (3,), 6)
    with pytest.raises(ValueError, match="1 to 3"):
        compensated_layer_norm(x, (4,), 3)
    with pytest.raises(ValueError, match="one normalised axis"):
        compensated_layer_norm(x, (2, 4), 12, emits=("r",))
    for wrong in (("q",), ("r", "r")):
        with pytest.raises(ValueError, match="distinct names"):
            compensated_layer_norm(x, (4,), 6, emits=wrong)


def test_rms_norm_refusals() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="no mean"):
        compensated_rms_norm(x, (4,), 6, emits=("mu_r",))
    with pytest.raises(ValueError, match="most 3"):
        compensated_rms_norm(x, (4,), 3)
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        compensated_rms_norm(x, (5,), 6)


def test_group_norm_refusals() -> None:
    with pytest.raises(ValueError, match="3 channels on axis 1"):
        compensated_group_norm(torch.zeros(2, 4), torch.tensor([0, 0, 1]), 2, (0.0, 0.0), (0.0, 0.0))
    with pytest.raises(ValueError, match="got 2 and 1"):
        compensated_group_norm(torch.zeros(2, 3), torch.tensor([0, 0, 1]), 2, (0.0, 0.0), (0.0,))
