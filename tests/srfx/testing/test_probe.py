"""The probe finds what could go, calls nothing removable that is needed, and says why a class stayed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import srfx
from srfx.analysis import analyse
from srfx.analysis.why import MEANINGS
from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.ir.shapes import survey
from srfx.testing import Probe, ValueProbe, probe
from srfx.testing.observe import Observer
from srfx.testing.probe import examine
from srfx.testing.resample import Resampler
from tests.helpers import kill, randomized
from tests.snapshots import assert_unchanged, snapshot, trace


def of(found: Probe, node: str, axis: int = 1) -> ValueProbe:
    return next(v for v in found.values if (v.node, v.axis) == (node, axis))


def perceptron() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    randomized(net)
    kill(net[0], rows=(1, 5))
    kill(net[2], columns=(2,))
    return net.double()


X = torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_what_is_still_and_what_is_unread(route: str) -> None:
    net = trace(perceptron(), (X,), route)
    found = probe(net, X)
    node = "_0" if route == "symbolic" else "linear"
    assert of(found, node) == ValueProbe(node, 1, 8, (1, 5), (2,))
    assert found.n_removable == 3
    assert found.share == 1.0
    assert not found.leftovers
    assert found.n_classes == 8 + 6 + 2


def test_of_a_minimized_model_nothing_is_left() -> None:
    found = probe(srfx.minimize(perceptron(), X), X)
    assert (found.n_removable, found.n_classes) == (0, 5 + 6 + 2)


def test_the_model_is_not_touched() -> None:
    net = perceptron()
    before = snapshot(net)
    probe(net, X)
    assert_unchanged(net, before)


def test_it_repeats_itself() -> None:
    assert probe(perceptron(), X) == probe(perceptron(), X)


class Cut(nn.Module):
    """An op without a rule between two layers: all its channels are pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.vander(torch.vander(self.a(x)[0], 3).sum(-1), 6))
        return y


def test_a_pinned_class_is_left_with_its_reason() -> None:
    net = randomized(Cut()).double()
    kill(net.a, rows=(0,), bias=True)
    found = probe(net, X)
    assert found.n_removable == 1
    assert found.n_gone == 0
    assert found.reasons == {Reason.UNKNOWN_OP.name: 1}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.sigmoid(self.a(torch.sigmoid(self.a(self.front(x))))))
        return y


def test_a_constant_that_a_shared_layer_cannot_absorb() -> None:
    net = randomized(Shared()).double()
    kill(net.front, rows=(3,))
    kill(net.a, rows=(3,))
    found = probe(net, X)
    assert found.reasons == {Reason.SHARED_WEIGHT.name: 1}
    left = found.leftovers[0]
    assert left.site == "a_1"
    assert ("a", 1, 3) in left.members
    assert "used at several sites" in str(left)


def test_a_carrier_and_a_block() -> None:
    """Two groups of two channels: with one gone the other group needs two, so the dead one is held."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2),
                        nn.Conv2d(4, 2, 1))  # fmt: skip
    randomized(net)
    kill(net[0], rows=(0, 2))
    kill(net[2], rows=(1,))
    found = probe(net.double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert found.reasons == {"CARRIER": 1}
    assert (found.n_unneeded, found.n_removable, found.n_held) == (3, 2, 1)
    assert "1 more are not needed, but for equal counts" in str(found)


class Heads(nn.Module):
    """Self-attention of two heads with four lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(n, 8) for n in (6, 6, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        z: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return z


def test_lanes_that_equal_counts_hold_are_not_removable() -> None:
    """Head 0 loses values 1 and 2, head 1 loses one: two go, the third stays because head 1 has three."""
    net = randomized(Heads()).double()
    kill(net.o, columns=(1, 2, 4))
    found = probe(net, torch.randn(2, 5, 6, dtype=torch.float64))
    assert (found.n_unneeded, found.n_removable, found.n_gone, found.n_held) == (3, 2, 2, 1)
    net = randomized(Heads()).double()
    kill(net.o, columns=(0, 1, 2, 3))
    found = probe(net, torch.randn(2, 5, 6, dtype=torch.float64))
    assert (found.n_held, found.share) == (0, 1.0)  # a head that goes holds nothing


def test_lanes_kept_beyond_equal_counts_are_removable() -> None:
    """Were the analysis to keep a lane of each head for no reason, the probe would say so."""
    net = randomized(Heads()).double()
    kill(net.o, columns=(1, 2, 4, 5))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    gm = trace(net, (x,), "symbolic")
    facts, sites = analyse(gm, survey(gm, [x]).values)
    projected = next(site.node for site in sites if site.node.name == "v")
    values = facts.classes.representative[facts.fields(projected)[2].flatten()]
    assert not bool(facts.kept[values[[1, 4]]].any())
    facts.kept[values[[1, 4]]] = True
    found = examine(facts, sites, [x], 2, 2, 0)
    assert (found.n_removable, found.n_gone, found.n_held) == (4, 2, 0)


def test_the_last_channel_and_a_template() -> None:
    """A constant network keeps one channel of its output for the shape, and the template that fills it up."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    randomized(net)
    kill(net[0], rows=(0, 1, 2))
    found = probe(net.double(), X)
    assert found.reasons == {Reason.LAST_CHANNEL.name: 1}
    assert found.n_removable == 3
    small = probe(srfx.minimize(net, X), X)
    assert set(small.reasons) <= {"RESTORED", Reason.LAST_CHANNEL.name}


class Sized(nn.Module):
    """A number of an output's shape is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        y = torch.relu(self.a(x))
        return y, y.shape[0]


def test_an_output_that_is_a_size_holds_nothing() -> None:
    net = randomized(Sized()).double()
    kill(net.a, rows=(0, 1, 2))
    assert probe(net, X).reasons == {Reason.LAST_CHANNEL.name: 1}


class Gate(nn.Module):
    """A deep chain of rectifiers of width one, a product, a softmax: varying though most draws see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(1, 1), nn.ReLU())])
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        return self.chain(x[..., :1]), scores


def test_nothing_needed_is_called_removable() -> None:
    net = randomized(Gate()).double()
    found = probe(net, torch.randn(2, 5, 4, dtype=torch.float64))
    assert found.n_removable == 0, str(found)


def test_keys_that_do_not_vary_leave_their_queries_unread() -> None:
    net = randomized(Gate()).double()
    kill(net.k, rows=(1,))
    found = probe(net, torch.randn(2, 5, 4, dtype=torch.float64))
    assert of(found, "q", 2).unread == (1,)
    assert of(found, "k", 2).still == (1,)
    assert found.share == 1.0
    assert found.n_removable == 1


def test_integer_inputs_and_masks() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.head(self.table(ids) * mask.unsqueeze(-1))
            return y

    net = randomized(Words()).double()
    with torch.no_grad():
        net.table.weight[:, 2] = 0
    ids, mask = torch.randint(0, 7, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    found = probe(net, (ids, mask))
    assert of(found, "table", 2).still == (2,)
    assert found.n_removable == 1
    assert found.share == 1.0


def test_read_alone_or_together() -> None:
    """Either of two equal channels may go as far as the maximum is concerned, not both."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z: Tensor = self.b(torch.sign(y) + y.detach().floor())  # no gradient, and yet read
            return z

    found = probe(randomized(Both()).double(), X)
    assert found.n_removable == 0, str(found)


def test_ties_stay_ties_and_zeros_stay_zeros() -> None:
    net = randomized(Shared()).double()
    kill(net.front, rows=(3,))
    kill(net.a, rows=(3,))
    net.b = nn.Linear(4, 4)
    net.b.weight = net.a.weight
    gm = capture(net, X).graph_module
    drawn = Resampler(gm, 0)
    for i in range(6):
        drawn.draw(i)
        weight = drawn.copy.get_parameter("a.weight")
        assert weight is drawn.copy.get_parameter("b.weight")
        assert torch.equal(weight == 0, net.a.weight == 0)
        assert not torch.equal(weight, net.a.weight)
    assert bool((net.a.weight[3] == 0).all())


def test_statistics_stay_variances() -> None:
    drawn = Resampler(capture(nn.BatchNorm1d(4).eval(), X).graph_module, 0)
    for i in range(6):
        drawn.draw(i)
        assert bool((drawn.copy.get_buffer("running_var") > 0).all())


def test_a_model_that_is_never_finite_tells_nothing() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(-self.a(x).abs())

    found = probe(randomized(Log()).double(), X)
    assert (found.n_draws, found.n_removable, found.share) == (0, 0, 1.0)


def test_values_written_in_place_count_as_read() -> None:
    gm = capture(perceptron(), X).graph_module
    observer = Observer(gm, {"_0": (1, 8)}, [X], is_aliased=True)
    observer.draw(0)
    observer.confirm()
    assert bool(observer.read["_0"].all())
    assert (~observer.varies["_0"]).nonzero()[:, 1].tolist() == [1, 5]


def test_it_prints_and_goes_to_json() -> None:
    net = randomized(Shared()).double()
    kill(net.front, rows=(3,))
    kill(net.a, rows=(3,))
    found = probe(net, X)
    text = str(found)
    assert "1 could go, 0 go (0.0 %)" in text
    assert "SHARED_WEIGHT" in text
    assert "1 never vary (3)" in text
    data: dict[str, Any] = json.loads(found.to_json())
    assert data["share"] == 0.0
    assert data["leftovers"][0]["site"] == "a_1"


def test_every_reason_has_words() -> None:
    assert not set(MEANINGS) & set(Reason.__members__)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False}], ids=str
)
def test_units_of_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """A unit that only the layer itself reads is read; one that nothing reads, or that stays at rest, goes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.layer = nn.Linear(3, 4), kind(4, 5, **options)
            self.back = nn.Linear(10 if options.get("bidirectional") else 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.layer(self.front(x))[0])

    model = randomized(Net())
    kill(model.front, [1])
    with torch.no_grad():
        model.back.weight[:, [0, 1]] = 0  # unit 0 is read by others through W_hh, unit 1 by nobody
        for name, p in model.layer.named_parameters():
            if name.startswith("weight_hh_l0"):
                p[:, 1] = 0
            if name.endswith("l0"):
                p.view(-1, 5, *p.shape[1:])[:, 2] = 0  # unit 2 stays at rest
            if name.startswith("weight_ih_l1"):
                p[:, 1] = 0
    found = probe(model, torch.randn(6, 2, 3))
    assert found.n_removable >= 2
    assert {left.reason for left in found.leftovers} <= {"GROWS"}
    assert bool(found.leftovers) == (options == {"bias": False})


def test_a_constant_state_of_a_cell_that_is_used_twice() -> None:
    """The second step reads a constant in its state: its bias is not its own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.back = nn.RNNCell(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.back(self.cell(x[1], self.cell(x[0])))
            return y

    model = randomized(Net())
    with torch.no_grad():
        model.cell.weight_ih[1] = 0  # a constant after the first step
        model.cell.weight_hh[1] = 0  # and the same after the second
    found = probe(model, torch.randn(2, 6, 3))
    assert found.reasons == {"SHARED_WEIGHT": 1}


def test_a_branch_that_adds_a_constant_is_not_there() -> None:
    """Which operand a sum does not read is known once it is known what of the sum is live."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(3, 4)
            self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.front(x)
            scores = (self.q(y) @ self.k(y).transpose(-1, -2)) / 2.0
            return torch.tanh(y + self.o(scores.softmax(-1) @ y))

    model = randomized(Net())
    model.o.weight.data.zero_()
    found = probe(model, torch.randn(2, 5, 3))
    assert found.n_removable == 4
    assert not found.leftovers


def test_a_position_that_is_an_output_is_read() -> None:
    """The largest of equal numbers stands anywhere: the constants stay, and the reason is given."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.front(x)
            return y.amax(1), y.argmax(1)

    model = randomized(Net())
    kill(model.front, [1, 3])
    found = probe(model, torch.randn(2, 5, 3))
    assert found.reasons == {Reason.DATA_DEPENDENT.name: 2}


def test_a_product_absorbs_constants_as_a_layer_does() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = randomized(nn.Linear(3, 5)), nn.Parameter(torch.rand(5, 2) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.front(x) @ self.back

    model = Net()
    kill(model.front, [1, 3])
    found = probe(model, torch.randn(6, 3))
    assert found.n_removable == 2
    assert not found.leftovers


def test_constants_of_a_norm_whose_reader_is_not_linear() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)))
    kill(model[0], [1, 3])
    found = probe(model, torch.randn(6, 3))
    assert {left.reason for left in found.leftovers} <= {"NOT_LINEAR_IN_NORM"}
    kill(model[3], columns=[1, 3])
    found = probe(model, torch.randn(6, 3))
    assert found.n_removable > 0
    assert not found.leftovers
