"""Stacked and bidirectional recurrent layers: one call for each layer and direction, each of a width of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import srfx
from srfx.ir.plan import Reason
from srfx.passes import get_pass
from tests.helpers import check, randomized, relative_error, shapes
from tests.srfx.ops.test_recurrent import FAST, GATES, LAYERS, C, H, N, Net, T, rest, x


@fx.wrap
def pack(x: Tensor, lengths: Tensor) -> Any:
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


@fx.wrap
def unpack(packed: Any) -> Tensor:
    return pad_packed_sequence(packed, batch_first=True)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_widths_of_their_own(name: str) -> None:
    """Two layers, both directions; 1, 2, 3 and 4 units leave."""
    model = Net(name, num_layers=2, bidirectional=True, dropout=0.2)
    left = {}
    for n, suffix in enumerate(("_l0", "_l0_reverse", "_l1", "_l1_reverse"), 1):
        rest(model.layer, list(range(n)), suffix)
        left[suffix[1:]] = H - n
    g = GATES[LAYERS[name]]
    check(model, (x(),), kept={"back.weight": (2, 2 * H - 7)})
    small = srfx.minimize(fx.symbolic_trace(model), (x(),))
    got = shapes(small)
    for path, units in left.items():
        inputs = C if path.startswith("l0") else left["l0"] + left["l0_reverse"]
        assert got[f"layer.{path}.weight_ih_l0"] == (g * units, inputs)
        assert got[f"layer.{path}.weight_hh_l0"] == (g * units, units)
    assert type(small.get_submodule("layer.l1_reverse")) is LAYERS[name]
    assert type(small.get_submodule("layer.between")) is nn.Dropout
    assert not small.get_submodule("layer.between").training


class Classifier(nn.Module):
    """The usual head: the last states of both directions of the upper layer."""

    def __init__(self, kind: type[nn.Module], spelling: str) -> None:
        super().__init__()
        self.layer: Any = kind(6, H, num_layers=2, bidirectional=True, batch_first=True)
        self.back, self.spelling = nn.Linear(2 * H, 2), spelling
        randomized(self)

    def forward(self, x: Tensor) -> Any:
        _, last = self.layer(x)
        h = last[0] if isinstance(self.layer, nn.LSTM) else last
        if self.spelling == "index":
            return self.back(torch.cat([h[-2], h[-1]], 1))
        if self.spelling == "slices":
            return self.back(torch.cat([h[-2, :, :], h[-1, :, :]], -1))
        if self.spelling == "select":
            return self.back(torch.cat([h.select(0, 2), torch.select(h, 0, 3)], 1))
        return self.back(h[2:].transpose(0, 1).flatten(1)), last


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("spelling", ["index", "slices", "select", "whole"])
def test_the_last_states_of_some_layers(kind: type[nn.Module], spelling: str) -> None:
    model = Classifier(kind, spelling)
    rest(model.layer, [1, 2, 3], "_l1")
    rest(model.layer, [4], "_l1_reverse")
    left = 2 * H - 4
    if spelling == "whole":  # one tensor holds the states of all layers: they stay equally wide
        check(model, (torch.randn(N, T, 6),), routes=FAST)
    else:
        check(model, (torch.randn(N, T, 6),), kept={"back.weight": (2, left)})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_states_are_handed_to_each_layer(kind: type[nn.Module]) -> None:
    """Zeros made for all layers are made for each, so that their widths do not depend on each other."""

    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.back = kind(6, H, num_layers=2), nn.Linear(H, 2)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(2, x.size(1), H, dtype=torch.float64)
            y, _ = self.layer(x, (h, h) if isinstance(self.layer, nn.LSTM) else h)
            return self.back(y)

    class Given(Zeros):
        def forward(self, x: Tensor, h: Tensor) -> Any:  # type: ignore[override]
            y, last = self.layer(x, (h, h) if isinstance(self.layer, nn.LSTM) else h)
            return self.back(y), last

    model = Zeros()
    rest(model.layer, [1, 2], "_l0")
    rest(model.layer, [3], "_l1")
    check(model, (x(),), kept={"back.weight": (2, H - 1)}, parameters=_size(kind, 6, H - 2, H - 1))
    given = Given()
    rest(given.layer, [1, 2], "_l0")
    inputs = (x().double(), torch.randn(2, N, H).double())
    small = srfx.minimize(given.double(), inputs)
    (a, last), (b, ours) = given(*inputs), small(*inputs)
    assert relative_error(a, b) < 1e-9
    for wanted, found in zip(last, ours, strict=True):
        assert relative_error(wanted, found) < 1e-9


def _size(kind: type[nn.Module], inputs: int, lower: int, upper: int) -> int:
    g = GATES[kind]
    first, second = g * lower * (inputs + lower + 2), g * upper * (lower + upper + 2)
    return first + second + 2 * upper + 2


def test_projected_and_called_twice() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Any:
            a, _ = self.layer(torch.relu(self.front(x)))
            b, (h, _) = self.layer(torch.relu(self.front(x * 2)))
            return self.back(a + b), h[-1]

    model = Twice("lstm", num_layers=2, proj_size=5)
    rest(model.layer, [1, 2], "_l0")
    rest(model.layer, [3], "_l1")
    check(model, (x(),), routes=FAST)
    small = srfx.minimize(model, (x(),))
    assert shapes(small)["layer.l0.weight_hr_l0"] == (5, H - 2)
    assert shapes(small)["layer.l1.weight_hr_l0"] == (5, H - 1)
    assert sum(n.op == "call_module" and str(n.target).startswith("layer") for n in small.graph.nodes) == 4


def test_dropout_between_layers_follows_train_and_eval() -> None:
    model = Net("gru", num_layers=2, dropout=0.5).train()
    small = srfx.minimize(model, (x(),))
    assert small.get_submodule("layer.between").training
    model.eval()
    small.eval()
    given = x()
    assert torch.equal(small(given), small(given))
    assert relative_error(model(given), small(given)) < 1e-5


# ---------------------------------------------------------------------- refusals
def _refusals(model: nn.Module, given: tuple[Any, ...]) -> set[Reason]:
    gm = fx.symbolic_trace(model)
    return {r.reason for r in get_pass("decompose-recurrent", hints=list(given)).plan(gm).refusals}


def test_a_hook_or_a_forward_of_its_own() -> None:
    model = Net("lstm", num_layers=2)
    model.layer.register_forward_hook(lambda module, args, output: None)
    assert _refusals(model, (x(),)) == {Reason.OPAQUE_HOOK}

    class Own(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
            return super().forward(x * 2, hx)

    model = Net("lstm")
    model.layer = Own(C, H, num_layers=2)
    tracer = _Leaf()
    gm = fx.GraphModule(model, tracer.trace(model))
    plan = get_pass("decompose-recurrent", hints=[x()]).plan(gm)
    assert {r.reason for r in plan.refusals} == {Reason.UNRECOGNISED_CALL}
    given = x()
    assert relative_error(model(given), srfx.minimize(gm, (given,))(given)) < 1e-5


class _Leaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.LSTM) or super().is_leaf_module(m, module_qualified_name)


def test_packed_sequences_are_a_barrier() -> None:
    """Their rows are cut by lengths, which are data: what touches them stays, and the rest leaves."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid, self.front = nn.Linear(6, 9), nn.Linear(9, C)
            self.layer, self.back = nn.LSTM(C, H, batch_first=True), nn.Linear(H, 2)
            randomized(self)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            z = self.front(torch.relu(self.mid(x)))
            y, _ = self.layer(pack(z, lengths))
            return self.back(unpack(y))

    model = Packed().double()
    rest(model.layer, [2])
    model.front.weight.data[:, 4] = 0
    given = (torch.randn(N, T, 6).double(), torch.tensor([4, 2, 3]))
    assert Reason.UNRECOGNISED_CALL in _refusals(model, given)
    small = srfx.minimize(fx.symbolic_trace(model), given)
    assert relative_error(model(*given), small(*given)) < 1e-9
    assert shapes(small)["front.weight"] == (C, 8)
    assert shapes(small)["layer.weight_hh_l0"] == (4 * H, H)


class _Twice(nn.Module):
    """A stacked layer whose results another one reads, or a sum, or nobody."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader
        self.first = nn.LSTM(C, H, num_layers=2, bidirectional=True)
        self.second = nn.GRU(2 * H, H, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[0]
        if self.reader == "layer":
            return self.second(y)[0]
        if self.reader == "nobody":
            return x + 1
        z = y + 0.25
        z.relu_()
        return z


@pytest.mark.parametrize(("reader", "n_calls"), [("layer", 6), ("nobody", 0), ("write in place", 4)])
def test_who_reads_a_stacked_layer(reader: str, n_calls: int) -> None:
    """Found by fuzzing: seeds 91, 131 and 2038."""
    model = randomized(_Twice(reader)).double().eval()
    given = torch.randn(T, N, C, dtype=torch.float64)
    small = srfx.minimize(fx.symbolic_trace(model), given)
    assert relative_error(model(given), small(given)) < 1e-9
    calls = [n for n in small.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(small.get_submodule(str(n.target)), nn.RNNBase) for n in calls) == n_calls
