"""What the result of minimize is: a module like any other, with tensors of its own, minimal at once."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import srfx
from srfx.errors import VerificationError
from srfx.ir.own import own_tensors, storages
from tests.helpers import assert_equivalent, check, count, kill, masked, plan_of, randomized, shapes
from tests.snapshots import assert_same, assert_unchanged, snapshot, trace


class Residual(nn.Module):
    """A small residual network with everything a convolutional one has."""

    def __init__(self, n: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU(inplace=True)
        )
        self.left = nn.Sequential(nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU())
        self.right = nn.Conv2d(n, n, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(n, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.right(self.left(x)))
        return self.head(self.drop(x.mean((2, 3))))


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
ROUTES = ["symbolic", "export"]


def network(seed: int = 0) -> Residual:
    model = masked(randomized(Residual(), seed), seed)
    assert isinstance(model, Residual)
    return model


# --- its own tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dead", [True, False])
def test_no_storage_is_shared(route: str, dead: bool) -> None:
    model = network() if dead else randomized(Residual())
    traced = trace(model, INPUTS, route)
    before = snapshot(traced)
    small = srfx.minimize(traced)
    assert not storages([small]) & storages([model, traced])
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.fill_(3)
    assert_unchanged(traced, before)


class Tied(nn.Module):
    """One weight under two names, one module called twice, two buffers that are views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 3)
        table = torch.arange(12.0)
        self.register_buffer("low", table[:6])
        self.register_buffer("high", table[6:])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.first(x)) + self.low)
        return self.out(torch.tanh(self.second(x)) * self.high)


def test_ties_stay_ties_and_views_stay_views() -> None:
    model = randomized(Tied())
    small = srfx.minimize(fx.symbolic_trace(model), torch.randn(2, 6))
    assert small.first.weight is small.second.weight
    assert len(list(small.parameters())) == len(list(model.parameters()))
    assert small.low.untyped_storage().data_ptr() == small.high.untyped_storage().data_ptr()
    assert small.low.untyped_storage().data_ptr() != model.low.untyped_storage().data_ptr()
    assert torch.equal(small.high, model.high)


def test_parameters_stay_parameters_frozen_ones_frozen() -> None:
    model = network()
    model.left[0].weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    small = srfx.minimize(fx.symbolic_trace(model))
    wanted = dict(model.named_parameters())
    for name, p in small.named_parameters():
        assert type(p) is nn.Parameter
        assert p.is_leaf
        assert p.grad is None
        if name in wanted:
            assert p.requires_grad == wanted[name].requires_grad, name
    assert set(dict(small.named_parameters())) >= {"left.0.weight", "head.bias"}


def test_memory_format_stays() -> None:
    for model in (randomized(Residual()), network()):
        last = model.to(memory_format=torch.channels_last)
        small = srfx.minimize(fx.symbolic_trace(last))
        for name, p in small.named_parameters():
            if p.dim() == 4 and min(p.shape[1:]) > 1:
                assert p.is_contiguous(memory_format=torch.channels_last), name


def test_own_tensors_copies_only_what_is_foreign() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    theirs = nn.Linear(3, 3)
    gm.get_submodule("0").weight = theirs.weight
    mine = own_tensors(gm, storages([theirs]))
    assert mine.get_submodule("1").weight is gm.get_submodule("1").weight
    assert mine.get_submodule("0").weight is not theirs.weight
    assert torch.equal(mine.get_submodule("0").weight, theirs.weight)


# --- a module like any other --------------------------------------------------------------------------


def test_class_name_and_training_flag() -> None:
    model = network()
    for is_training in (True, False):
        traced = fx.symbolic_trace(model.train(is_training))
        small = srfx.minimize(traced)
        assert type(small).__name__ == "Residual"
        assert isinstance(small, fx.GraphModule)
        assert small.training is is_training
        assert small.get_submodule("drop").training is is_training


@pytest.mark.parametrize("route", ROUTES)
def test_names_stay(route: str) -> None:
    model = network()
    small = srfx.minimize(trace(model, INPUTS, route))
    created = {t.name for t in srfx.plan(small).tensors if t.status == "created"}
    assert set(dict(small.named_parameters())) - created <= set(dict(model.named_parameters()))
    assert {"stem.0.weight", "left.0.weight", "right.weight", "head.weight"} <= set(shapes(small))


def through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


@pytest.mark.parametrize("route", ROUTES)
def test_copies_compute_the_same_and_keep_the_record(route: str) -> None:
    small = srfx.minimize(trace(network(), INPUTS, route))
    x = torch.randn(3, 3, 8, 8)
    for again in (
        copy.deepcopy(small),
        through_pickle(small),
        copy.deepcopy(through_pickle(small)),
        through_pickle(copy.deepcopy(small)),
        through_pickle(through_pickle(small)),
    ):
        assert_same(small(x), again(x))
        assert srfx.plan(again) == srfx.plan(small)
        assert str(srfx.report(again)) == str(srfx.report(small))


def test_a_pickle_keeps_the_class_name() -> None:
    assert type(through_pickle(srfx.minimize(fx.symbolic_trace(network())))).__name__ == "Residual"


class Output(dict):  # what Hugging Face models return is a class of this kind
    """A container of a class of its own."""


torch.utils._pytree.register_pytree_node(
    Output,
    lambda o: (list(o.values()), list(o)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="tests.Output",
)


class Structured(nn.Module):
    """Nested inputs, one by keyword, and an output of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, pair: dict[str, Tensor], *, scale: Tensor) -> Output:
        hidden = torch.relu(self.a(pair["x"] + pair["y"])) * scale
        return Output(logits=self.b(hidden), hidden=hidden)


def test_nested_inputs_and_outputs_survive_pickling() -> None:
    model = masked(randomized(Structured()))
    pair, scale = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}, torch.rand(2, 1)
    with torch.no_grad():
        program = torch.export.export(model, (pair,), {"scale": scale}, strict=False)
        small = srfx.minimize(program)
        again = through_pickle(through_pickle(small))
        for found in (small(pair, scale=scale), again(pair, scale=scale)):
            assert type(found) is Output
            assert list(found) == ["logits", "hidden"]
            torch.testing.assert_close(found["logits"], model(pair, scale=scale)["logits"])
    assert again.get_parameter("a.weight").shape == small.get_parameter("a.weight").shape


def test_a_state_dict_loads_into_a_copy() -> None:
    small = srfx.minimize(fx.symbolic_trace(network()))
    other = copy.deepcopy(small)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(small.state_dict())
    assert_same(small(INPUTS[0]), other(INPUTS[0]))


@pytest.mark.parametrize("route", ROUTES)
def test_moves(route: str) -> None:
    model = network()
    small = srfx.minimize(trace(model, INPUTS, route))
    moved = copy.deepcopy(small).to("meta")
    assert moved(INPUTS[0].to("meta")).shape == (2, 5)
    x = INPUTS[0].double()
    exact = copy.deepcopy(model).double()(x)
    torch.testing.assert_close(copy.deepcopy(small).double()(x), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_trains(route: str) -> None:
    small = srfx.minimize(trace(network(), INPUTS, route))
    small.train()
    optimizer = torch.optim.AdamW(small.parameters(), 1e-2)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert min(losses[-3:]) < losses[0]
    small.eval()
    with torch.no_grad():
        assert small(x).shape == (16, 5)
    moved = [k for k, v in small.state_dict().items() if not torch.equal(v, before[k])]
    assert {"stem.0.weight", "head.weight"} <= set(moved)


def test_gradients_are_those_of_the_kept_part() -> None:
    model = network().double()
    small = srfx.minimize(fx.symbolic_trace(model), INPUTS[0].double())
    assert_equivalent(model, small, (INPUTS[0].double(),), float32=None)
    x = INPUTS[0].double()
    model(x).sum().backward()
    small(x).sum().backward()
    rows, columns = (srfx.plan(small).kept("left.0.weight", axis) for axis in (0, 1))
    wanted = model.left[0].weight.grad[rows][:, columns]
    torch.testing.assert_close(small.get_submodule("left.0").weight.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiles() -> None:
    small = srfx.minimize(fx.symbolic_trace(network()))
    compiled = torch.compile(small)
    with torch.no_grad():
        torch.testing.assert_close(compiled(INPUTS[0]), small(INPUTS[0]), rtol=1e-4, atol=1e-5)


def test_compiles_without_a_backend() -> None:
    small = srfx.minimize(fx.symbolic_trace(network()))
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(small(INPUTS[0]), compiled(INPUTS[0]))


def test_exports_again() -> None:
    small = srfx.minimize(fx.symbolic_trace(network()))
    program = torch.export.export(small, INPUTS)
    with torch.no_grad():
        assert_same(small(*INPUTS), program.module()(*INPUTS))
    assert count(srfx.minimize(program)) == count(small)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_minimal_at_once(route: str, seed: int) -> None:
    small = srfx.minimize(trace(network(seed), INPUTS, route))
    again = srfx.minimize(small)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }
    for key, value in small.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert [n.name for n in again.graph.nodes] == [n.name for n in small.graph.nodes]
    assert not plan_of(small, INPUTS).edits


def test_deterministic() -> None:
    traced = fx.symbolic_trace(network())
    plans = [srfx.plan(srfx.minimize(traced)) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].digest() == plans[1].digest()


# --- what is given ------------------------------------------------------------------------------------


def test_every_form_of_a_model_gives_the_same() -> None:
    model = network()
    with torch.no_grad():
        program = torch.export.export(model, INPUTS, strict=False)
    forms: list[Any] = [model, fx.symbolic_trace(model), program, program.module(), nn.DataParallel(model)]
    sizes = []
    for form in forms:
        before = snapshot(model)
        small = srfx.minimize(form, INPUTS)
        assert_unchanged(model, before)
        sizes.append(count(small))
        with torch.no_grad():
            torch.testing.assert_close(small(INPUTS[0]), model(INPUTS[0]), rtol=1e-4, atol=1e-5)
    assert len(set(sizes)) == 1, sizes


def test_pruning_hooks_give_what_baked_zeros_give() -> None:
    model, baked = randomized(Residual()), randomized(Residual())
    for net in (model, baked):
        for layer in (net.stem[0], net.left[0], net.right):
            prune.ln_structured(layer, "weight", 0.5, 2, 0)
            prune.l1_unstructured(layer, "weight", 0.3)
            if net is baked:
                prune.remove(layer, "weight")
    before = snapshot(model)
    small = srfx.minimize(fx.symbolic_trace(model))
    assert_unchanged(model, before)
    assert shapes(srfx.minimize(fx.symbolic_trace(baked))) == shapes(small)
    assert not [m for m in small.modules() if m._forward_pre_hooks]


def test_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * scale)

    model = masked(randomized(Two()))
    x, scale = torch.randn(2, 3), torch.rand(2, 1)
    small = srfx.minimize(model, (x,), example_kwargs={"scale": scale})
    assert count(small) < count(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x, scale=scale), model(x, scale=scale))


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("route", ROUTES)
def test_multiple_of(multiple: int, route: str) -> None:
    model = masked(randomized(Residual(32)), rows=0.5).double()
    traced = trace(model, (INPUTS[0].double(),), route)
    free, small = srfx.minimize(traced), srfx.minimize(traced, multiple_of=multiple)
    found = shapes(small)
    for name in ("stem.0.weight", "left.0.weight", "right.weight"):
        assert found[name][0] % multiple == 0, found
    for name in ("left.0.weight", "right.weight", "head.weight"):
        assert found[name][1] % multiple == 0, found
    assert count(free) <= count(small) < count(model)
    for x in (INPUTS[0].double(), torch.randn(5, 3, 8, 8).double()):
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)
    again = srfx.minimize(small, multiple_of=multiple)
    assert shapes(again) == found
    wasted = srfx.report(small).revived
    assert (count(small) > count(free)) == bool(wasted.get("MULTIPLE_OF")), wasted


def test_multiple_of_leaves_the_interface_and_small_axes_alone() -> None:
    model = masked(randomized(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))))
    small = srfx.minimize(fx.symbolic_trace(model), torch.randn(2, 7), multiple_of=8)
    assert shapes(small)["0.weight"] == (6, 7)  # 6 channels cannot be a multiple of 8: they all stay
    with torch.no_grad():
        x = torch.randn(4, 7)
        torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("multiple", [0, -8])
def test_multiple_of_nonsense(multiple: int) -> None:
    with pytest.raises(ValueError, match=str(multiple)):
        srfx.minimize(network(), INPUTS, multiple_of=multiple)


@pytest.mark.parametrize("route", ROUTES)
def test_verify_passes(route: str) -> None:
    srfx.minimize(trace(network(), INPUTS, route), verify=True)
    srfx.minimize(trace(network(), INPUTS, route), INPUTS, verify=True)


def test_verify_names_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["srfx.minimize"]

    def spoiled(gm: fx.GraphModule, foreign: set[int]) -> fx.GraphModule:
        small = own_tensors(gm, foreign)
        with torch.no_grad():
            small.get_submodule("head").bias += 1
        return small

    monkeypatch.setattr(module, "own_tensors", spoiled)
    with pytest.raises(VerificationError, match=r"float64 error 0\.\d+ .bound"):
        srfx.minimize(network(), INPUTS, verify=True)


def test_a_wrong_interface_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    from srfx.passes.compact_channels import CompactChannels

    def cut(self: CompactChannels, gm: fx.GraphModule) -> None:
        head = gm.get_submodule("head")
        head.weight, head.bias = nn.Parameter(head.weight[:3]), nn.Parameter(head.bias[:3])

    monkeypatch.setattr(CompactChannels, "finish", cut)
    model = randomized(Residual())
    kill(model.left[0], rows=[0, 3])
    with pytest.raises(AssertionError, match=r"output 0 was .*2, 5.* is .*2, 3"):
        srfx.minimize(model, INPUTS)


class Unread(nn.Module):
    """A norm and a split of channels that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        self.norm(y)
        y.unflatten(1, (3, 2)).unbind(2)
        z: Tensor = self.b(y)
        return z


class Settled(nn.Module):
    """A layer with two sites: at one it sees constants, and what comes out is split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.still, self.heads, self.b = (
            nn.Linear(4, 6),
            *(nn.Linear(6, 6) for _ in "sh"),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        z = self.heads(self.still(y)).view(-1, 3, 2)[:, 0]
        w: Tensor = self.b(self.heads(y)) + z
        return w


def test_what_nobody_reads_holds_nothing() -> None:
    """Found by fuzzing: the norm was rewritten for no channel and raised; the split kept channels in pairs."""
    model = randomized(Unread())
    kill(model.a, rows=[0, 3, 4], bias=True)
    found = check(model, (torch.randn(3, 4),), kept={"a.weight": (3, 4), "b.weight": (2, 3)})
    for outcome in found.values():
        assert not any("norm" in n.name or "unflatten" in n.name for n in outcome.small.graph.nodes)


def test_what_became_a_constant_holds_nothing() -> None:
    """Found by fuzzing: heads of a value that is a stored constant now kept channels in pairs."""
    model = randomized(Settled())
    kill(model.still, rows=range(6))
    kill(model.heads, rows=[0])
    found = check(
        model, (torch.randn(3, 4),), kept={"heads.weight": (5, 6), "b.weight": (2, 5), "still.weight": ()}
    )
    for outcome in found.values():
        assert not any("view" in n.name for n in outcome.small.graph.nodes)


class Written(nn.Module):
    """A write through a view that cannot be undone, and that nobody reads by its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + 0.25
        y.diagonal(0, 0, 1).add_(1)
        z: Tensor = self.b(y)
        return z


@pytest.mark.parametrize("route", ROUTES)
def test_a_write_that_is_left_in_place_stays(route: str) -> None:
    """Found by fuzzing (seed 20022): the write was taken for dead code and dropped."""
    model = randomized(Written()).double()
    kill(model.b, rows=[0])
    x = torch.randn(3, 4, dtype=torch.float64)
    small = srfx.minimize(trace(model, (x,), route), x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)
    if route == "symbolic":
        assert any(n.target == "add_" for n in small.graph.nodes)


def test_a_template_does_not_hold_what_the_next_round_removes() -> None:
    """An output that a norm reads too: its constants go once the sum that follows the norm is found to be none."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.norm = nn.Linear(3, 12), nn.RMSNorm(12)
            self.zero, self.back = nn.Linear(12, 12, bias=False), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.front(x)
            y = self.norm(x)
            return x, self.back(y + self.zero(y))

    model = randomized(Inner())
    kill(model.front, [0, 1, 4, 5, 6, 7, 8, 9, 10])  # constants, some of them 0, which go in the first round
    kill(model.front, [2], bias=True)
    model.zero.weight.data.zero_()
    check(
        model, (torch.randn(2, 3),), kept={"front.weight": (2, 3), "norm.weight": (2,), "back.weight": (5, 3)}
    )


def test_the_whole_promise() -> None:
    check(network(), INPUTS, others=[(torch.randn(1, 3, 11, 7),)])


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_is_as_close_to_the_truth_as_before(seed: int) -> None:
    """The root mean square over many samples: the largest of a few is noise (0.4 to 2.3 times, both ways)."""
    layers = [nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 50), nn.ReLU(), nn.Linear(50, 10)]
    model = masked(randomized(nn.Sequential(*layers), seed), seed)
    x = torch.randn(500, 60, generator=torch.Generator().manual_seed(seed))
    small = srfx.minimize(fx.symbolic_trace(model), (x[:2],))
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        before, after, folded = (
            float((y.double() - truth).square().mean().sqrt())
            for y in (model(x), small(x), copy.deepcopy(small).double()(x.double()))
        )
    assert count(small) < 0.7 * count(model)
    assert after < 1.5 * before, f"{after / before:.2f} times"
    # each folded bias is rounded once, as each sum in the forward pass is
    assert folded < before, f"rounding the folded constants alone costs {folded / before:.2f} times as much"


@pytest.mark.parametrize("what", ["dtype", "device"])
def test_a_dead_value_that_is_asked_for_its_kind_stays_a_tensor(what: str) -> None:
    """Nothing of `front` is read but its dtype or device: one channel has to be left of it."""

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.beside = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.front(x)
            kind = {what: getattr(y, what)}
            return self.beside(x) + torch.tensor(0.7, **kind)

    model = randomized(Asked()).double()
    check(model, (torch.randn(2, 3),), routes=("symbolic",))
