from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.passes import Pipeline, get_pass
from tests.snapshots import assert_same, assert_unchanged, snapshot, trace

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def module(forward, **tensors):
    """A module with these parameters (buffers when they need no grad) and this forward."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in tensors.items():
                tensor = tensor.double() if tensor.is_floating_point() else tensor
                if name.startswith("buffer"):
                    self.register_buffer(name, tensor)
                else:
                    setattr(self, name, nn.Parameter(tensor, requires_grad=not name.startswith("frozen")))

    Made.forward = forward
    return Made().eval()


def folded(model, route, x=X):
    want = model(x)
    traced = trace(model, (x,), route)  # symbolic_trace itself leaves _tensor_constant0 on the model
    before = snapshot(model)
    gm = capture(traced).graph_module
    result = Pipeline(["fold-parameter-math"])(gm)
    assert_same(want, gm(x))
    assert_unchanged(model, before)
    assert not get_pass("fold-parameter-math")(gm).modified
    return gm, [edit for _, edit in result.edits], [refusal for _, refusal in result.refusals]


routes = pytest.mark.parametrize("route", ["symbolic", "export"])


class CustomLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return F.linear(x, self.weight)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = CustomLayer()

    def forward(self, x):
        return self.layer(x)


@routes
def test_a_mask_in_the_graph_becomes_the_weight(route):
    model = Holder().double()
    prune.l1_unstructured(model.layer, "weight", 0.5)
    model(X)
    gm = capture(trace(model, (X,), route)).graph_module
    want = model(X)
    result = get_pass("fold-parameter-math")(gm)
    assert [e.path for e in result.edits] == ["layer.weight"]
    assert list(gm.state_dict()) == ["layer.weight"]  # orig and mask are gone
    weight = gm.get_parameter("layer.weight")
    assert (weight == 0).sum() == 10
    assert weight.requires_grad
    assert_same(want, gm(X))
    gm(X).sum().backward()
    assert weight.grad is not None


def test_exported_parametrization_gets_its_own_name_back():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    parametrizations.weight_norm(model[0])
    gm, edits, _ = folded(model, "export")
    assert [e.path for e in edits] == ["0.weight"]
    assert sorted(gm.state_dict()) == ["0.bias", "0.weight"]


@routes
def test_evaluated_in_float64_and_rounded_once(route):
    model = module(
        lambda s, x: F.linear(x, s.w * s.a * s.b), w=torch.randn(5, 4), a=torch.rand(4), b=torch.rand(5, 1)
    )
    model.float()
    exact = model.w.double() * model.a.double() * model.b.double()
    gm = capture(trace(model, (X.float(),), route)).graph_module
    (edit,) = get_pass("fold-parameter-math")(gm).edits
    value = gm.get_parameter(edit.path)
    assert value.dtype == torch.float32
    assert torch.equal(value, exact.float())
    assert not torch.equal(
        value, model.w * model.a * model.b
    )  # the model's own double rounding differs somewhere


@routes
def test_overflow_and_nan_are_those_of_the_model(route):
    big = torch.tensor([1e30, 1.0, -1e30, 0.0])
    model = module(
        lambda s, x: x * (s.w * s.buffer_big / s.buffer_big),
        w=torch.tensor([1e30, 2.0, 3.0, 4.0]),
        buffer_big=big,
    )
    model.float()
    want = model(X.float())
    gm = capture(trace(model, (X.float(),), route)).graph_module
    assert get_pass("fold-parameter-math")(gm).modified
    assert want.isinf().any()
    assert want.isnan().any()
    torch.testing.assert_close(gm(X.float()), want, equal_nan=True)


@routes
def test_pure_movement_is_not_folded(route):
    def forward(self, x):
        w = self.w.t().contiguous().view(2, 2, 5)[:, :, :3].reshape(4, 3)
        return x @ w, x @ self.w.transpose(0, 1), x.float() @ self.w.float().t()

    _, edits, refusals = folded(module(forward, w=torch.randn(5, 4)), route)
    assert not edits
    assert not refusals


def test_a_table_that_is_taken_for_each_head_is_stored_once():
    """Rotary tables of heads that keep different lanes: the index is stored, not what it takes for every position."""

    def forward(self, x):
        table = (self.buffer_f * self.buffer_t).cos()  # [1, T, D]
        return x * torch.take_along_dim(table.unsqueeze(1), self.buffer_i, 3)

    index = torch.tensor([[0, 2, 3], [1, 4, 5]]).view(1, 2, 1, 3)
    model = module(
        forward, buffer_f=torch.rand(1, 1, 6), buffer_t=torch.arange(7.0).view(1, 7, 1), buffer_i=index
    )
    gm, edits, _ = folded(model, "export", torch.randn(4, 2, 7, 3, dtype=torch.float64))
    assert [tuple(e.value.shape) for e in edits] == [(1, 7, 6)]
    assert sum(t.numel() for t in gm.state_dict().values()) == 7 * 6 + 6


@routes
def test_movement_after_arithmetic_stays_and_before_it_is_folded_in(route):
    model = module(
        lambda s, x: x @ (s.w.t() * s.buffer_m).t(), w=torch.randn(4, 5), buffer_m=torch.rand(5, 1)
    )
    gm, edits, _ = folded(model, route)
    (edit,) = edits
    assert tuple(edit.value.shape) == (5, 4)
    assert sum("t" in str(n.target) and n.op != "get_attr" for n in gm.graph.nodes) >= 1


@routes
def test_expand_after_arithmetic_does_not_grow_the_model(route):
    model = module(lambda s, x: x.unsqueeze(0) + (s.w * 2).expand(7, 3, 4), w=torch.randn(4))
    _, edits, _ = folded(model, route)
    assert [e.value.numel() for e in edits] == [4]


@routes
@pytest.mark.parametrize("size", [9, 300])
def test_what_grows_is_refused(route, size):
    a, b = torch.randn(size, 1), torch.randn(1, size)
    model = module(lambda s, x: x.sum() * (s.a + s.b), a=a, b=b)
    gm, edits, refusals = folded(model, route)
    assert not edits
    assert [r.reason for r in refusals] == [Reason.GROWS]
    assert sorted(gm.state_dict()) == ["a", "b"]


def test_buffers_may_grow_while_they_are_small():
    """By export: symbolic_trace computes with buffers while it traces."""
    route = "export"
    a, b = torch.randn(300, 1), torch.randn(1, 300)
    _, edits, refusals = folded(
        module(lambda s, x: x.sum() * (s.buffer_a + s.buffer_b), buffer_a=a[:9], buffer_b=b), route
    )
    assert len(edits) == 1
    assert not refusals
    _, edits, refusals = folded(
        module(lambda s, x: x.sum() * (s.buffer_a + s.buffer_b), buffer_a=a, buffer_b=b), route
    )
    assert not edits
    assert [r.reason for r in refusals] == [Reason.GROWS]


@routes
def test_below_a_growing_sum_the_parts_are_folded(route):
    a, b = torch.randn(300, 1), torch.randn(1, 300)
    _, edits, refusals = folded(module(lambda s, x: x.sum() * (s.a.exp() + s.b), a=a, b=b), route)
    assert [e.path for e in edits] == ["a"]
    assert len(refusals) == 1


@routes
def test_a_parameter_that_is_also_read_directly_is_not_doubled(route):
    model = module(
        lambda s, x: F.linear(x, s.w * s.buffer_m) + F.linear(x, s.w),
        w=torch.randn(5, 4),
        buffer_m=torch.rand(5, 4),
    )
    gm, edits, refusals = folded(model, route)
    assert not edits
    assert [r.reason for r in refusals] == [Reason.GROWS]
    assert sorted(gm.state_dict()) == ["buffer_m", "w"]


@routes
def test_different_products_of_one_parameter_are_refused_together(route):
    def forward(self, x):
        return F.linear(x, self.w * self.buffer_m), F.linear(x, self.w * (1 - self.buffer_m))

    gm, edits, refusals = folded(
        module(forward, w=torch.randn(5, 4), buffer_m=(torch.rand(5, 4) > 0.5).double()), route
    )
    assert not any(e.is_parameter for e in edits)  # 1 - m alone
    assert [r.reason for r in refusals] == [Reason.GROWS] * 2
    assert [name for name, _ in gm.named_parameters()] == ["w"]


@routes
def test_equal_products_of_one_parameter_become_one(route):
    def forward(self, x):
        return F.linear(x, self.w * self.buffer_m), F.linear(2 * x, self.w * self.buffer_m)

    gm, edits, refusals = folded(
        module(forward, w=torch.randn(5, 4), buffer_m=(torch.rand(5, 4) > 0.5).double()), route
    )
    assert [(e.path, e.is_known) for e in edits] == [("w", False), ("w", True)]
    assert not refusals
    assert list(gm.state_dict()) == ["w"]


@routes
def test_sources_that_all_products_share_are_counted_once(route):
    def forward(self, x):
        return F.linear(x, self.v * self.s), F.linear(x, self.w * self.s)

    gm, edits, _ = folded(module(forward, v=torch.randn(5, 4), w=torch.randn(3, 4), s=torch.randn(4)), route)
    assert len(edits) == 2
    assert sum(p.numel() for p in gm.parameters()) == 32


@routes
def test_buffers_alone_give_a_buffer_and_frozen_parameters_a_frozen_one(route):
    def forward(self, x):
        return x * self.buffer_a.cos() + x * (self.frozen_w * 2)

    gm, edits, _ = folded(module(forward, buffer_a=torch.rand(4), frozen_w=torch.rand(4)), route)
    if route == "symbolic":  # fx itself evaluates arithmetic on buffers while it traces
        assert [(e.is_parameter, e.needs_grad) for e in edits] == [(True, False)]
    else:
        assert [(e.is_parameter, e.needs_grad) for e in edits] == [(False, False), (True, False)]
    assert len(list(gm.buffers())) == 1
    assert [p.requires_grad for p in gm.parameters()] == [False]


@routes
def test_inputs_randomness_and_sizes_of_inputs_are_not_constants(route):
    def forward(self, x):
        return x * (self.w * x.shape[0]) + (self.w * x.mean())

    _, edits, _ = folded(module(forward, w=torch.rand(4)), route)
    assert not edits
    noisy = module(lambda s, x: x + s.w * torch.rand_like(s.w), w=torch.rand(4))
    gm = capture(trace(noisy, (X,), route)).graph_module
    assert not get_pass("fold-parameter-math")(gm).modified


@routes
def test_standardised_weight(route):
    def forward(self, x):
        weight = F.batch_norm(
            self.w.reshape(1, 5, -1),
            None,
            None,
            weight=(self.gain * 0.5).view(-1),
            training=True,
            momentum=0.0,
        ).reshape_as(self.w)
        return F.linear(x, weight)

    gm, edits, _ = folded(module(forward, w=torch.randn(5, 4), gain=torch.rand(5, 1)), route)
    assert len(edits) == 1
    assert len(list(gm.parameters())) == 1


@routes
def test_items_of_a_tuple_of_results(route):
    def forward(self, x):
        std, mean = torch.std_mean(self.w, 0)
        return x * std + mean

    _, edits, _ = folded(module(forward, w=torch.randn(5, 4)), route)
    assert [tuple(e.value.shape) for e in edits] == [(4,), (4,)]


def test_written_parameters_are_left_alone():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x):
            self.n.add_(1)
            return x * (self.n * 2)

    gm = capture(trace(Counter(), (torch.ones(1),), "export")).graph_module
    assert not get_pass("fold-parameter-math")(gm).modified
    assert (gm(torch.ones(1)), gm(torch.ones(1))) == (torch.tensor([2.0]), torch.tensor([4.0]))


@fx.wrap
def user_function(weight):
    return weight * 2


def test_user_functions_are_not_run():
    model = module(lambda s, x: x * user_function(s.w), w=torch.rand(4))
    gm = capture(fx.symbolic_trace(model)).graph_module
    assert not get_pass("fold-parameter-math")(gm).modified


def test_integer_tables_are_not_folded():
    model = module(lambda s, x: x[:, s.buffer_i * 2 + 1], buffer_i=torch.tensor([0, 1]))
    _, edits, _ = folded(model, "symbolic")
    assert not edits


def test_plan_writes_nothing_and_is_the_same_twice():
    model = Holder().double()
    prune.l1_unstructured(model.layer, "weight", 0.5)
    gm = capture(trace(model, (X,), "export")).graph_module
    before, code = snapshot(gm), gm.code
    first, second = (get_pass("fold-parameter-math").plan(gm) for _ in range(2))
    assert first.edits == second.edits
    assert_unchanged(gm, before)
    assert gm.code == code
    assert first.edits[0].to_json()["path"] == "layer.weight"


@routes
def test_large_standardised_weight_replaces_its_source(route):
    def forward(self, x):
        w = F.batch_norm(self.w.reshape(1, 300, -1), None, None, training=True).reshape_as(self.w)
        return F.linear(x, w)

    model = module(forward, w=torch.randn(300, 300))
    gm, _, refusals = folded(model, route, torch.randn(2, 300, dtype=torch.float64))
    assert not refusals
    assert list(gm.state_dict()) == ["w"]
