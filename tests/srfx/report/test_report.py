"""The report's numbers, checked against the modules themselves and against torch's own FLOP counter."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import srfx
from srfx.errors import PlanError
from srfx.record import attach, record_of
from srfx.report.units import count as count_text
from tests.helpers import count, kill, masked, randomized
from tests.snapshots import trace


class Net(nn.Module):
    """Convolutions, a grouped one, a norm, a residual add, a head of which nothing is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(16, 5)
        self.spare = nn.Linear(4, 4)  # nobody calls it

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.body(x)).mean((2, 3)))


X = torch.randn(2, 3, 8, 8)
DEAD = [1, 5, 9, 13]  # one of each group


def network() -> Net:
    model = randomized(Net())
    kill(model.stem, rows=DEAD, bias=True)
    kill(model.norm, rows=DEAD, bias=True)
    kill(model.body[2], rows=DEAD, bias=True)
    kill(model.body[0], rows=[0, 4, 8, 12])
    assert isinstance(model, Net)
    return model


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_totals_are_those_of_the_models(route: str) -> None:
    traced = trace(network(), (X,), route)
    small = srfx.minimize(traced)
    found = srfx.report(small)
    read = {k: v for k, v in traced.named_parameters() if not k.startswith("spare")}
    assert found.before.params == sum(p.numel() for p in read.values())
    assert found.after.params == count(small)
    tensors = [*small.parameters(), *small.buffers()]
    assert found.after.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert found.after.nodes == len(small.graph.nodes)
    assert found.after.params < found.before.params
    for model, flops in ((traced, found.before.flops), (small, found.after.flops)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(found.inputs[0].shape))
        assert flops == counter.get_total_flops()


def test_layers_add_up() -> None:
    small = srfx.minimize(fx.symbolic_trace(network()), X)
    found = srfx.report(small)
    for part in ("params", "flops"):
        for side in ("before", "after"):
            rows = sum(getattr(row, f"{part}_{side}") for row in found.layers)
            assert rows == getattr(getattr(found, side), part), (part, side)
    layers = {row.name: row for row in found.layers}
    assert list(layers)[:3] == ["stem", "norm", "body.0"]  # in order of execution
    assert layers["stem"].kind == "Conv2d"
    assert layers["stem"].shape_before == (16, 3, 3, 3)
    assert layers["stem"].shape_after == tuple(small.get_submodule("stem").weight.shape) != (16, 3, 3, 3)


def test_exported_graphs_have_rows_by_path_of_their_tensors() -> None:
    small = srfx.minimize(trace(network(), (X,), "export"))
    rows = {row.name: row for row in srfx.report(small).layers}
    assert rows["stem"].kind == "conv2d"
    assert rows["stem"].shape_before == (16, 3, 3, 3)


def test_text() -> None:
    small = srfx.minimize(network(), X)
    found = srfx.report(small)
    text = str(found)
    for row in found.layers:
        assert row.name in text
    for n in (found.before.params, found.after.params):
        assert count_text(n) in text
    for word in ("parameters", "bytes", "FLOPs", "2x3x8x8", "16x3x3x3"):
        assert word in text, word
    assert "\x1b" not in text


def test_json_and_html() -> None:
    found = srfx.report(srfx.minimize(network(), X))
    data = json.loads(found.to_json())
    assert data["after"]["params"] == found.after.params
    assert len(data["layers"]) == len(found.layers)
    html = found._repr_html_()
    assert html.startswith("<table>")
    assert "stem" in html
    assert html.count("<tr>") == len(found.layers) + 1


def test_what_is_gone_is_said_to_be_gone() -> None:
    small = srfx.minimize(fx.symbolic_trace(network()), X)
    record = record_of(small)
    assert record is not None
    tensors = [
        dataclasses.replace(t, status="removed", kept_shape=None, cuts=()) if t.name.startswith("head") else t
        for t in record.plan.tensors
    ]
    attach(small, dataclasses.replace(record, plan=dataclasses.replace(record.plan, tensors=tuple(tensors))))
    found = srfx.report(small)
    row = next(row for row in found.layers if row.name == "head")
    assert (row.shape_before, row.shape_after) == ((5, 16), None)
    assert (row.params_before, row.params_after) == (85, 0)
    assert "gone" in str(found)
    assert "gone" in found._repr_html_()


def test_unread_tensors_are_listed() -> None:
    for form in (network(), fx.symbolic_trace(network()), torch.export.export(network(), (X,))):
        unread = srfx.report(srfx.minimize(form, X)).unread
        assert set(unread) <= {"spare.weight", "spare.bias"}
    assert unread == () or len(unread) == 2
    assert srfx.report(srfx.minimize(network(), X)).unread == ("spare.weight", "spare.bias")


def test_masks_are_not_unread() -> None:
    model = randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    nn.utils.prune.random_structured(model[0], "weight", 0.5, 0)
    nn.utils.parametrizations.weight_norm(model[2])
    found = srfx.report(srfx.minimize(fx.symbolic_trace(model), torch.randn(2, 6)))
    assert found.unread == ()
    assert [row.name for row in found.layers] == ["0", "2"]
    assert found.before.params == 6 * 8 + 8 + 8 * 3 + 3


@fx.wrap
def odd(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1)


class Odd(nn.Module):
    """An op nobody knows, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(odd(odd(self.a(x))))))


def test_refusals_and_unknown_ops() -> None:
    small = srfx.minimize(fx.symbolic_trace(masked(randomized(Odd()))), torch.randn(2, 5))
    found = srfx.report(small)
    assert found.unknown_ops == {"odd": 2}
    notes = [r for r in found.refusals if r.reason == "UNKNOWN_OP"]
    assert [r.node for r in notes] == ["odd", "odd_1"]
    assert notes[0].n_channels == 8  # those of a's output
    text = str(found)
    assert "unknown op  odd: 2 calls" in text
    assert "no rule for this op, 8 channels: odd (odd), odd_1 (odd)" in text


def test_revived_channels() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)))
    kill(model[0], rows=range(3, 16))
    traced = fx.symbolic_trace(model)
    assert srfx.report(srfx.minimize(traced, torch.randn(2, 5))).revived == {}
    found = srfx.report(srfx.minimize(traced, torch.randn(2, 5), multiple_of=8))
    assert found.revived == {"MULTIPLE_OF": 5}
    assert "revived     5 channels: the count must be a multiple" in str(found)


def test_only_minimized_models_have_a_report() -> None:
    for what in (srfx.report, srfx.plan):
        with pytest.raises(PlanError, match="Linear"):
            what(nn.Linear(3, 3))


def test_a_report_pickles() -> None:
    found = srfx.report(srfx.minimize(network(), X))
    assert pickle.loads(pickle.dumps(found)) == found
