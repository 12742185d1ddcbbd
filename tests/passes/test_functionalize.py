from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from srfx.ir.aliases import mutation_barriers
from srfx.ir.capture import capture
from srfx.ir.effects import is_mutating
from srfx.ir.plan import Reason
from srfx.passes import Pipeline
from tests.snapshots import assert_same, assert_unchanged, snapshot, trace

X = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("steps", torch.zeros(8))
        self.register_buffer("index", torch.tensor([0, 2]))


def base_slice_is_read_later(s, x):
    h = s.conv(x)
    y = h[:, :4]
    y.mul_(2)
    return h + 1, y


def module_called_twice(s, x):
    h = s.relu(s.conv(x))
    return s.relu(h - 0.5) + h


def old_name_of_a_module_input_is_read(s, x):
    h = s.conv(x)
    g = s.relu(h)
    return h + 2 * g


def one_call_resolves_another_does_not(s, x):
    h = s.conv(x)
    flat = h.flatten(1)
    g = s.relu(h)  # flat may or may not see it: stays in place
    k = s.conv(x)
    return flat, g, s.relu(k), k


def chained(s, x):
    return s.conv(x).clamp_(min=0).mul_(2).add_(x.mean()).div_(3).relu_()


def functions(s, x):
    h = F.relu(s.conv(x), inplace=True)
    g = F.hardtanh(h, 0, 1, True)
    return F.leaky_relu_(h - 0.5) + g + torch.relu_(s.conv(x)) + F.elu(s.conv(x), 1.0, inplace=True)


def dropout_in_place(s, x):
    h = s.conv(x)
    s.drop(h)
    return h


def views_of_all_kinds(s, x):
    h = s.conv(x)
    v = h.view(2, 8, -1)
    t = h.transpose(1, 2)
    p = h.permute(0, 2, 3, 1)
    n = h.narrow(1, 2, 3)
    t[:, 0].add_(1)
    p[:, 1:3].unsqueeze(2).squeeze(2).mul_(3)
    n.narrow(-1, 1, 2).sub_(2)
    return v.sum(-1), h, t, p, n


def several_writes_through_views(s, x):
    h = s.conv(x)
    a, b = h[:, :4], h[:, 4:]
    a.mul_(2)
    c = h.sum(1)
    b.add_(a)
    h.sub_(1)
    return a, b, c, h


def tuple_of_views(s, x):
    a, b = s.conv(x).split(4, 1)
    a.add_(1)
    return torch.cat([b, a], 1)


def one_piece_under_two_names(s, x):
    pieces = s.conv(x).split(4, 1)
    pieces[1].add_(1)
    return pieces[-1], pieces[1], pieces[0]


def read_before_and_after(s, x):
    h = s.conv(x)
    early = h.sum((2, 3))
    h.mul_(h > 0)
    return early, h


def out_argument(s, x):
    h = s.conv(x).detach()
    torch.mul(h, 2, out=h)
    return h


def fills(s, x):
    h = s.conv(x)
    z = torch.zeros_like(h)
    z.copy_(h.mean((2, 3), keepdim=True))
    y = torch.ones_like(h).fill_(3)
    w = torch.ones_like(h)
    w[:, 2:4].zero_()
    return z * h + y - w


def copied_then_written(s, x):
    h = s.conv(x)
    y = torch.zeros_like(h)
    y.copy_(h)
    y.relu_()
    return h, y


def source_of_a_copy_is_written(s, x):
    h = s.conv(x)
    y = torch.zeros_like(h)
    y.copy_(h)
    h.relu_()
    return h, y


def masked(s, x):
    h = s.conv(x)
    h.masked_fill_(h < 0, 0.5)
    g = h.clone()
    g.clamp_(max=0.3)
    return g + h


def comparison_keeps_the_dtype(s, x):
    h = s.conv(x)
    h.gt_(0)
    return h


def other_dtype(s, x):
    h = s.conv(x).float()
    h.add_(s.conv(x))
    return h


def metadata(s, x):
    return s.conv(x).unsqueeze_(1).squeeze_(1).transpose_(1, 2)


PROGRAMS = [
    base_slice_is_read_later,
    module_called_twice,
    old_name_of_a_module_input_is_read,
    chained,
    functions,
    dropout_in_place,
    views_of_all_kinds,
    several_writes_through_views,
    tuple_of_views,
    read_before_and_after,
    out_argument,
    fills,
    copied_then_written,
    source_of_a_copy_is_written,
    masked,
    comparison_keeps_the_dtype,
    other_dtype,
    metadata,
]


# Python's item assignment: symbolic_trace cannot follow it, export can.
def items(s, x):
    h = s.conv(x)
    h[:, 2] = 0
    h[:, 3:5] = 1.5
    h[..., 0] = h[..., 1]
    h[0] = h[1] * 2
    return h


def items_by_tensor(s, x):
    h = s.conv(x)
    h[:, s.index] = 7.0
    h[h > 0.6] = 2.0
    return h


def plus_equals_on_a_slice(s, x):
    h = s.conv(x)
    h[:, 1:3] += s.weight[:2].view(1, 2, 1, 1)
    h[:, 4] *= 2
    return h


def whole_item_then_written(s, x):
    h = s.conv(x)
    y = torch.zeros_like(h)
    y[...] = h
    y.relu_()
    return h, y


EXPORT_ONLY = [whole_item_then_written, items, items_by_tensor, plus_equals_on_a_slice]


def made(program):
    return type("Made", (Base,), {"forward": program})().double().eval()


def functionalized(model, route, x=X):
    with torch.no_grad():
        want = model(x.clone())
        traced = trace(model, (x.clone(),), route)
        before = snapshot(model)
        gm = capture(traced).graph_module
        result = Pipeline(["functionalize"])(gm)
        assert_same(want, gm(x.clone()))
        assert_same(want, traced(x.clone()))
    assert_unchanged(model, before)
    return gm, result


@pytest.mark.parametrize(
    ("program", "route"),
    [(p, r) for p in PROGRAMS for r in ("symbolic", "export")] + [(p, "export") for p in EXPORT_ONLY],
)
def test_computes_the_same_without_a_write(program, route):
    gm, result = functionalized(made(program), route)
    left = [n for n in gm.graph.nodes if is_mutating(n)]
    assert not left
    assert not result.refusals
    assert not mutation_barriers(gm)
    assert not Pipeline(["functionalize"])(gm).modified


def gradient(net):
    """Of the sum of all outputs with respect to the convolution's weight; None when autograd refuses."""
    weight = net.get_parameter("conv.weight")
    try:
        out = net(X.clone())
        return torch.autograd.grad(sum(t.sum() for t in (out if isinstance(out, tuple) else (out,))), weight)[
            0
        ]
    except RuntimeError:
        return None


@pytest.mark.parametrize("program", [*PROGRAMS, *EXPORT_ONLY])
def test_gradients_are_those_of_the_in_place_program(program):
    if program is comparison_keeps_the_dtype:
        pytest.skip("in place the gradient is zero, out of place there is none")
    model = made(program)
    gm, _ = functionalized(model, "export")
    grads = [gradient(model), gradient(gm)]
    if grads[0] is None:
        pytest.skip("autograd refuses the in-place program itself")
    assert_same(*grads)


def writes_input(s, x):
    x.add_(1)
    return s.conv(x)


def writes_view_of_input(s, x):
    x[:, 0].zero_()
    return s.conv(x)


def writes_parameter(s, x):
    s.weight.data.mul_(1.0)
    return s.conv(x) * s.weight.view(1, -1, 1, 1)


def writes_buffer(s, x):
    s.steps.add_(1)
    return s.conv(x) + s.steps.view(1, -1, 1, 1)


def maybe_view_is_read(s, x):
    h = s.conv(x)
    flat = h.flatten(1)
    h.add_(1)
    return flat


def expanded_view(s, x):
    h = s.conv(x).sum(1, keepdim=True)
    e = h.expand(2, 8, 5, 5)
    h.mul_(2)
    return e


def chunk_is_written(s, x):
    h = s.conv(x)
    a, _ = h.chunk(2, 1)
    a.mul_(2)
    return h


def written_through_detach(s, x):
    h = s.conv(x)
    h.detach()[:, 1].sub_(1)
    return h


def random_fill(s, x):
    return s.conv(x) + torch.zeros_like(x).uniform_(0, 1)[:, :1] * 0


REFUSED = [
    writes_input,
    writes_view_of_input,
    maybe_view_is_read,
    chunk_is_written,
    random_fill,
    written_through_detach,
]


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("program", REFUSED)
def test_what_cannot_be_resolved_stays_with_a_reason_and_is_barred(program, route):
    gm, result = functionalized(made(program), route)
    left = [n for n in gm.graph.nodes if is_mutating(n)]
    assert left
    assert [(r.node, r.reason) for _, r in result.refusals] == [(n.name, Reason.MUTATION) for n in left]
    barred = mutation_barriers(gm)
    assert set(left) <= barred
    if program in (writes_input, writes_view_of_input):
        assert gm.graph.find_nodes(op="placeholder")[0] in barred
    if program is maybe_view_is_read:
        assert {n.name for n in barred} >= {"flatten", "conv" if route == "symbolic" else "conv2d"}


def shape_changes_under_another_name(s, x):
    h = s.conv(x)
    y = h[:, :4]
    h.unsqueeze_(0)
    return y, h


@pytest.mark.parametrize("is_source", [True, False])
def test_a_copy_lends_no_storage_to_a_write_that_stays(is_source):
    """The later write cannot be made functional: it must not reach the other tensor."""

    def program(s, x):
        h = s.conv(x)
        y = torch.zeros_like(h)
        y.copy_(h)
        (h if is_source else y).bernoulli_(0.0)
        return h, y

    model = made(program)
    gm = capture(torch.fx.symbolic_trace(model)).graph_module
    Pipeline(["functionalize"])(gm)
    assert_same(model(X.clone()), gm(X.clone()))
    assert [n.target for n in gm.graph.nodes if is_mutating(n)] == ["bernoulli_"]


@torch.fx.wrap
def a_number(x):
    return x.shape[1] / 10


def test_a_function_in_place_with_an_argument_of_unknown_kind():
    """The number may be a tensor of another dtype as far as the graph tells, so the result is cast."""
    model = made(lambda s, x: F.leaky_relu(s.conv(x), a_number(x), inplace=True))
    gm = capture(torch.fx.symbolic_trace(model)).graph_module
    Pipeline(["functionalize"])(gm)
    assert_same(model(X.clone()), gm(X.clone()))
    assert not [n for n in gm.graph.nodes if is_mutating(n)]


def written_after_a_refused_write(s, x):
    h = s.conv(x)
    flat = h.flatten(1)
    h.add_(1)
    h.mul_(2)
    return flat


WHY = {
    shape_changes_under_another_name: "changes the shape under other names of the tensor",
    written_after_a_refused_write: "writes the same storage in place",
    maybe_view_is_read: "may or may not share storage",
    chunk_is_written: "cannot be undone",
    random_fill: "has no functional twin",
    writes_input: "it may write x, a graph input",
}


@pytest.mark.parametrize("program", WHY)
def test_a_refusal_says_why(program):
    _, result = functionalized(made(program), "symbolic")
    assert WHY[program] in [r.detail for _, r in result.refusals][-1]


def test_one_piece_of_a_split_under_two_names_is_refused():
    _, result = functionalized(made(one_piece_under_two_names), "symbolic")
    assert [r.node for _, r in result.refusals] == ["add_"]


def test_buffer_update_is_refused():
    model = made(writes_buffer)
    with torch.no_grad():
        gm = capture(torch.export.export(model, (X,), strict=False)).graph_module
    result = Pipeline(["functionalize"])(gm)
    assert result.refusals
    assert any(is_mutating(n) for n in gm.graph.nodes)


def test_a_view_that_sees_the_write_without_an_inverse_is_taken_anew():
    gm, result = functionalized(made(expanded_view), "symbolic")
    assert not result.refusals
    assert sum(n.target == "expand" for n in gm.graph.nodes) == 1 + 1


def test_only_the_resolved_call_of_a_shared_module_goes_functional():
    gm, result = functionalized(made(one_call_resolves_another_does_not), "symbolic")
    in_place = [n for n in gm.graph.nodes if n.op == "call_module" and is_mutating(n)]
    assert len(in_place) == 1
    assert gm.get_submodule("relu").inplace
    assert not gm.get_submodule("relu_functional").inplace
    assert len(result.refusals) == 1


def by_hand(build):
    """A graph over one convolution; symbolic_trace would turn ``+=`` into ``+``."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(Base().double().eval(), graph)


def operators(g, x):
    h = g.call_module("conv", (x,))
    h = g.call_function(operator.iadd, (h, 1))
    k = g.call_function(operator.imul, (h, g.call_method("mean", (x,))))
    g.call_method("__isub__", (h, 3))
    return (h, k)


def item_assignment(g, x):
    h = g.call_module("conv", (x,))
    v = g.call_function(operator.getitem, (h, (slice(None), 2)))
    g.call_function(operator.setitem, (h, (Ellipsis, slice(1, 3), 0), 7.0))
    g.call_function(
        operator.setitem, (h, (slice(None), slice(1, None), None, 1), x.graph.call_method("mean", (x,)))
    )
    g.call_method("__setitem__", (h, 0, 2.0))
    return (h, v)


@pytest.mark.parametrize("build", [operators, item_assignment])
def test_operators_and_item_assignment_in_a_graph(build):
    given = by_hand(build)
    with torch.no_grad():
        want = given(X.clone())
        gm = capture(given).graph_module
        result = Pipeline(["functionalize"])(gm)
        assert not result.refusals
        assert not any(is_mutating(n) for n in gm.graph.nodes)
        assert_same(want, gm(X.clone()))


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (lambda g: (slice(None), [0, 2]), "index [0, 2] is not followed"),
        (lambda g: (slice(None), g.get_attr("index"), slice(0, 2)), "the index mixes tensors and slices"),
        (lambda g: (slice(None), True), "index True is not followed"),
    ],
)
def test_indices_of_item_assignment_that_are_not_followed(index, why):
    def assigned(g, x):
        h = g.call_module("conv", (x,))
        g.call_function(operator.setitem, (h, index(g), 0.5))
        return h

    given = by_hand(assigned)
    with torch.no_grad():
        want = given(X.clone())
        gm = capture(given).graph_module
        ((_, refusal),) = Pipeline(["functionalize"])(gm).refusals
        assert (refusal.reason, refusal.detail) == (Reason.MUTATION, why)
        assert_same(want, gm(X.clone()))


def test_number_arithmetic_keeps_what_the_generated_code_does():
    """``n //= 2`` in fx's code rebinds n itself, so that later readers of n get the halved number."""

    def numbers(g, x):
        n = g.call_function(operator.iadd, (g.call_method("size", (x, 1)), 5))
        m = g.call_function(operator.ifloordiv, (n, 2))
        return g.call_function(operator.mul, (g.call_module("conv", (x,)), n)), m, n

    given = by_hand(numbers)
    want = given(X)
    gm = capture(given).graph_module
    Pipeline(["functionalize"])(gm)
    assert_same(want, gm(X))
    assert_same(want, fx.Interpreter(gm).run(X))


@pytest.mark.parametrize(
    ("node_of", "expected"),
    [
        (lambda g, x: g.call_function(torch.ops.aten.relu_.default, (x,)), True),
        (lambda g, x: g.call_function(torch.ops.aten.relu.default, (x,)), False),
        (lambda g, x: g.call_method("add_", (x, 1)), True),
        (lambda g, x: g.call_method("__iadd__", (x, 1)), True),
        (lambda g, x: g.call_method("__add__", (x, 1)), False),
        (lambda g, x: g.call_function(F.relu, (x,)), False),
        (lambda g, x: g.call_function(F.relu, (x, True)), True),
        (lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}), True),
        (lambda g, x: g.call_function(F.relu_, (x,)), True),
        (lambda g, x: g.call_function(torch.add, (x, 1), {"out": x}), True),
        (lambda g, x: g.call_function(operator.setitem, (x, 0, 1)), True),
        (lambda g, x: g.call_function(operator.iadd, (x, 1)), True),
        (lambda g, x: g.call_function(operator.add, (x, 1)), False),
        (lambda g, x: g.call_function(F.batch_norm, (x, x, x), {"training": True}), True),
        (lambda g, x: g.call_function(F.batch_norm, (x, None, None), {"training": True}), False),
        (lambda g, x: g.call_function(F.batch_norm, (x, x, x)), False),
        (
            lambda g, x: g.call_function(
                torch.ops.aten.batch_norm.default, (x, x, x, x, x, True, 0.1, 1e-5, False)
            ),
            True,
        ),
        (
            lambda g, x: g.call_function(
                torch.ops.aten.batch_norm.default, (x, x, x, x, x, False, 0.1, 1e-5, False)
            ),
            False,
        ),
    ],
)
def test_is_mutating(node_of, expected):
    graph = fx.Graph()
    assert is_mutating(node_of(graph, graph.placeholder("x"))) is expected
