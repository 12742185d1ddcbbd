from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import srfx
from srfx.ir.capture import capture
from srfx.ir.dead_code import is_removable, remove_dead_nodes
from srfx.ir.plan import Reason
from srfx.passes import Pipeline, get_pass
from tests.snapshots import assert_same, assert_unchanged, snapshot, trace

X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.same = nn.Identity()
        self.register_buffer("table", torch.rand(6))


def made(forward, **attributes):
    model = type("Made", (Base,), {"forward": forward})().double().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def dropped(model, route, x=X):
    want = model(x)
    traced = trace(model, (x,), route)
    before = snapshot(model)
    gm = capture(traced).graph_module
    result = Pipeline(["drop-noops"])(gm)
    assert_same(want, gm(x))
    assert_unchanged(model, before)
    assert not get_pass("drop-noops")(gm).modified
    return gm, result


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


def functional_dropouts(s, x):
    x = F.dropout(x, 0.1, training=False)
    x = F.dropout(input=x, training=s.training)
    x = F.alpha_dropout(x, 0.2)
    x = F.dropout1d(x, 0.1, False)
    x = F.dropout(x, 0.0)
    return s.fc(torch.dropout(x, 0.1, False))


def full_slices(s, x):
    return s.fc(x[:, :][..., :][:])


def identities(s, x):
    return s.same(s.fc(s.same(x)))


def asserts(s, x):
    torch._assert(x.shape[1] == 4, "channels")
    torch._assert(x.dim() == 3 and True, "dims")
    n, c = x.size(0), x.size(1)
    torch._assert(n * c > 0, "empty")
    return s.fc(x)


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("forward", [functional_dropouts, full_slices, identities, asserts])
def test_nothing_but_the_layer_is_left(forward, route):
    model = made(forward)
    if forward is asserts and route == "symbolic":
        model.__class__.forward = lambda s, x: (torch._assert(x.shape[1] == 4, ""), s.fc(x))[1]
    gm, result = dropped(model, route)
    assert targets(gm) == ["fc"] or targets(gm) == ["aten.linear.default"]
    assert not result.refusals


def test_dropout_modules_live_on_in_module_level_graphs_and_are_dropped_from_exported_ones():
    model = made(lambda s, x: s.drop(s.fc(x)))
    gm, result = dropped(model, "symbolic")
    assert not result.modified
    torch.manual_seed(0)
    assert (gm.train()(X) == 0).any()
    gm, _ = dropped(model, "export")
    assert targets(gm) == ["aten.linear.default"]


def test_live_dropout_functions_stay():
    gm = fx.symbolic_trace(made(lambda s, x: F.dropout(s.fc(x), 0.5, training=True) + F.dropout(x)))
    assert not get_pass("drop-noops")(gm).modified


def test_slices_that_cut_or_step_stay():
    def forward(s, x):
        return x[:, 1:], x[:, :-1], x[:, ::2], x[None], x[..., 0], x[:, :100]

    gm, _ = dropped(made(forward), "symbolic")
    assert len(targets(gm)) == 6
    gm, _ = dropped(made(forward), "export")
    assert [t for t in targets(gm) if "slice" in t].count("aten.slice.Tensor") >= 3


def test_detach_goes_only_where_no_gradient_can_come_from():
    def forward(s, x):
        return s.fc(x).detach() * s.table.detach()

    gm, result = dropped(made(forward), "export")
    assert sum("detach" in t for t in targets(gm)) == 1
    assert len(result.edits) == 1
    gm.requires_grad_(True)
    x = X.clone().requires_grad_()
    out = gm(x)
    assert not out.requires_grad or out.grad_fn is not None
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_constants_lifted_by_export_lose_their_copies():
    gm = capture(trace(made(lambda s, x: s.fc(x) + torch.tensor(2.0)), (X,), "export")).graph_module
    assert any("lift_fresh" in t for t in targets(gm))
    Pipeline(["functionalize", "drop-noops"])(gm)
    assert not any("lift_fresh" in t or "detach" in t for t in targets(gm))
    assert_same(made(lambda s, x: x * 0, fc=nn.Identity())(X), X * 0)


def test_copies_of_written_storage_stay():
    def forward(s, x):
        h = s.fc(x)
        same = s.same(h)
        flat = h.flatten(1)
        h.add_(1)  # cannot be made functional: flat may or may not see it
        return same, flat

    model = made(forward)
    with torch.no_grad():
        gm = capture(fx.symbolic_trace(model)).graph_module
        result = get_pass("drop-noops")(gm)
        assert not result.modified
        assert [(r.node, r.reason) for r in result.refusals] == [("same", Reason.MUTATION)]
        assert_same(model(X), gm(X))


def test_hooked_identity_stays():
    model = made(lambda s, x: s.same(s.fc(x)))
    model.same.register_forward_hook(lambda m, a, out: out * 2)
    gm, result = dropped(model, "symbolic")
    assert [(r.node, r.reason) for _, r in result.refusals] == [("same", Reason.OPAQUE_HOOK)]
    assert "same" in targets(gm)


def test_subclass_of_identity_stays():
    class Doubling(nn.Identity):
        def forward(self, x):
            return x * 2

    gm = fx.GraphModule({"d": Doubling()}, _call("d"))
    assert not get_pass("drop-noops")(gm).modified


def _call(name):
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    return graph


def test_asserts_about_numbers_in_tensors_stay():
    def forward(s, x):
        torch._assert((x > -100).all(), "range")
        return s.fc(x)

    gm = capture(fx.symbolic_trace(made(forward))).graph_module
    assert not get_pass("drop-noops")(gm).modified
    with pytest.raises(AssertionError, match="range"):
        gm(X - 1000)


def test_casts_and_copies_stay():
    def forward(s, x):
        return s.fc(x).to(torch.float64).contiguous().clone()

    gm, result = dropped(made(forward), "export")
    assert not result.modified
    assert {"aten.to.dtype", "aten.clone.default"} <= set(targets(gm))


def test_stochastic_depth_of_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    model = made(lambda s, x: s.fc(x) + s.sd(s.fc(x)), sd=ops.StochasticDepth(0.5, "row")).eval()
    gm, _ = dropped(model, "symbolic")
    assert not any("stochastic" in t for t in targets(gm))
    training = capture(fx.symbolic_trace(model.train())).graph_module
    assert not get_pass("drop-noops")(training).modified


@fx.wrap
def user_function(x):
    raise AssertionError("side effect")


def test_dead_nodes_go_and_effects_stay():
    graph = fx.Graph()
    x = graph.placeholder("x")
    dead = graph.call_function(torch.relu, (x,))
    graph.call_function(torch.neg, (dead,))
    kept = [
        graph.call_method("add_", (x, 1)),
        graph.call_function(torch.rand_like, (x,)),
        graph.call_function(user_function, (x,)),
        graph.call_function(torch._assert, (True, "")),
        graph.call_module("hooked", (x,)),
    ]
    graph.call_module("plain", (x,))
    graph.output(x)
    modules = {"hooked": nn.Linear(2, 2), "plain": nn.Linear(2, 2)}
    modules["hooked"].register_forward_hook(lambda m, a, o: None)
    gm = fx.GraphModule(modules, graph)
    assert not any(is_removable(node) for node in kept)
    assert remove_dead_nodes(gm)
    assert [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")] == kept
    assert not hasattr(gm, "plain")
    assert not remove_dead_nodes(gm)


def test_a_reader_that_nobody_reads_holds_nothing():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.write, self.norm, self.read = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.norm(self.write(x))
            torch.sigmoid(y)  # no linear reader of the norm, were it one
            return self.read(y)

    model = Idle().double().eval()
    with torch.no_grad():
        model.write.weight[:3] = 0
    x = torch.randn(2, 3, dtype=torch.float64)
    small = srfx.minimize(fx.symbolic_trace(model), x)
    assert small.write.weight.shape == (3, 3)
    assert_same(model(x), small(x))
