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
