"""One test for each way in which the code once failed the hypothesis of a lemma (docs/theory.md names them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import ROUTES, Inputs, check, kill, randomized

Built = tuple[nn.Module, Inputs] | tuple[nn.Module, Inputs, dict[str, Any]]
HOLES: dict[str, Callable[[], Built]] = {}


class Net(nn.Module):
    """A forward function over named modules and parameters."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        object.__setattr__(self, "run", run)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Net2(Net):
    """The same for two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.run(self, x, y)


def net(run: Callable[..., Any], **parts: Any) -> Any:
    cls = Net if run.__code__.co_argcount == 2 else Net2
    return randomized(cls(run, **parts))


def hole(build: Callable[[], Built]) -> Callable[[], Built]:
    HOLES[build.__name__] = build
    return build


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


# ------------------------------------------------------------------------------------------ L: contractions
@hole
def l2_a_computed_bias_takes_no_constant() -> Built:
    m = net(
        lambda s, x: F.linear(s.a(x), s.w, s.c(x).sum(0)), a=nn.Linear(4, 8), c=nn.Linear(4, 3), w=param(3, 8)
    )
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


@hole
def c6_the_path_of_a_new_bias_is_free() -> Built:
    m = net(
        lambda s, x: F.relu(F.linear(s.a(x), s.weight)) + s.bias,
        a=nn.Linear(4, 8),
        weight=param(3, 8),
        bias=param(3),
    )
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


@hole
def l4_a_weight_of_any_memory_order_carries_constants() -> Built:
    m = net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 3, 3, padding=1))
    kill(m.a, [0, 1, 5])
    m.b.weight = nn.Parameter(m.b.weight.detach().transpose(2, 3).contiguous().transpose(2, 3))
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def v3_a_carrier_makes_another_carrier_needed() -> Built:
    def run(s: Any, x: Tensor) -> Tensor:
        h = s.b(
            s.a(x)
        )  # reads constants across a border, and is live only because of the carrier behind the norm
        h = s.n(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return s.c(h)

    m = net(
        run,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 6, 3, padding=1),
        n=nn.LayerNorm(6),
        c=nn.Conv2d(6, 2, 3, padding=1),
    )
    kill(m.a, [0, 1, 5])
    m.n.weight.data.zero_()
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def l1_constants_that_differ_from_place_to_place() -> Built:
    m = net(
        lambda s, x: s.b(s.a(x).view(-1, 2, 4, 4)).relu().sum((2, 3)),
        a=nn.Linear(5, 32),
        b=nn.Conv2d(2, 3, 3),
    )
    kill(m.a, range(16))
    with torch.no_grad():
        m.b.weight.zero_()
        m.b.weight[:, 0, 1, 1], m.b.weight[:, 0, 0, 0] = 1, -1
    return m, (torch.randn(2, 5),)


@hole
def l2_a_bias_of_one_number_takes_no_constant() -> Built:
    m = net(lambda s, x: F.linear(s.a(x), s.w, s.c), a=nn.Linear(4, 8), c=param(1), w=param(3, 8))
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


@hole
def l3_a_vector_has_one_position() -> Built:
    m = net(lambda s, x: s.b(s.a(x.mean(0)).relu()), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


@hole
def s1_the_number_of_elements() -> Built:
    m = net(lambda s, x: s.b(s.a(x) + s.a(x).numel() / x.size(0)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


# ------------------------------------------------------------------------------------------ E: elementwise
@hole
def e4_a_logarithm_without_channels_meets_no_leftover() -> Built:
    m = net(
        lambda s, x, y: s.a(x) * torch.log(s.c(x).square().sum(1, keepdim=True)) + y.mean(0, keepdim=True),
        a=nn.Linear(4, 8),
        c=nn.Linear(4, 8),
    )
    kill(m.a, range(8), bias=True)
    return m, (torch.randn(3, 4), torch.randn(3, 8))


# ------------------------------------------------------------------------------------------ N: norms
def token_constants(norm: nn.Module) -> Built:
    """A channel that is constant at each token, but another constant at each, as token mixing makes it."""

    def run(s: Any, x: Tensor) -> Tensor:
        return s.h(s.n(s.t(s.a(x).transpose(1, 2)).transpose(1, 2)))

    m = net(run, a=nn.Linear(3, 8), t=nn.Linear(5, 6), n=norm, h=nn.Linear(8, 4))
    kill(m.a, [1, 4], bias=True)
    return m, (torch.randn(2, 5, 3),)


@hole
def n1_layer_norm_of_constants_that_differ_by_token() -> Built:
    return token_constants(nn.LayerNorm(8))


@hole
def n1_rms_norm_of_constants_that_differ_by_token() -> Built:
    return token_constants(nn.RMSNorm(8))


@hole
def n5_group_norm_of_constants_that_differ_by_place() -> Built:
    m = net(
        lambda s, x: s.b(s.n(s.a(x).view(-1, 4, 2, 2))),
        a=nn.Linear(5, 16),
        b=nn.Conv2d(4, 3, 1),
        n=nn.GroupNorm(2, 4),
    )
    kill(m.a, [4, 5, 6, 7])
    kill(m.b, columns=[1])
    return m, (torch.randn(2, 5),)


# ------------------------------------------------------------------------------------------ A: attention
@hole
def a3_a_key_lane_with_a_constant_of_its_own_at_each_token() -> Built:
    def run(s: Any, x: Tensor) -> Tensor:
        t = torch.cat([s.p.expand(x.size(0), -1, -1), x], 1)
        return s.o(F.scaled_dot_product_attention(s.q(t), s.k(t) + s.pos, s.v(t)))

    parts = {name: nn.Linear(8, 8) for name in "qkv"}
    m = net(run, p=param(1, 3, 8), pos=param(1, 7, 8), o=nn.Linear(8, 4), **parts)
    kill(m.k, [1, 4, 5])
    return m, (torch.randn(2, 4, 8),)


@hole
def a3_the_same_where_query_and_key_lengths_differ() -> Built:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.t(s.a(x).transpose(1, 2)).transpose(1, 2)
        return s.o(F.scaled_dot_product_attention(s.q(x), y, s.v(y)))

    m = net(
        run,
        a=nn.Linear(3, 8),
        t=nn.Linear(5, 6),
        q=nn.Linear(3, 8),
        v=nn.Linear(8, 8),
        o=nn.Linear(8, 4),
    )
    kill(m.a, [1, 4], bias=True)
    return m, (torch.randn(2, 5, 3),)


# ------------------------------------------------------------------------------------------ M: movement
def linear_pair(op: Callable[[Any, Tensor], Tensor], width: int = 8) -> Any:
    """Three of eight features are constant in front of ``op``."""
    m = net(lambda s, x: s.b(op(s, s.a(x))), a=nn.Linear(4, 8), b=nn.Linear(width, 3))
    kill(m.a, [0, 1, 5])
    return m


def cut_by(op: Callable[[Tensor, int], Tensor], width: int, other: int) -> Built:
    """``op`` decides by the size of another input, which differs from run to run."""
    m = net(lambda s, x, y: s.b(op(s.a(x), y.size(1))), a=nn.Linear(4, 8), b=nn.Linear(width, 3))
    kill(m.a, [0, 1, 5])
    x, options = torch.randn(3, 4), {"others": [(torch.randn(3, 4), torch.randn(3, other))]}
    return m, (x, torch.randn(3, 4)), {**options, "routes": ["symbolic"]}


@hole
def m5_a_slice_that_ends_elsewhere_each_time() -> Built:
    return cut_by(lambda t, n: t[:, :n].sum(1, keepdim=True), 1, 7)


@hole
def m5_a_slice_that_starts_elsewhere_each_time() -> Built:
    return cut_by(lambda t, n: t[:, n : n + 3], 3, 2)


@hole
def m5_narrow_at_a_computed_start() -> Built:
    return cut_by(lambda t, n: t.narrow(1, n, 3), 3, 2)


@hole
def m5_select_at_a_computed_position() -> Built:
    return cut_by(lambda t, n: t.unsqueeze(2).select(1, n), 1, 2)


@hole
def m5_an_index_that_is_computed() -> Built:
    return cut_by(lambda t, n: t.unsqueeze(2)[:, n], 1, 2)


@hole
def m5_a_roll_by_a_computed_shift() -> Built:
    return cut_by(lambda t, n: t.roll(n, 1), 8, 2)


@hole
def m5_padding_by_a_computed_amount() -> Built:
    return cut_by(lambda t, n: F.pad(t, (n, 8 - n)), 16, 2)


@hole
def m5_a_split_into_computed_sizes() -> Built:
    return cut_by(lambda t, n: t.split([n, 8 - n], 1)[0].sum(1, keepdim=True), 1, 7)


@hole
def squeeze_of_every_unit_axis_beside_one_live_channel() -> Built:
    m = net(lambda s, x: s.b(s.a(x).squeeze()), a=nn.Conv2d(3, 8, 4), b=nn.Linear(8, 3))
    kill(m.a, range(7))
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def squeeze_of_an_axis_that_shrinks_to_one() -> Built:
    m = net(lambda s, x: s.b(s.a(x).squeeze(1)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    kill(m.a, range(7))
    return m, (torch.randn(3, 4),)


@hole
def expand_leaves_the_fields_of_its_operand_alone() -> Built:
    m = net(lambda s, x: s.b(s.a(x).expand(-1, 8, -1, -1)), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(8, 3, 1))
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def s1_view_as_a_tensor_that_loses_other_channels() -> Built:
    m = net(
        lambda s, x: s.b(s.a(x).view_as(s.c(x)).relu()),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 3),
        c=nn.Linear(4, 8),
    )
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


@hole
def s1_expand_as_a_tensor_that_loses_other_channels() -> Built:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.b(s.a(x.mean((2, 3), keepdim=True)).expand_as(s.c(x))) + s.d(s.c(x))

    m = net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 3, 1), c=nn.Conv2d(3, 8, 1), d=nn.Conv2d(8, 3, 1))
    kill(m.a, [0, 1, 5])
    kill(m.c, [5, 6])
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def cast_to_integers() -> Built:
    m = linear_pair(lambda s, t: t.to(torch.int64).to(t.dtype))
    m.a.bias.data.add_(0.5)
    return m, (torch.randn(3, 4),)


@hole
def cast_to_half_precision() -> Built:
    return linear_pair(lambda s, t: t.half().to(torch.float64)), (torch.randn(3, 4),)


@hole
def m1_every_second_channel_and_part_of_the_picture() -> Built:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.b(y[:, ::2, 1:3]).mean((2, 3)) + s.c(y).mean((2, 3))

    m = net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 3, 1), c=nn.Conv2d(8, 3, 1))
    kill(m.a, [1, 5])
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def m1_every_second_channel_and_one_column() -> Built:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.b(y[:, ::2, :, 1]).mean(2) + s.c(y).mean((2, 3))

    m = net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv1d(4, 3, 1), c=nn.Conv2d(8, 3, 1))
    kill(m.a, [1, 5])
    return m, (torch.randn(2, 3, 4, 4),)


@hole
def m1_circular_padding_of_features() -> Built:
    m = linear_pair(lambda s, t: F.pad(t, (2, 1), mode="circular"), 11)
    return m, (torch.randn(3, 2, 4),)


@hole
def m1_reflection_of_features() -> Built:
    m = linear_pair(lambda s, t: F.pad(t, (2, 1), mode="reflect"), 11)
    kill(m.b, columns=[5, 6, 7])
    return m, (torch.randn(3, 2, 4),)


@hole
def cat_of_a_whole_tuple() -> Built:
    return linear_pair(lambda s, t: torch.cat(torch.split(t, 4, 1), 1)), (torch.randn(3, 4),)


@hole
def stack_of_a_whole_tuple() -> Built:
    return linear_pair(lambda s, t: torch.stack(t.chunk(2, 1), 1).flatten(1)), (torch.randn(3, 4),)


@hole
def repeat_interleave_without_an_axis() -> Built:
    return linear_pair(lambda s, t: t.repeat_interleave(2).view(-1, 16), 16), (torch.randn(3, 4),)


@hole
def repeat_interleave_by_a_tensor() -> Built:
    m = linear_pair(lambda s, t: t.repeat_interleave(torch.tensor([1, 2] * 4), 1), 12)
    return m, (torch.randn(3, 4),), {"routes": ["symbolic"]}


@hole
def c6_a_module_without_tensors_is_called_twice() -> Built:
    m = net(
        lambda s, x: s.b(s.u(s.a(x)).flatten(1)) + s.d(s.u(s.c(x)).flatten(1)),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 3),
        c=nn.Linear(4, 8),
        d=nn.Linear(8, 3),
        u=nn.Unflatten(1, (8, 1)),
    )
    kill(m.a, [0, 1, 5])
    kill(m.c, [2])
    return m, (torch.randn(3, 4),)


@hole
def o1_an_output_whose_channel_axis_holds_the_batch() -> Built:
    m = net(lambda s, x: s.a(x).flatten(0, 1), a=nn.Conv2d(3, 8, 1))
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(2, 3, 4, 4),)


# ------------------------------------------------------------------------------------------ P: spatial ops
@hole
def p1_max_pool_along_features() -> Built:
    return linear_pair(lambda s, t: F.max_pool1d(t, 2), 4), (torch.randn(3, 4),)


@hole
def p1_average_pool_along_features() -> Built:
    return linear_pair(lambda s, t: F.avg_pool1d(t, 2), 4), (torch.randn(3, 4),)


@hole
def p1_adaptive_pool_along_features() -> Built:
    return linear_pair(lambda s, t: F.adaptive_avg_pool1d(t, 4), 4), (torch.randn(3, 4),)


@hole
def p1_reflection_layer_along_features() -> Built:
    m = net(lambda s, x: s.b(s.p(s.a(x))), a=nn.Linear(4, 8), b=nn.Linear(10, 3), p=nn.ReflectionPad1d(1))
    kill(m.a, [0, 1, 5])
    return m, (torch.randn(3, 4),)


@hole
def b1_instance_norm_of_constants_that_differ_by_place() -> Built:
    m = net(
        lambda s, x: s.b(s.n(s.a(x).view(-1, 4, 2, 2))),
        a=nn.Linear(5, 16),
        b=nn.Conv2d(4, 3, 1),
        n=nn.InstanceNorm2d(4, affine=True),
    )
    kill(m.a, [4, 5, 6, 7])
    return m, (torch.randn(2, 5),)


@hole
def h6_an_angle_tells_minus_zero_from_zero() -> Built:
    m = net(
        lambda s, x: s.b(torch.atan2(s.a(x) * -1, s.c(x) * -1)),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 3),
        c=nn.Linear(4, 8),
    )
    kill(m.a, [0, 1, 5], bias=True)
    kill(m.c, [0, 1, 5], bias=True)
    return m, (torch.randn(3, 4),)


@hole
def e5_alpha_dropout_makes_zero_something_else() -> Built:
    m = net(
        lambda s, x: s.b(F.alpha_dropout(s.a(x), 0.5, True).abs().sign()),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 3),
    )
    kill(m.a, range(4), bias=True)
    return m, (torch.randn(3, 4),)


# ------------------------------------------------------------------------------------------ the check
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", HOLES)
def test_hole(name: str, route: str) -> None:
    torch.manual_seed(0)
    model, inputs, *rest = HOLES[name]()
    options = dict(rest[0]) if rest else {}
    routes = options.pop("routes", ROUTES)
    if route not in routes:
        pytest.skip(f"there is no {route} form of it")
    check(model, inputs, routes=[route], **options)
