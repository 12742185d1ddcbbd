from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from srfx.errors import CaptureError, MissingShapesError
from srfx.ir.capture import capture
from srfx.ir.fake_run import UNKNOWN
from srfx.ir.shapes import hint_inputs, propagate
from tests.snapshots import assert_unchanged, snapshot


def shapes(gm, values):
    return {n.name: tuple(v.shape) if isinstance(v, torch.Tensor) else v for n, v in values.items()}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        n, c = y.shape[0], y.size(1)
        a, b = y.chunk(2, 1)
        y = torch.cat([a, b], 1).view(n, c, -1)
        return self.head(y.mean(-1)), {"c": c}


@pytest.mark.parametrize("train", [False, True])
def test_every_value_is_concrete_and_nothing_real_is_touched(train):
    model = Mixed().train(train)
    before = snapshot(model)
    gm = capture(fx.symbolic_trace(model)).graph_module
    owned = snapshot(gm)
    values = propagate(gm, [torch.randn(2, 3, 9, 9)])
    got = shapes(gm, values)
    assert got["conv"] == got["bn"] == got["relu"] == (2, 8, 5, 5)
    assert values[next(n for n in gm.graph.nodes if n.name == "getattr_1")] == torch.Size([2, 8, 5, 5])
    assert got["size"] == 8
    assert isinstance(got["size"], int)
    assert got["view"] == (2, 8, 25)
    assert got["chunk"][0].shape == (2, 4, 5, 5)
    assert values[next(iter(reversed(gm.graph.nodes)))][1] == {"c": 8}
    assert all(isinstance(v, FakeTensor) for v in values.values() if isinstance(v, torch.Tensor))
    assert_unchanged(model, before)
    assert_unchanged(gm, owned)


def test_agrees_with_a_real_run_in_every_shape_and_dtype():
    gm = fx.symbolic_trace(Mixed().double().eval())
    x = torch.randn(3, 3, 12, 7, dtype=torch.float64)
    real = {}

    class Record(fx.Interpreter):
        def run_node(self, n):
            real[n] = super().run_node(n)
            return real[n]

    Record(gm).run(x)
    for node, value in propagate(gm, [x]).items():
        if isinstance(value, torch.Tensor):
            assert (value.shape, value.dtype) == (real[node].shape, real[node].dtype), node


def test_symbolic_sizes_become_the_exported_ones():
    model = Mixed().eval()
    x = torch.randn(5, 3, 8, 8)
    ep = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    captured = capture(ep)
    assert [tuple(i.shape) for i in captured.inputs] == [(5, 3, 8, 8)]
    values = propagate(captured.graph_module, captured.inputs)
    assert all(type(s) is int for v in values.values() if isinstance(v, torch.Tensor) for s in v.shape)
    sizes = [v for n, v in values.items() if "sym_size" in n.name]
    assert sizes == [5] * len(sizes)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), (2, 3, 224, 224)),
        (
            nn.Sequential(nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 12 * 12, 10)),
            (2, 1, 28, 28),
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 32 * 32, 10)),
            (2, 3, 32, 32),
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), (2, 784)),
        (nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 2, 3)), None),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), (2, 16)),
        (nn.Sequential(nn.Conv1d(7, 4, 3)), (2, 7, 128)),
        (nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 4, 3)), (2, 3, 224, 224)),
        (nn.Sequential(nn.Conv3d(2, 4, 3)), (2, 2, 16, 112, 112)),
        (nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2)), (2, 6, 224, 224)),
    ],
)
def test_probing_finds_the_common_shape(model, expected):
    gm = capture(fx.symbolic_trace(model)).graph_module
    if expected is None:
        with pytest.raises(MissingShapesError, match="example_inputs"):
            hint_inputs(gm)
        return
    (hint,) = hint_inputs(gm)
    assert tuple(hint.shape) == expected
    assert isinstance(propagate(gm)[next(iter(reversed(gm.graph.nodes)))], torch.Tensor)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(10, 6), nn.Embedding(4, 6)

    def forward(self, ids, kinds, mask=None):
        return self.words(ids) + self.places(kinds)


def test_optional_inputs_keep_their_default_and_several_inputs_agree():
    gm = fx.symbolic_trace(TwoInputs())
    ids, kinds, mask = hint_inputs(gm)
    assert ids.shape == kinds.shape
    assert ids.dtype == torch.long
    assert mask is None


def test_example_inputs_are_bound_by_name_and_position():
    gm = fx.symbolic_trace(TwoInputs())
    a, b = torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
    assert hint_inputs(gm, (a,), {"kinds": b})[1] is b
    assert hint_inputs(gm, (a, b))[2] is None
    with pytest.raises(CaptureError, match="kinds"):
        hint_inputs(gm, (a,))
    with pytest.raises(CaptureError, match="nonsense"):
        hint_inputs(gm, (a, b), {"nonsense": 1})


def test_misfit_names_the_node_and_the_shapes():
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(7, 7)))
    with pytest.raises(CaptureError, match=r"_1 \(1\).*\(2, 4, 6, 6\).*example_inputs"):
        propagate(gm, [torch.randn(2, 3, 8, 8)])


def test_data_dependent_values_are_unknown_and_so_is_what_follows():
    class Nonzero(nn.Module):
        def forward(self, x):
            return x.nonzero() + 1, x + 1

    gm = fx.symbolic_trace(Nonzero())
    values = {n.name: v for n, v in propagate(gm, [torch.randn(3)]).items()}
    assert values["nonzero"] is UNKNOWN
    assert values["add"] is UNKNOWN
    assert values["add_1"].shape == (3,)


def test_user_hooks_do_not_run_unless_the_shapes_need_them():
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda m, a, o: seen.append(o))
    propagate(capture(model).graph_module, [torch.randn(2, 4)])
    assert not seen
    widening = nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 2))
    widening[0].register_forward_hook(lambda m, a, o: torch.cat([o, o], -1))
    values = propagate(capture(widening).graph_module, [torch.randn(2, 4)])
    assert next(reversed(values.values())).shape == (2, 2)


def test_shortcut_modules_are_exact_types_only():
    class Doubling(nn.ReLU):
        def forward(self, x):
            return torch.cat([x, x], 1)

    gm = fx.GraphModule({"d": Doubling(), "r": nn.ReLU()}, _chain(["r", "d"]))
    assert next(reversed(propagate(gm, [torch.randn(2, 3)]).values())).shape == (2, 6)


def _chain(names):
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in names:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph
