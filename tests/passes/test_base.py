from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from srfx.errors import PlanError
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.passes import PASSES, HintedPass, Pass, Pipeline, get_pass, register_pass


@dataclass(frozen=True)
class Rename(Edit):
    to: str = ""


class OneAtATime(Pass):
    """Turn one relu into a tanh; refuse every neg."""

    def __init__(self, log=None):
        self.log = [] if log is None else log

    def requires(self, graph_module):
        self.log.append("requires")

    def plan(self, gm):
        self.log.append("plan")
        relus = [n for n in gm.graph.nodes if n.target is torch.relu]
        refusals = [Refusal(n.name, Reason.UNKNOWN_OP) for n in gm.graph.nodes if n.target is torch.neg]
        return Plan([Rename(n.name, "tanh") for n in relus[:1]], refusals)

    def apply(self, gm, edit):
        self.log.append("apply")
        next(n for n in gm.graph.nodes if n.name == edit.node).target = torch.tanh

    def finish(self, gm):
        self.log.append("finish")

    def ensures(self, graph_module):
        self.log.append("ensures")


def graph_module():
    return fx.symbolic_trace(lambda x: torch.relu(torch.neg(torch.relu(x))))


X = torch.randn(5, generator=torch.Generator().manual_seed(0))


def test_steps_run_in_order_and_modified_follows_from_the_edits():
    step, gm = OneAtATime(), graph_module()
    result = step(gm)
    assert step.log == ["requires", "plan", "apply", "finish", "ensures"]
    assert result.graph_module is gm
    assert result.modified
    assert [e.node for e in result.edits] == ["relu"]
    assert [r.node for r in result.refusals] == ["neg"]
    assert torch.equal(gm(X), torch.relu(-torch.tanh(X)))  # recompiled
    step(gm)
    step.log.clear()
    assert not step(gm).modified
    assert step.log == ["requires", "plan", "ensures"]


def test_pipeline_runs_to_the_fixpoint_recompiles_and_keeps_the_last_refusals():
    step, gm = OneAtATime(), graph_module()
    result = Pipeline([step])(gm)
    assert [e.node for _, e in result.edits] == ["relu", "relu_1"]
    assert [r.node for _, r in result.refusals] == ["neg"]
    assert torch.equal(gm(X), torch.tanh(-torch.tanh(X)))
    assert step.recompiles
    assert not Pipeline([step])(gm).modified


class Follows(OneAtATime):
    """Turn a tanh, which only the other pass makes, into a sigmoid."""

    def plan(self, gm):
        return Plan([Rename(n.name) for n in gm.graph.nodes if n.target is torch.tanh][:1])

    def apply(self, gm, edit):
        next(n for n in gm.graph.nodes if n.name == edit.node).target = torch.sigmoid


def test_settle_goes_on_while_an_early_pass_reads_what_a_late_one_wrote():
    gm = graph_module()
    result = Pipeline([Follows(), OneAtATime()]).settle(gm)
    assert [e.node for _, e in result.edits] == ["relu", "relu_1"] * 2
    assert [r.node for r in (refusal for _, refusal in result.refusals)] == ["neg"]
    assert torch.equal(gm(X), torch.sigmoid(-torch.sigmoid(X)))


class BackAgain(OneAtATime):
    """Undo what the other pass does."""

    def plan(self, gm):
        return Plan([Rename(n.name) for n in gm.graph.nodes if n.target is torch.tanh])

    def apply(self, gm, edit):
        next(n for n in gm.graph.nodes if n.name == edit.node).target = torch.relu


def test_passes_that_undo_each_other_are_an_error():
    with pytest.raises(AssertionError, match="after 3 runs of all"):
        Pipeline([OneAtATime(), BackAgain()], max_rounds=3).settle(graph_module())


def test_runs_in_the_pass_manager_of_torch():
    gm = graph_module()
    result = PassManager([OneAtATime(), OneAtATime()], steps=1)(gm)
    assert result.modified
    assert torch.equal(result.graph_module(X), torch.tanh(-torch.tanh(X)))


class Endless(OneAtATime):
    def plan(self, gm):
        return Plan([Rename(next(iter(gm.graph.nodes)).next.name, "tanh")])


def test_a_pass_that_never_settles_is_named():
    with pytest.raises(AssertionError, match=r"'Endless'.*3 rounds"):
        Pipeline([Endless()], max_rounds=3)(graph_module())


class Breaks(OneAtATime):
    def apply(self, gm, edit):
        gm.graph.find_nodes(op="output")[0].args = (None,)
        gm.graph.erase_node(gm.graph.find_nodes(op="call_function", target=torch.relu)[-1])
        gm.graph._insert(gm.graph.create_node("call_module", "nowhere"))


def test_a_broken_result_is_caught_by_lint():
    with pytest.raises((RuntimeError, AttributeError, AssertionError)):
        Breaks()(graph_module())


def test_names_are_unique_and_known():
    with pytest.raises(AssertionError, match=r"'bake-masks' is BakeMasks; OneAtATime"):
        register_pass("bake-masks")(OneAtATime)
    with pytest.raises(PlanError, match=r"no pass is named 'nothing'.*bake-masks"):
        get_pass("nothing")
    assert all(cls.name == name for name, cls in PASSES.items())


def test_hints_are_taken_by_the_passes_that_need_shapes():
    """Whoever runs registered passes hands hints to these, and to no other."""
    hinted = {name for name, cls in PASSES.items() if issubclass(cls, HintedPass)}
    assert hinted == {name for name, cls in PASSES.items() if "hints" in inspect.signature(cls).parameters}
    for name in hinted:
        assert get_pass(name, hints=[X]).hints == [X]
        assert get_pass(name).hints is None


def test_no_second_copy_under_the_name_passes():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "srfx.passes" in done.stderr


def test_edits_are_json_with_tensors_by_shape():
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    assert not get_pass("bake-masks").plan(gm).edits
    assert Rename("a", "b").to_json() == {"kind": "Rename", "node": "a", "to": "b"}
