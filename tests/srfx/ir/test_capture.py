from __future__ import annotations

import copy
import io
from collections import namedtuple

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from srfx.errors import CaptureError, UnsupportedModelError
from srfx.ir.capture import capture
from tests.snapshots import assert_same, assert_unchanged, snapshot, trace


class Net(nn.Module):
    """A convolution, a batch norm, an in-place activation that is called twice, and a tied pair of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(1000, 1000)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x))).mean((2, 3))
        return self.act(self.a(x)) + self.b(x)


def make(cls=Net):
    return cls().double().eval()


X = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["symbolic", "export", "program", "decomposed", "module"])
def test_every_form_computes_the_same_and_leaves_the_model_alone(form):
    model = make()
    before = snapshot(model)
    given = model if form == "module" else trace(model, (X,), "symbolic" if form == "symbolic" else "export")
    if form in ("program", "decomposed"):
        given = torch.export.export(model, (X,), strict=False)
    if form == "decomposed":
        given = given.run_decompositions().module()
    captured = capture(given, X if form == "module" else None)
    gm = captured.graph_module
    assert type(gm).__mro__[1] is fx.GraphModule
    assert_same(model(X), gm(X))
    assert_unchanged(model, before)
    assert not [k for k in gm.state_dict() if k.startswith("unused")]  # nothing keeps unread tensors alive
    assert all("_guards" not in n.name and "assert" not in n.name for n in gm.graph.nodes)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_result_is_owned_pickles_and_switches_mode(route):
    model = make()
    before = snapshot(model)
    gm = capture(trace(model, (X,), route)).graph_module
    want = model(X)
    again = torch.load(_saved(gm), weights_only=False)
    assert_same(want, again(X))
    assert_same(want, copy.deepcopy(gm)(X))
    gm.train()
    gm.eval()
    for module in gm.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() + 1))
        if hasattr(module, "inplace"):
            module.inplace = False
    for node in reversed(gm.graph.nodes):
        if not node.users and node.op != "output":
            gm.graph.erase_node(node)
    assert_unchanged(model, before)
    assert_same(want, model(X))


def _saved(gm):
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    return buffer


def test_training_a_train_mode_capture_leaves_the_users_statistics_alone_only_when_they_are_replaced():
    model = make().train()
    gm = capture(fx.symbolic_trace(model)).graph_module
    assert gm.bn.training
    assert gm.bn is not model.bn
    assert (
        gm.bn.running_mean is model.bn.running_mean
    )  # shared until a pass replaces it: no second copy of the data


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_node_names_and_metadata_are_kept(route):
    traced = trace(make(), (X,), route)
    gm = capture(traced).graph_module
    kept = {n.name: n for n in gm.graph.nodes}
    names = [n.name for n in traced.graph.nodes if n.op not in ("get_attr",) and n.name != "_guards_fn"]
    assert [name for name in kept if kept[name].op != "get_attr"] == names
    for node in traced.graph.nodes:
        if node.name in kept:
            assert kept[node.name].meta.keys() == node.meta.keys()
            assert kept[node.name].meta is not node.meta


def test_aliases_survive():
    model = make()
    model.twin = model.conv  # one module under two names
    gm = capture(fx.symbolic_trace(model)).graph_module
    assert gm.a.weight is gm.b.weight is model.a.weight
    gm2 = capture(gm).graph_module
    assert gm2.a is not gm.a
    assert gm2.a.weight is gm2.b.weight


def test_dead_alias_of_a_tied_weight_keeps_no_tensor():
    gm = capture(trace(make(), (X,), "export")).graph_module
    readers = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    assert ("a.weight" in readers) != ("b.weight" in readers)
    assert set(gm.state_dict()) == readers


def test_prune_after_a_forward_with_grad_can_be_captured_though_deepcopy_fails():
    model = make()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    traced = fx.symbolic_trace(model)
    want = model(X)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(traced)
    before = snapshot(model)
    assert_same(want, capture(traced).graph_module(X))
    assert_same(want, capture(model).graph_module(X))
    # the traced graph still runs the hook of its own conv, never the user's
    assert id(capture(traced).graph_module.conv) != id(model.conv)
    assert_unchanged(model, before)


def test_hook_of_a_leaf_stays_and_runs_on_the_clone():
    model = make()
    model.conv.register_forward_hook(lambda module, args, out: out * 2)
    gm = capture(model).graph_module
    assert len(gm.conv._forward_hooks) == 1
    assert gm.conv._forward_hooks is not model.conv._forward_hooks
    assert_same(model(X), gm(X))


def test_hook_of_the_root_runs():
    model = make()
    model.register_forward_hook(lambda module, args, out: out + 1)
    assert_same(model(X), capture(model).graph_module(X))
    traced = fx.symbolic_trace(make())
    traced.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_same(traced(X), capture(traced).graph_module(X))


Out = namedtuple("Out", ["first", "second"])


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, *, scale=None, flag=True):
        y = self.fc(x)
        return {"y": y if scale is None else y * scale, "pair": (x, y)}


@pytest.mark.parametrize("route", ["module", "export"])
def test_keyword_inputs_and_structured_outputs(route):
    model = make(Structured)
    x, scale = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    given = model
    if route == "export":
        given = torch.export.export(model, (x,), {"scale": scale}, strict=False).module()
        captured = capture(given)
        assert [tuple(i.shape) for i in captured.inputs] == [(3, 4), (4,)]
        got = captured.graph_module(x, scale=scale)
        assert_same(model(x, scale=scale), got)
        assert list(got) == ["y", "pair"]
        assert isinstance(got["pair"], tuple)
    else:
        assert_same(model(x), capture(given, x).graph_module(x))


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("freq", torch.rand(4))

    def forward(self, x):
        with torch.no_grad():
            table = (self.freq * 3).cos()
            frozen = self.fc.weight * 2
            both = x.sum() + 1
        return self.fc(x) * table + F.linear(x, frozen) + both


def test_no_grad_regions_are_inlined_and_still_block_gradients():
    model = make(NoGrad)
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.enable_grad():
        given = torch.export.export(model, (x,), strict=False)
    assert any("set_grad" in str(n.target) for n in given.module().graph.nodes)
    gm = capture(given).graph_module
    assert not any("set_grad" in str(n.target) for n in gm.graph.nodes)
    assert_same(model(x), gm(x))
    model(x).sum().backward()
    want = model.fc.weight.grad.clone()
    model.zero_grad()
    gm(x).sum().backward()
    assert_same(want, gm.get_parameter("fc.weight").grad)


class Loop(nn.Module):
    """Not traceable by symbolic_trace: the number of steps is the length of the input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = x[:, 0] * 0
        for t in range(x.size(1)):
            h = torch.tanh(self.fc(h + x[:, t]))
        return h


def test_plain_module_falls_back_to_export_with_a_dynamic_batch():
    model = make(Loop)
    before = snapshot(model)
    captured = capture(model, torch.randn(1, 3, 4, dtype=torch.float64))  # a batch of 1 is not frozen either
    assert captured.source == "torch.export"
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 4, dtype=torch.float64)
        assert_same(model(x), captured.graph_module(x))
    assert_unchanged(model, before)


def test_plain_module_without_examples_names_the_remedy_and_chains_the_reason():
    model = make(Loop)
    with pytest.raises(CaptureError, match=r"Loop.*example_inputs") as caught:
        capture(model)
    assert isinstance(caught.value.__cause__, TypeError)
    assert not any(isinstance(v, fx.Proxy) for m in model.modules() for v in vars(m).values())


class DataDependent(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def test_untraceable_both_ways_names_both_reasons():
    with pytest.raises(CaptureError, match=r"symbolic_trace.*torch.export"):
        capture(DataDependent(), torch.randn(3))


def test_wrappers_are_taken_off():
    model = make()
    assert_same(model(X), capture(nn.DataParallel(model)).graph_module(X))
    assert_same(model(X), capture(torch.compile(model)).graph_module(X))


class SelfReference(nn.Module):
    """Attributes that lead back to the module: a bound method, a list of children, a partial."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.layers = [self.fc]
        self.run = self.step

    def step(self, x):
        return self.layers[0](x)

    def forward(self, x):
        return self.run(x)


def test_bound_methods_and_lists_lead_into_the_clone():
    model = make(SelfReference)
    before = snapshot(model)
    prune.random_unstructured(model.fc, "weight", 0.5)
    gm = capture(model).graph_module
    assert "fc.weight" in gm.state_dict()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_same(model(x), gm(x))
    assert before.keys() == snapshot(model).keys()


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda m: m.to("meta"), CaptureError, "conv.weight.*meta"),
        (lambda m: setattr(m, "a", nn.LazyLinear(3)), UnsupportedModelError, "a.weight.*lazy"),
        (
            lambda m: m.register_buffer("s", torch.eye(3).to_sparse()),
            UnsupportedModelError,
            "s has layout.*sparse",
        ),
        (
            lambda m: m.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
            UnsupportedModelError,
            "q is quantized",
        ),
    ],
)
def test_unreadable_tensors_are_named(spoil, error, words):
    model = make()
    spoil(model)
    with pytest.raises(error, match=words):
        capture(model)


def test_complex_and_integer_parameters_pass():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.i = nn.Parameter(torch.ones(3, dtype=torch.long), requires_grad=False)

        def forward(self, x):
            return x * self.c + self.i

    x = torch.randn(2, 3)
    assert_same(Odd()(x), capture(Odd()).graph_module(x))


def test_graph_that_fails_lint_is_an_error_of_ours():
    traced = fx.symbolic_trace(make())
    next(n for n in traced.graph.nodes if n.op == "call_module").target = "nowhere"
    with pytest.raises(CaptureError, match="nowhere"):
        capture(traced)


def test_not_a_model():
    with pytest.raises(CaptureError, match=r"expected an nn.Module.*dict"):
        capture({})  # type: ignore[arg-type]


def test_memory_is_shared():
    model = make()
    gm = capture(fx.symbolic_trace(model)).graph_module
    for name, parameter in gm.named_parameters():
        assert parameter is model.get_parameter(name)
