"""The plan: what was kept is what the result holds, and JSON gives it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx.errors import PlanError, UnknownChannelError
from srfx.record import AxisCut, KeepPlan, TensorPlan
from tests.helpers import kill, masked, randomized
from tests.snapshots import trace

ROOT = Path(__file__).parents[3]


class Net(nn.Module):
    """Dead rows whose constants are folded (a bias is created), a tie, a norm, several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 10, 1, bias=False)
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3))
        return self.head(self.second(torch.relu(self.first(x))))


X = torch.randn(2, 3, 8, 8)


def network() -> Net:
    model = randomized(Net())
    kill(model.stem, rows=[0, 4, 11])
    with torch.no_grad():
        model.norm.bias[[0, 4, 11]] = 2.0
    kill(model.body, rows=[3, 7], columns=[5])
    assert isinstance(model, Net)
    return model


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_kept_indices_are_the_kept_rows(route: str) -> None:
    model = network()
    small = srfx.minimize(trace(model, (X,), route))
    plan = srfx.plan(small)
    assert plan.kept("stem.weight", 0).tolist() == [1, 2, 3, 6, 7, 8, 9, 10]  # 5: nobody reads it
    assert plan.kept("body.weight", 1).tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
    assert plan.kept("stem.weight", 1).tolist() == [0, 1, 2]
    rows = plan.kept("stem.weight", 0)
    assert torch.equal(small.get_parameter("stem.weight"), model.stem.weight[rows])
    assert torch.equal(small.get_buffer("norm.running_mean"), model.norm.running_mean[rows])
    columns = plan.kept("body.weight", 1)
    kept = model.body.weight[plan.kept("body.weight", 0)][:, columns]
    assert torch.equal(small.get_parameter("body.weight"), kept)
    assert [t.name for t in plan.tensors if t.status == "created"] == ["body.bias"]
    assert plan.kept("stem.weight", -4).tolist() == rows.tolist()


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_shapes_agree_with_the_result(route: str, multiple: int) -> None:
    small = srfx.minimize(trace(masked(network()), (X,), route), multiple_of=multiple)
    plan = srfx.plan(small)
    assert plan.options == {"multiple_of": multiple}
    state = {**dict(small.named_parameters(remove_duplicate=False)), **dict(small.named_buffers())}
    for tensor in plan.tensors:
        if tensor.kept_shape is None:
            assert tensor.name not in state
            continue
        for name in (tensor.name, *tensor.aliases):
            assert tuple(state.pop(name).shape) == tensor.kept_shape
        size = list(tensor.shape)
        for cut in tensor.cuts:
            assert size[cut.axis] == cut.size
            size[cut.axis] = cut.layout[cut.axis if len(cut.layout) > 1 else 0]
        assert tuple(size) == tensor.kept_shape
    assert not state


def test_ties_are_one_tensor() -> None:
    plan = srfx.plan(srfx.minimize(fx.symbolic_trace(network()), X))
    tied = plan.tensor("second.weight")
    assert (tied.name, tied.aliases) == ("first.weight", ("second.weight",))
    assert plan.kept("second.weight", 0).tolist() == plan.kept("first.weight", 0).tolist()


def test_json_gives_it_back() -> None:
    plan = srfx.plan(srfx.minimize(fx.symbolic_trace(masked(network())), X))
    text = plan.to_json()
    assert KeepPlan.from_json(text) == plan
    assert KeepPlan.from_json(text).to_json() == text
    data = json.loads(text)
    assert data["version"] == 1
    assert set(data) == {"tensors", "removed_nodes", "added_nodes", "refusals", "options", "graph", "version"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not"),
        ("[]", "version None"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1}', "tensors"),
        ('{"version":1,"tensors":[{}],"refusals":[],"removed_nodes":[],"added_nodes":[]}', "damaged"),
        ('{"version":1,"tensors":[],"refusals":[{"x":1}],"removed_nodes":[],"added_nodes":[]}', "damaged"),
        ('{"version":1,"tensors":[],"refusals":[],"removed_nodes":[],"added_nodes":[],"more":1}', "damaged"),
    ],
)
def test_damaged_plans(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        KeepPlan.from_json(text)


def test_unknown_names() -> None:
    plan = srfx.plan(srfx.minimize(fx.symbolic_trace(network()), X))
    with pytest.raises(UnknownChannelError, match="nothing"):
        plan.kept("nothing", 0)
    with pytest.raises(UnknownChannelError, match="no axis 4"):
        plan.kept("stem.weight", 4)


def test_cuts_compose_and_rows_may_differ() -> None:
    ragged = (
        AxisCut(1, 4, (0, 1, 2, 3, 1, 2), (2, 3)),  # two rows that keep different positions
        AxisCut(1, 3, (0, 2, 1, 2), (2, 2)),
    )
    straight = (AxisCut(0, 6, (1, 3, 5), (3,)), AxisCut(0, 3, (0, 2), (2,)))
    plan = KeepPlan(
        (
            TensorPlan("w", (), "parameter", "float32", "kept", (2, 4), (2, 2), ragged),
            TensorPlan("v", (), "buffer", "int64", "kept", (6,), (2,), straight),
            TensorPlan("u", (), "buffer", "int64", "removed", (6,), None),
        )
    )
    assert plan.kept("v", 0).tolist() == [1, 5]
    assert plan.kept("u", 0).tolist() == []
    assert plan.kept("w", 1).tolist() == [[0, 2], [1, 2]]
    assert KeepPlan.from_json(plan.to_json()) == plan


def test_the_graph_digest_tells_models_apart() -> None:
    same = [srfx.plan(srfx.minimize(fx.symbolic_trace(m), X)).graph for m in (network(), masked(network()))]
    assert same[0] == same[1]  # the weights do not matter
    other = srfx.plan(srfx.minimize(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3))), torch.randn(2, 3)))
    assert other.graph != same[0]


CODE = """
import sys; sys.path.insert(0, ".")
from tests.srfx.record.test_keep_plan import *
print(srfx.plan(srfx.minimize(fx.symbolic_trace(masked(network())), X)).digest())
"""


def test_the_same_in_every_process() -> None:
    found = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == 64
