"""Recurrent layers and cells: units nobody needs, units that stay at rest, constants of the operand (Lemmas Q1 to Q4)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import srfx
from srfx.ir.plan import Reason
from tests.helpers import Inputs, assert_equivalent, check, count, randomized, relative_error, shapes

C, H, P, T, N = 7, 8, 5, 4, 3
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
FAST = ["symbolic"]
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell}


def _options(name: str) -> dict[str, Any]:
    return {"nonlinearity": "relu"} if name == "rnn_relu" else {}


class Net(nn.Module):
    """back(layer(relu(front(x)))); ``returns`` says what of the layer's results is read."""

    def __init__(self, name: str, returns: str = "output", **options: Any) -> None:
        super().__init__()
        self.returns = returns
        self.front = nn.Linear(6, C)
        self.layer = LAYERS[name](C, H, **_options(name), **options)
        width = options.get("proj_size", H) * (2 if options.get("bidirectional") else 1)
        self.back = nn.Linear(width, 2)
        self.has_cell = name == "lstm"
        randomized(self)

    def forward(self, x: Tensor) -> Any:
        y, last = self.layer(torch.relu(self.front(x)))
        return self.finish(y, last)

    def finish(self, y: Tensor, last: Any) -> Any:
        if self.returns == "output":
            return self.back(y)
        h = last[0] if self.has_cell else last
        if self.returns == "last":
            return self.back(h[-1])
        return self.back(y), last


def _rows(layer: nn.Module, suffix: str = "_l0") -> dict[str, Tensor]:
    """Weights by gate, [G, H, ..]."""
    found = {}
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        tensor = getattr(layer, name + suffix, None)
        if isinstance(tensor, Tensor):
            found[name] = tensor.data.view(-1, layer.hidden_size, *tensor.shape[1:])  # type: ignore[operator]
    return found


def rest(layer: nn.Module, units: list[int], suffix: str = "_l0") -> None:
    """Units whose candidate is zero."""
    for tensor in _rows(layer, suffix).values():
        tensor[-1 if tensor.shape[0] == 3 else 2 if tensor.shape[0] == 4 else 0, units] = 0


def unread(layer: nn.Module, back: nn.Linear, units: list[int], suffix: str = "_l0") -> None:
    """Units that nothing reads."""
    getattr(layer, "weight_hh" + suffix).data[:, units] = 0
    back.weight.data[:, units] = 0


def dead_inputs(model: Net) -> None:
    """One channel of the operand is a positive constant, one is 0, one is not read."""
    model.front.weight.data[[0, 1]] = 0
    model.front.bias.data[0], model.front.bias.data[1] = 0.7, -0.3
    for name, parameter in model.layer.named_parameters():
        if name.startswith("weight_ih_l0"):
            parameter.data[:, 2] = 0


def x() -> Tensor:
    return torch.randn(T, N, 6)


# ---------------------------------------------------------------------- one layer
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("returns", ["output", "last", "all"])
def test_units_and_inputs_leave(name: str, returns: str) -> None:
    model = Net(name, returns)
    rest(model.layer, [2, 6])
    unread(model.layer, model.back, [5])
    dead_inputs(model)
    g, left = GATES[LAYERS[name]], H - 2 - (returns != "all")
    kept = {
        "front.weight": (C - 3, 6),
        "layer.weight_ih_l0": (g * left, C - 3),
        "layer.weight_hh_l0": (g * left, left),
        "layer.bias_ih_l0": (g * left,),
        "back.weight": (2, left),
    }
    found = check(model, (x(),), kept=kept)
    layer = found["symbolic"].small.get_submodule("layer")
    assert type(layer) is LAYERS[name]
    assert (layer.input_size, layer.hidden_size) == (C - 3, left)


@pytest.mark.parametrize("name", LAYERS)
def test_liveness_runs_through_the_recurrent_weight(name: str) -> None:
    """Unit 1 is read by unit 2 only, 2 by 3 only, 3 by nobody: all three leave; when 3 is read, none does."""
    model = Net(name)
    hh = _rows(model.layer)["weight_hh"]
    hh[:, :, [1, 2, 3]] = 0
    hh[:, 2, 1] = hh[:, 3, 2] = 0.5
    model.back.weight.data[:, [1, 2, 3]] = 0
    check(model, (x(),), kept={"back.weight": (2, H - 3)}, routes=FAST)
    model.back.weight.data[0, 3] = 1
    check(model, (x(),), kept={"back.weight": (2, H)}, routes=FAST)


@pytest.mark.parametrize("name", LAYERS)
def test_rest_runs_through_the_recurrent_weight(name: str) -> None:
    """A candidate that reads only units at rest is at rest; a cycle of such units confirms itself."""
    model = Net(name)
    rest(model.layer, [1, 2, 3])
    hh = _rows(model.layer)["weight_hh"]
    candidate = {4: 2, 3: 2, 1: 0}[hh.shape[0]]
    hh[candidate, 1, 2] = hh[candidate, 2, 3] = hh[candidate, 3, 1] = 0.7
    check(model, (x(),), kept={"back.weight": (2, H - 3)}, routes=FAST)
    hh[candidate, 3, 0] = 0.7  # one that moves upsets them all
    check(model, (x(),), kept={"back.weight": (2, H)}, routes=FAST)


@pytest.mark.parametrize("name", LAYERS)
def test_biases_that_cancel(name: str) -> None:
    """b_ih + b_hh = 0: the candidate of an LSTM or RNN is 0; in a GRU the reset gate stands between them."""
    model = Net(name)
    rest(model.layer, [4])
    rows = _rows(model.layer)
    candidate = {4: 2, 3: 2, 1: 0}[rows["bias_ih"].shape[0]]
    rows["bias_ih"][candidate, 4], rows["bias_hh"][candidate, 4] = 0.5, -0.5
    check(model, (x(),), kept={"back.weight": (2, H if name == "gru" else H - 1)}, routes=FAST)


def test_a_constant_of_the_operand_can_put_a_unit_at_rest() -> None:
    model = Net("lstm")
    rest(model.layer, [4])
    dead_inputs(model)
    _rows(model.layer)["weight_ih"][2, 4, 0] = 2.0
    check(model, (x(),), kept={"back.weight": (2, H)}, routes=FAST)
    model.front.bias.data[0] = 0.5
    _rows(model.layer)["bias_hh"][2, 4] = -1.0
    check(model, (x(),), kept={"back.weight": (2, H - 1)}, routes=FAST)


@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu"])
def test_a_steady_unit_of_an_rnn_is_absorbed_by_readers_outside(name: str) -> None:
    """Its value is tanh(b) from the first step on, but 0 before it: who reads it through W_hh keeps it."""
    model = Net(name)
    rest(model.layer, [4])
    _rows(model.layer)["bias_ih"][0, 4] = 0.6
    _rows(model.layer)["weight_hh"][0, :, 4] = 0
    check(model, (x(),), kept={"back.weight": (2, H - 1), "layer.weight_hh_l0": (H - 1, H - 1)}, routes=FAST)
    _rows(model.layer)["weight_hh"][0, 1, 4] = 0.4
    found = check(model, (x(),), kept={"back.weight": (2, H), "layer.weight_hh_l0": (H, H)}, routes=FAST)
    assert float(found["symbolic"].small.get_parameter("back.weight")[:, 4].abs().sum()) == 0


def test_a_relu_unit_with_a_negative_bias_is_at_rest() -> None:
    model = Net("rnn_relu")
    rest(model.layer, [4])
    _rows(model.layer)["bias_ih"][0, 4] = -0.6
    check(model, (x(),), kept={"back.weight": (2, H - 1)}, routes=FAST)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_given", ["zeros", "input", "no"])
def test_initial_states(name: str, batch_first: bool, is_given: str) -> None:
    """Zeros are as good as none; states that are inputs let unread units go, and nothing is at rest."""
    model = Net(name, batch_first=batch_first)
    rest(model.layer, [2])
    unread(model.layer, model.back, [5])

    class NoStates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Any:
            if is_given == "no":
                return self.net(x)
            h = torch.zeros(1, x.size(0 if batch_first else 1), H, dtype=x.dtype)
            return self.states(x, h, h)

        def states(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            net = self.net
            y, last = net.layer(torch.relu(net.front(x)), (h, c) if net.has_cell else h)
            return net.finish(y, last)

    class Two(NoStates):
        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:  # type: ignore[override]
            return self.states(x, h, c)

    class One(NoStates):
        def forward(self, x: Tensor, h: Tensor) -> Any:  # type: ignore[override]
            return self.states(x, h, h)

    given: Inputs = (torch.randn(N, T, 6),) if batch_first else (x(),)
    if is_given == "input":
        given += tuple(torch.randn(1, N, H) for _ in range(2 if name == "lstm" else 1))
    whole = (NoStates if is_given != "input" else Two if name == "lstm" else One)()
    small = srfx.minimize(copy.deepcopy(whole).double(), tuple(t.double() for t in given))
    wanted = whole.double()(*(t.double() for t in given))
    assert relative_error(wanted, small(*(t.double() for t in given))) < 1e-9
    left = H - 1 if is_given == "input" else H - 2
    widths = [s for n, s in shapes(small).items() if n.endswith("weight_hh_l0")]
    assert widths == [(GATES[LAYERS[name]] * left, left)]


@pytest.mark.parametrize("name", LAYERS)
def test_without_biases_only_zeros_of_the_operand_leave(name: str) -> None:
    model = Net(name, bias=False)
    rest(model.layer, [2])
    unread(model.layer, model.back, [5])
    dead_inputs(model)
    found = check(model, (x(),), kept={"back.weight": (2, H - 2), "front.weight": (C - 2, 6)}, routes=FAST)
    refused = srfx.plan(found["symbolic"].small).refusals
    assert any(r.reason == "GROWS" and "biases, of which the layer has none" in r.detail for r in refused)


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched(name: str) -> None:
    model = Net(name, "all")
    rest(model.layer, [2])
    dead_inputs(model)
    model.double()
    given = (torch.randn(T, 6, dtype=torch.float64),)
    small = srfx.minimize(copy.deepcopy(model), given)
    assert shapes(small)["back.weight"] == (2, H - 1)
    assert_equivalent(model, small, given)


def test_projections() -> None:
    """Units and states leave each on its own; a projection row of zeros is a state at rest."""
    model = Net("lstm", "all", proj_size=P)
    rest(model.layer, [2])  # a unit at rest
    hr = model.layer.weight_hr_l0.data
    hr[:, 3] = 0  # a unit whose cell is only an output
    hr[1] = 0  # a state at rest
    check(model, (x(),), kept={"layer.weight_hr_l0": (P - 1, H - 1), "layer.weight_ih_l0": (4 * (H - 1), C)})
    model.returns = "output"
    unread(model.layer, model.back, [4])
    kept = {"layer.weight_hr_l0": (P - 2, H - 2), "layer.weight_hh_l0": (4 * (H - 2), P - 2)}
    found = check(model, (x(),), kept=kept)
    layer = found["symbolic"].small.get_submodule("layer")
    assert (layer.hidden_size, layer.proj_size) == (H - 2, P - 2)


def test_a_projection_stays_narrower_than_its_layer() -> None:
    """Torch tells a projected layer by its two widths, so one more unit stays than is needed."""
    model = Net("lstm", proj_size=P)
    rest(model.layer, [2, 3, 4, 5, 6])  # three units are left, of five states
    found = check(model, (x(),), kept={"layer.weight_hr_l0": (P, P + 1)}, routes=FAST)
    assert found["symbolic"].small.get_submodule("layer").hidden_size == P + 1


def test_gates_that_do_not_matter_do_not_read() -> None:
    """A GRU unit whose candidate ignores the states needs no reset gate; then nobody reads what only that read."""
    model = Net("gru")
    rows = _rows(model.layer)
    rows["weight_hh"][2, 1] = 0
    rows["bias_hh"][2, 1] = 0
    rows["weight_hh"][:, :, 6] = 0
    rows["weight_hh"][0, 1, 6] = 1.0  # only the reset gate of unit 1 reads unit 6
    model.back.weight.data[:, 6] = 0
    check(model, (x(),), kept={"back.weight": (2, H - 1)}, routes=FAST)
    rows["bias_hh"][2, 1] = 0.5
    check(model, (x(),), kept={"back.weight": (2, H), "layer.weight_hh_l0": (3 * H, H)}, routes=FAST)


def test_the_output_gate_of_a_unit_that_is_only_a_cell_state() -> None:
    class OnlyCell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.back = nn.LSTM(6, H), nn.Linear(H, 2)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            _, (_, c) = self.layer(x)
            return self.back(c[0])

    model = OnlyCell()
    rows = _rows(model.layer)
    rows["weight_hh"][:, :, [1, 6]] = 0
    rows["weight_hh"][3, 1, 6] = 1.0  # the output gate of unit 1, whose output nobody reads
    model.back.weight.data[:, 6] = 0
    check(model, (x(),), kept={"back.weight": (2, H - 1)}, routes=FAST)
    rows["weight_hh"][1, 1, 6] = 1.0  # its forget gate
    check(model, (x(),), kept={"back.weight": (2, H), "layer.weight_hh_l0": (4 * H, H)}, routes=FAST)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_used_twice_keeps_its_weights_and_absorbs_zeros(name: str) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            z = torch.relu(self.front(x))
            a, _ = self.layer(z)
            b, _ = self.layer(z * 2)
            return self.back(a + b)

    model = Twice(name)
    rest(model.layer, [2])
    unread(model.layer, model.back, [5])
    dead_inputs(model)
    check(model, (x(),), kept={"back.weight": (2, H - 2), "front.weight": (C - 2, 6)}, routes=FAST)


def test_a_unit_that_stays_for_another_reader_is_right() -> None:
    """A residual sum keeps unit 2 alive beside the layer: it is at rest there, and still has to come out as 0."""

    class Residual(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            z = torch.relu(self.front(x))
            y, _ = self.layer(z)
            return self.back(y[:, :, :C] + z)

    for name in LAYERS:
        model = Residual(name)
        model.back = nn.Linear(C, 2)
        randomized(model)
        rest(model.layer, [2, 7])
        check(model, (x(),), kept={"layer.weight_hh_l0": (GATES[LAYERS[name]] * (H - 1), H - 1)}, routes=FAST)


def test_encoder_hands_its_states_to_a_decoder() -> None:
    """The tuple of states is one value in the graph; units of both are tied."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(6, H), nn.LSTM(6, H)
            self.back = nn.Linear(H, 2)
            randomized(self)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            _, state = self.encoder(x)
            out, _ = self.decoder(y, state)
            return self.back(out)

    model = Pair()
    rest(model.encoder, [2])
    rest(model.decoder, [2])
    unread(model.decoder, model.back, [5])
    model.encoder.weight_hh_l0.data[:, 5] = 0
    kept = {"encoder.weight_hh_l0": (4 * (H - 2), H - 2), "decoder.weight_hh_l0": (4 * (H - 2), H - 2)}
    check(model, (x(), x()), kept=kept)


@pytest.mark.parametrize("name", LAYERS)
def test_generated_weights(name: str) -> None:
    """Random sparse weights: exact, and exactly the units stay that a plain reading of the lemmas keeps."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = Net(name, bias=seed % 3 > 0)
        for tensor in model.layer.parameters():
            tensor.data *= torch.rand_like(tensor) < (0.12 if tensor.dim() > 1 else 0.3)
        model.back.weight.data *= torch.rand(1, H) < 0.4
        model.back.weight.data[0, seed % H] = 1.0
        left = _expected_units(model, name)
        found = check(model, (x(),), idempotent=False, routes=["symbolic"])
        for route, outcome in found.items():
            got = shapes(outcome.small).get("back.weight", (2, 0))[1]
            assert got == max(left, 1) or got == left, f"seed {seed}, {route}: {got} units, expected {left}"


def _expected_units(model: Net, name: str) -> int:
    """Units that stay: written with loops, from the definitions."""
    rows = _rows(model.layer)
    g, kind = rows["weight_ih"].shape[0], LAYERS[name]
    zero = torch.zeros(g, H)
    b_ih, b_hh = rows.get("bias_ih", zero), rows.get("bias_hh", zero)
    ih, hh = rows["weight_ih"], rows["weight_hh"]
    cand = {4: 2, 3: 2, 1: 0}[g]
    at_rest, steady = set(range(H)), set(range(H))
    for _ in range(H + 1):
        for j in range(H):
            reads_x = bool(ih[cand, j].any())
            moving = [m for m in range(H) if hh[cand, j, m] != 0 and m not in at_rest]
            total = float(b_ih[cand, j] + b_hh[cand, j])
            offset = bool(b_ih[cand, j] != 0 or b_hh[cand, j] != 0) if kind is nn.GRU else total != 0
            if name == "rnn_relu":
                offset = total > 0
            if reads_x or moving or offset:
                at_rest.discard(j)
            if reads_x or moving:
                steady.discard(j)
    fixed = steady if kind is nn.RNN else at_rest
    live = {j for j in range(H) if bool(model.back.weight[:, j].any()) and j not in fixed}
    for _ in range(H + 1):
        for j in list(live):
            for gate in range(g):
                quiet = not any(hh[cand, j, m] != 0 and m not in at_rest for m in range(H))
                null = quiet and not bool(ih[cand, j].any()) and not bool(b_ih[cand, j] + b_hh[cand, j])
                if kind is nn.GRU and gate == 0 and quiet and b_hh[cand, j] == 0:
                    continue
                if kind is nn.LSTM and null and gate in (0, 2):
                    continue
                live |= {m for m in range(H) if hh[gate, j, m] != 0 and m not in at_rest}
    return len(live)


# ---------------------------------------------------------------------- cells
class CellNet(nn.Module):
    """A cell unrolled over ``steps``; one step leaves the weights to one site."""

    def __init__(self, name: str, steps: int = 1, **options: Any) -> None:
        super().__init__()
        self.front, self.steps = nn.Linear(6, C), steps
        self.layer = CELLS[name](C, H, **_options(name), **options)
        self.back, self.has_cell = nn.Linear(H, 2), name == "lstm"
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(self.steps):
            z = torch.relu(self.front(x[t]))
            state = self.layer(z) if state is None else self.layer(z, state)
        return self.back(state[0] if self.has_cell else state)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("steps", [1, 3])
def test_cells(name: str, steps: int) -> None:
    model = CellNet(name, steps)
    rest(model.layer, [2], "")
    unread(model.layer, model.back, [5], "")
    model.front.weight.data[[0, 1]] = 0
    model.front.bias.data[0], model.front.bias.data[1] = 0.7, -0.3
    model.layer.weight_ih.data[:, 2] = 0
    inputs = C - 3 if steps == 1 else C - 2  # several sites: a constant that is not 0 stays
    kept = {
        "back.weight": (2, H - 2),
        "layer.weight_ih": (GATES[LAYERS[name]] * (H - 2), inputs),
        "front.weight": (inputs, 6),
    }
    found = check(model, (torch.randn(3, N, 6),), kept=kept)
    assert found["symbolic"].small.get_submodule("layer").hidden_size == H - 2


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_absorbs_constants_of_its_state(name: str) -> None:
    class Step(CellNet):
        def __init__(self) -> None:
            super().__init__(name)
            self.start = nn.Linear(6, H)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            h, z = self.start(x), torch.relu(self.front(x))
            state = self.layer(z, (h, h * 2)) if self.has_cell else self.layer(z, h)
            return self.back(state[0] if self.has_cell else state)

    model = Step()
    model.start.weight.data[3] = 0  # h[3] is a constant: the gates absorb it
    model.back.weight.data[:, 3] = 0
    left = H - 1
    check(
        model, (torch.randn(N, 6),), kept={"back.weight": (2, left), "start.weight": (left, 6)}, routes=FAST
    )


# ---------------------------------------------------------------------- refusals and the rest
def test_a_weight_that_is_not_finite_is_a_barrier() -> None:
    model = Net("lstm")
    rest(model.layer, [2])
    model.layer.weight_ih_l0.data[9, 0] = torch.inf
    small = srfx.minimize(model, (x(),))
    assert Reason.NON_FINITE.name in {note.reason for note in srfx.plan(small).refusals}
    assert shapes(small)["back.weight"] == (2, H)


@pytest.mark.parametrize("name", LAYERS)
def test_the_result_is_an_ordinary_module(name: str) -> None:
    """It trains, deep-copies, pickles; the gradient of every kept entry is that of the original."""
    torch.manual_seed(0)
    model = Net(name).double()
    rest(model.layer, [2])
    unread(model.layer, model.back, [5])
    given = torch.randn(T, N, 6, dtype=torch.float64)
    small = srfx.minimize(model, (given,))
    assert_equivalent(model, small, (given,))
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert torch.equal(again(given), small(given))
    small.train()
    model(given).square().sum().backward()
    small(given).square().sum().backward()
    kept = [u for u in range(H) if u not in (2, 5)]
    rows = model.layer.weight_hh_l0.grad.view(-1, H, H)[:, kept][:, :, kept].reshape(-1, len(kept))
    assert relative_error(rows, small.get_parameter("layer.weight_hh_l0").grad) < 1e-9
    compiled = torch.compile(small, backend="eager")
    assert torch.equal(compiled(given), small(given))
    assert count(small) < count(model)


def test_a_state_that_no_gate_reads_passes_by_the_gates() -> None:
    class Once(nn.Module):
        """h' = (1 - z) n + z h, where h comes from a layer whose rows could go."""

        def __init__(self) -> None:
            super().__init__()
            self.init, self.cell = nn.Linear(4, H), nn.GRUCell(4, H)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x, self.init(x))

    model = Once()
    with torch.no_grad():
        model.cell.weight_hh[:, [1, 5]] = 0
    check(model, (torch.randn(N, 4),), kept={"init.weight": (H, 4)})
