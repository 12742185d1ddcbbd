"""Errors that no other test meets: each names what was found, where, and what to do."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

import srfx
from srfx.cycle import pruners, state
from srfx.errors import (
    CaptureError,
    CycleError,
    DamagedFileError,
    FileError,
    PlanError,
    ShapeMismatchError,
    UnsavableError,
    UnsupportedModelError,
)
from srfx.files import exported, graphs, trees
from srfx.files.values import Decoder
from srfx.ir.checks import check_graph
from srfx.ir.live import parameter
from srfx.nn.functional import stored_outputs
from srfx.ops.linear import Linear
from srfx.ops.registry import op_rule
from tests.helpers import masked, randomized

X = torch.randn(2, 3)


def network() -> nn.Sequential:
    return randomized(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))


def small_network() -> fx.GraphModule:
    return srfx.minimize(masked(network(), rows=0.3), X)


# ---------------------------------------------------------------------- models
def test_torchscript_has_no_code_to_trace() -> None:
    with pytest.raises(CaptureError, match=r"TorchScript.*give the nn\.Module it was made from"):
        srfx.minimize(torch.jit.script(network()), X)


def test_wrapper_tensors_are_named() -> None:
    model = network()
    weight = model[2].weight.detach()
    model[2].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(UnsupportedModelError, match=r"2\.weight is a TwoTensor: give a model of plain"):
        srfx.minimize(model, X)


def test_a_graph_without_an_output() -> None:
    gm = fx.symbolic_trace(network())
    gm.graph.erase_node(gm.graph.output_node())
    with pytest.raises(CaptureError, match="no output node"):
        check_graph(gm)


def test_inputs_of_another_structure_than_the_exported_one() -> None:
    class Pair(nn.Module):
        def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
            return x[0] + x[1]

    program = torch.export.export(Pair(), ((X, X),))
    with pytest.raises(CaptureError, match=r"(?s)do not match the exported signature: expected .*, got"):
        srfx.minimize(program, ((X, X, X),))


def test_a_parameter_of_another_model() -> None:
    with pytest.raises(ShapeMismatchError, match=r"no parameter '7\.weight'; was it made for another model"):
        parameter(network(), "7.weight")


def test_outputs_of_a_norm_beyond_its_channels() -> None:
    with pytest.raises(
        ValueError, match=r"positions below 3, at least one where nothing is emitted, got \[5\]"
    ):
        stored_outputs([5], 3, 0, None)
    with pytest.raises(ValueError, match=r"at least one where nothing is emitted, got \[\]"):
        stored_outputs([], 3, 0, None)


def test_a_target_has_one_rule() -> None:
    with pytest.raises(ValueError, match=r"Linear.* has a rule already: Linear, Linear"):
        op_rule(nn.Linear)(Linear)


# ---------------------------------------------------------------------- plans
def test_a_plan_outlives_its_model() -> None:
    model = network()
    plan = srfx.plan(srfx.minimize(model, X))
    gc.collect()
    with pytest.raises(PlanError, match="no longer in memory: give it as `small`"):
        plan.apply_(model)


# ---------------------------------------------------------------------- the cycle
class Shaky(nn.Module):
    """A parametrization that is another one at each call."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rand_like(weight)


def test_a_mask_that_cannot_be_read() -> None:
    def prune(model: nn.Module, amount: float) -> None:
        parametrize.register_parametrization(model.get_submodule("0"), "weight", Shaky())

    with pytest.raises(CycleError, match=r"the mask that the pruner put on 0.* cannot be read"):
        pruners.prune_weights(network(), prune, 0.5)


def test_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    def cycle() -> srfx.SqueezeRelease:
        return srfx.SqueezeRelease(
            network(), lambda _: None, lambda _: 0.0, X, cycles=1, progress=False, checkpoint=tmp_path
        )

    cycle().run()
    found = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(found | {"version": 99}))
    with pytest.raises(CycleError, match="of version 99, expected"):
        cycle()


def test_what_a_checkpoint_cannot_hold() -> None:
    with pytest.raises(CycleError, match=r"state has keys that are no plain data"):
        state.pack({(1, 2): 3}, {})
    model, other = network(), network()
    optimizer = torch.optim.SGD([*model.parameters(), other[0].weight], lr=0.1)
    with pytest.raises(CycleError, match="parameters that are not the model's"):
        state.group_names(optimizer, model)
    with pytest.raises(CycleError, match="has 1 groups, expected 2"):
        state.rebind(optimizer, [["0.weight"], ["0.bias"]], model)


# ---------------------------------------------------------------------- files
def test_a_version_that_is_no_number(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.srfx", metadata={"srfx": "one"})
    with pytest.raises(DamagedFileError, match="its version reads 'one'"):
        srfx.load(tmp_path / "x.srfx")


class Named(Tensor):
    """A tensor class of somebody's own."""


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    small = small_network()
    small.register_buffer("odd", torch.eye(2).to_sparse())
    with pytest.raises(UnsavableError, match=r"odd is torch\.sparse_coo, quantized False"):
        srfx.save(small, tmp_path / "x.srfx")
    small.odd = torch.ones(2).as_subclass(Named)
    with pytest.raises(UnsavableError, match="odd is a Named; only plain tensors"):
        srfx.save(small, tmp_path / "x.srfx")
    assert not list(tmp_path.iterdir())


def test_graphs_that_have_no_form_in_a_file() -> None:
    class Own(CodeGen):
        pass

    with pytest.raises(UnsavableError, match=r"generates its code by .*Own, which has no form here"):
        trees.codegen_data(Own())
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method("__reduce__", (x,)))
    with pytest.raises(UnsavableError, match="calls the method '__reduce__', which a file may not name"):
        graphs.graph_data(graph)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(getattr, (x, "__class__")))
    with pytest.raises(UnsavableError, match=r"reads the attribute \('__class__',\)"):
        graphs.graph_data(graph)


def test_values_that_a_file_may_not_hold() -> None:
    read = Decoder("here")
    with pytest.raises(FileError, match="here: a node has no place here"):
        read({"node": "x"})
    for kind, item in (("named", ["no.Class", 1]), ("class", "no.Class")):
        with pytest.raises(FileError, match=r"the class no\.Class is unknown here: import its module first"):
            read({kind: item})
    with pytest.raises(FileError, match=r"the inputs are of class no\.Class.*import no first, or pass model"):
        trees.spec_of(["no.Class", None, []], "the inputs")


def either(x: Tensor) -> Tensor:
    """A branch that data decide."""
    return x if bool(x.sum() > 0) else -x


def test_a_result_without_a_record_or_a_form_for_export() -> None:
    plain = fx.symbolic_trace(network())
    with pytest.raises(UnsavableError, match="carries no record that tells the shapes of its inputs"):
        exported.export_again(plain, None)

    graph = fx.Graph()
    graph.output(graph.call_function(either, (graph.placeholder("x"),)))
    small = srfx.minimize(fx.GraphModule(nn.Module(), graph), X)
    with pytest.raises(UnsavableError, match="cannot export the minimized model"):
        exported.export_again(small, None)
