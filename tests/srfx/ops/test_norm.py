"""Norms over channels: what is removed in front of them, what their readers take, and what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.plan import Reason
from srfx.minimize import minimize
from srfx.nn import CompensatedGroupNorm, CompensatedLayerNorm, CompensatedRMSNorm, RemovedConstants
from tests.helpers import Sandwich, assert_equivalent, check, count, kill, plan_of, randomized, shapes

aten = torch.ops.aten
Op = Callable[..., Any]
X = torch.randn(4, 6)
TOKENS = torch.randn(2, 3, 6)
ZERO, EQUAL, DIFFERENT = (0.0, 0.0, 0.0), (1.5, 1.5, 1.5), (1.0, -2.0, 0.5)


def constant(layer: nn.Module, values: Sequence[float], first: int = 1) -> None:
    """Rows ``first`` and following of a layer become these constants."""
    rows = range(first, first + len(values))
    kill(layer, rows)
    with torch.no_grad():
        layer.bias[list(rows)] = torch.tensor(values, dtype=layer.bias.dtype)


class Plain(nn.Module):
    """b(norm(a(x))) with eight channels in between; ``norm`` is a module, or a function of y, gamma, beta."""

    def __init__(
        self, norm: Any, values: Sequence[float] = DIFFERENT, after: Op | None = None, width: int = 8
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 5)
        self.g, self.h = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.norm = norm if isinstance(norm, nn.Module) else None
        self.functions = [norm, after or (lambda y: y)]
        randomized(self)
        constant(self.a, values)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.norm(y) if self.norm is not None else self.functions[0](y, self.g, self.h)
        z: Tensor = self.b(self.functions[1](y))
        return z


# ---------------------------------------------------------------------------------------- spellings
LAYER: dict[str, Any] = {
    "module": lambda: nn.LayerNorm(8),
    "no affine": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(8, bias=False),
    "functional": lambda: lambda y, g, h: F.layer_norm(y, (8,), g, h),
    "keywords": lambda: lambda y, g, h: F.layer_norm(y, normalized_shape=[8], weight=g, eps=1e-3, bias=h),
    "functional plain": lambda: lambda y, g, h: F.layer_norm(y, (8,)),
    "torch": lambda: lambda y, g, h: torch.layer_norm(y, (8,), g, h),
    "aten": lambda: lambda y, g, h: aten.layer_norm.default(y, [8], g, h, 1e-5),
    "native": lambda: lambda y, g, h: torch.native_layer_norm(y, [8], g, h, 1e-5)[0],
    "aten native": lambda: lambda y, g, h: aten.native_layer_norm.default(y, [8], g, h, 1e-5)[0],
}
RMS: dict[str, Any] = {
    "module": lambda: nn.RMSNorm(8),
    "eps": lambda: nn.RMSNorm(8, eps=1e-3),
    "no affine": lambda: nn.RMSNorm(8, elementwise_affine=False),
    "functional": lambda: lambda y, g, h: F.rms_norm(y, (8,), g, 1e-6),
    "keywords": lambda: lambda y, g, h: F.rms_norm(y, normalized_shape=[8], weight=g),
    "torch": lambda: lambda y, g, h: torch.rms_norm(y, (8,), g),
    "aten": lambda: lambda y, g, h: aten.rms_norm.default(y, [8], g, 1e-6),
}


@pytest.mark.parametrize("values", [ZERO, EQUAL, DIFFERENT])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name: str, values: Sequence[float]) -> None:
    """Three channels go; the reader takes mu r in their place, and r as well when the constants differ."""
    n_statistics = 2 if values is DIFFERENT else 1
    check(Plain(LAYER[name](), values), (X,), kept={"a.weight": (5, 6), "b.weight": (5, 5 + n_statistics)})


@pytest.mark.parametrize("values", [ZERO, EQUAL, DIFFERENT])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name: str, values: Sequence[float]) -> None:
    """Zeros leave a plain RMS norm; other constants need 1/rms, one channel for all of them."""
    n_statistics = 0 if values is ZERO else 1
    found = check(
        Plain(RMS[name](), values), (X,), kept={"a.weight": (5, 6), "b.weight": (5, 5 + n_statistics)}
    )
    if name == "module":
        kind = nn.RMSNorm if values is ZERO else CompensatedRMSNorm
        assert isinstance(found["symbolic"].small.get_submodule("norm"), kind)


def test_how_many_statistics() -> None:
    layer, rms = nn.LayerNorm(8), nn.RMSNorm(8)
    check(Plain(layer, (2.0,)), (X,), kept={"a.weight": (7, 6), "b.weight": (5, 8)})
    check(Plain(layer, (2.0, 1.0)), (X,), kept={"a.weight": (6, 6), "b.weight": (5, 8)})
    check(Plain(layer, (2.0, 2.0)), (X,), kept={"a.weight": (6, 6), "b.weight": (5, 7)})
    check(Plain(rms, (2.0,)), (X,), kept={"a.weight": (7, 6), "b.weight": (5, 8)})
    check(Plain(rms, (2.0, 1.0)), (X,), kept={"a.weight": (6, 6), "b.weight": (5, 7)})


def test_constants_that_nobody_reads_do_not_count() -> None:
    """Two different constants, one of them read: one statistic, chosen for that one."""
    model = Plain(nn.LayerNorm(8), (2.0, 1.0))
    kill(model.b, columns=[1])
    check(model, (X,), kept={"a.weight": (6, 6), "b.weight": (5, 7)})
    kill(model.b, columns=[2])
    check(model, (X,), kept={"a.weight": (6, 6), "b.weight": (5, 6)})


def test_zero_scales() -> None:
    """A removed channel with gamma 0 is the constant beta; a varying one is still needed by the statistics."""
    model = Plain(nn.LayerNorm(8), DIFFERENT)
    with torch.no_grad():
        model.norm.weight[[1, 2, 3]] = 0
    check(model, (X,), kept={"a.weight": (5, 6), "b.weight": (5, 5)})
    with torch.no_grad():
        model.norm.weight[[5, 6]] = 0
    check(model, (X,), kept={"a.weight": (5, 6), "b.weight": (5, 5)})  # places follow the operand
    with torch.no_grad():
        model.norm.weight.zero_()
    check(model, (X,))


def test_zero_scales_of_rms_norm() -> None:
    model = Plain(nn.RMSNorm(8), DIFFERENT)
    with torch.no_grad():
        model.norm.weight[[1, 5]] = 0
    check(model, (X,), kept={"a.weight": (5, 6), "b.weight": (5, 6)})


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)])
def test_nothing_is_live(norm: nn.Module) -> None:
    model = Plain(norm, DIFFERENT)
    kill(model.b, range(5))
    found = check(model, (X,))
    assert count(found["symbolic"].small) <= 5 + 7  # one channel along each axis


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)])
def test_a_norm_of_constants_is_constant(norm: nn.Module) -> None:
    model = Plain(norm, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
    constant(model.a, (0.5,), 0)
    check(model, (X,), kept={"a.weight": (1, 6)})


# ---------------------------------------------------------------------------------------- readers
def test_readers_that_absorb() -> None:
    statistics = {"a.weight": (5, 6), "b.weight": (5, 7)}
    for after in (
        lambda y: F.dropout(y, 0.3, False),
        lambda y: y.unsqueeze(1).squeeze(1),
        lambda y: y.contiguous().clone(),
        lambda y: y.t().t(),
        lambda y: y.reshape(-1, 2, 8).permute(1, 0, 2).reshape(-1, 8),
    ):
        check(Plain(nn.LayerNorm(8), after=after), (X,), kept=statistics, routes=["symbolic"])
    back = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5))
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), back)
    constant(randomized(model)[0], DIFFERENT)
    check(model, (X,), kept={"2.1.weight": (5, 7)})


REFUSING: dict[str, Op] = {
    "activation": torch.tanh,
    "residual": lambda y: y + y.roll(1, 0),
    "concat": lambda y: torch.cat([y, y], 1)[:, :8],
    "product": lambda y: y * y,
    "scale": lambda y: y * 2.0,
    "softmax": lambda y: y.softmax(0),
}


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("values", [ZERO, DIFFERENT])
def test_readers_that_do_not_absorb(name: str, values: Sequence[float]) -> None:
    found = check(
        Plain(nn.LayerNorm(8), values, REFUSING[name]), (X,), kept={"a.weight": (8, 6), "b.weight": (5, 8)}
    )
    for outcome in found.values():
        refusal = next(r for r in outcome.refusals if r.reason is Reason.NOT_LINEAR_IN_NORM)
        assert "norm" in refusal.node
        assert refusal.detail, refusal


def test_output_does_not_absorb() -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.a(x))
            return y

    model = randomized(Output())
    constant(model.a, DIFFERENT)
    check(model, (X,), kept={"a.weight": (8, 6)}, reasons=[Reason.NOT_LINEAR_IN_NORM])
    with torch.no_grad():
        model.norm.weight[[1, 3]] = 0
    check(model, (X,), kept={"a.weight": (6, 6), "norm.weight": (6,)})


def test_a_reader_that_does_not_absorb_but_zero_scales() -> None:
    model = Plain(nn.LayerNorm(8), DIFFERENT, torch.tanh)
    with torch.no_grad():
        model.norm.weight[[1, 3]] = 0
    check(model, (X,), kept={"a.weight": (6, 6), "norm.weight": (6,), "b.weight": (5, 6)})


def test_several_readers() -> None:
    """One reader needs both statistics, one only mu r, one none; all see the same places."""

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
            self.b, self.c, self.d = nn.Linear(8, 5), nn.Linear(8, 4, bias=False), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.norm(self.a(x))
            return self.b(y), self.c(y), self.d(y)

    model = randomized(Readers())
    constant(model.a, DIFFERENT)
    kill(model.c, columns=[1, 2])
    kill(model.d, columns=[1, 2, 3])
    check(model, (X,), kept={"b.weight": (5, 7), "c.weight": (4, 7), "d.weight": (3, 7)})


def test_a_weight_that_is_read_twice() -> None:
    """The reader's weight serves another layer too, so it cannot take statistics."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z: Tensor = self.b(self.norm(y)) + self.b(y)
            return z

    model = randomized(Shared())
    constant(model.a, DIFFERENT)
    check(model, (X,), kept={"a.weight": (8, 6)}, reasons=[Reason.SHARED_WEIGHT])


def test_a_norm_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(6, 8)
            self.norm, self.b, self.d = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(self.norm(self.a(x))) + self.d(self.norm(self.c(x)))
            return z

    model = randomized(Twice())
    constant(model.a, DIFFERENT)
    constant(model.c, DIFFERENT)
    check(model, (X,))


# ---------------------------------------------------------------------------------------- convolutions, windows
class Picture(nn.Module):
    """conv, layer norm over channels of a picture, then a reader of the picture."""

    def __init__(
        self, back: nn.Module, between: Op | None = None, values: Sequence[float] = DIFFERENT
    ) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), back
        self.between = [between or (lambda y: y)]
        randomized(self)
        constant(self.a, values)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        z: Tensor = self.b(self.between[0](y))
        return z


PIC = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("values", [ZERO, DIFFERENT])
def test_convolutions_behind_a_norm(values: Sequence[float]) -> None:
    """Without padding columns per tap and a bias; with zero padding the constant part travels as well."""
    two = 1 + (values is DIFFERENT)
    check(Picture(nn.Conv2d(8, 4, 1), values=values), (PIC,), kept={"b.weight": (4, 5 + two, 1, 1)})
    check(Picture(nn.Conv2d(8, 4, 2, stride=2), values=values), (PIC,), kept={"b.weight": (4, 5 + two, 2, 2)})
    check(
        Picture(nn.Conv2d(8, 4, 3, dilation=2, bias=False), values=values),
        (PIC,),
        kept={"b.weight": (4, 5 + two, 3, 3)},
    )
    reflect = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")
    check(Picture(reflect, values=values), (PIC,), kept={"b.weight": (4, 5 + two, 3, 3)})
    zeros = {"a.weight": (5, 3, 1, 1), "b.weight": (4, 6 + two, 3, 3)}
    check(Picture(nn.Conv2d(8, 4, 3, padding=1), values=values), (PIC,), kept=zeros)


def test_padding_without_a_constant_part() -> None:
    """No beta, no channel of ones."""
    model = Picture(nn.Conv2d(8, 4, 3, padding=1))
    model.norm = nn.LayerNorm(8, bias=False)
    check(randomize_norm(model), (PIC,), kept={"b.weight": (4, 7, 3, 3)})


def randomize_norm(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
    return model


def test_grouped_readers_do_not_absorb() -> None:
    found = check(
        Picture(nn.Conv2d(8, 8, 3, padding=1, groups=8)), (PIC,), reasons=[Reason.NOT_LINEAR_IN_NORM]
    )
    assert shapes(found["symbolic"].small)["a.weight"] == (8, 3, 1, 1)


def test_padded_windows() -> None:
    """A window partition that pads (Swin): the statistics and a channel of ones are padded like the channels."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x.permute(0, 2, 3, 1)))
            y = F.pad(y, (0, 0, 0, 2, 0, 2))  # [N, 8, 8, 8]
            n = y.shape[0]
            y = (
                y.roll((-1, -1), (1, 2))
                .reshape(n, 2, 4, 2, 4, 8)
                .permute(0, 1, 3, 2, 4, 5)
                .reshape(n * 4, 16, 8)
            )
            z: Tensor = self.b(y)
            return z

    for values, n_statistics in ((DIFFERENT, 3), (ZERO, 2)):
        model = randomized(Windows())
        constant(model.a, values)
        check(model, (PIC,), kept={"a.weight": (5, 3), "b.weight": (4, 5 + n_statistics)})


def test_no_room_for_the_statistics() -> None:
    """One removed channel and padding: two statistics for one channel, so it stays."""
    found = check(
        Picture(nn.Conv2d(8, 4, 3, padding=1), values=(1.0,)), (PIC,), kept={"a.weight": (8, 3, 1, 1)}
    )
    assert any(r.reason is Reason.GROWS for r in found["symbolic"].refusals)


def test_class_token() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
            self.token, self.place = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.ones(1, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1) + self.place
            z: Tensor = self.b(self.norm(y)[:, 0])
            return z

    model = randomized(Tokens())
    constant(model.a, DIFFERENT)
    with torch.no_grad():
        model.token[..., 1:4] = model.a.bias[1:4]
        model.place[..., 1:4] = 0.25
    kept = {"a.weight": (5, 6), "token": (1, 1, 5), "place": (1, 4, 5), "b.weight": (4, 7)}
    check(model, (TOKENS,), kept=kept)


# ---------------------------------------------------------------------------------------- several axes, heads
def test_several_trailing_axes() -> None:
    """A channel of one of two normalised axes counts once for every position of the other."""

    class Trailing(nn.Module):
        def __init__(self, affine: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
            self.norm = nn.LayerNorm((3, 8), elementwise_affine=affine)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(self.norm(self.a(x)))
            return z

    model = randomized(Trailing(True))
    constant(model.a, DIFFERENT)
    check(model, (TOKENS,), kept={"a.weight": (8, 6)})  # no statistics with two axes
    kill(model.b, columns=[1, 3])
    check(model, (TOKENS,), kept={"a.weight": (6, 6), "norm.weight": (3, 6), "b.weight": (4, 6)})
    with torch.no_grad():
        model.norm.weight[:, 2] = 0
        model.norm.bias[:, 2] = 0.5
    check(model, (TOKENS,), kept={"a.weight": (5, 6), "norm.weight": (3, 5), "b.weight": (4, 5)})
    plain = randomized(Trailing(False))
    constant(plain.a, DIFFERENT)
    kill(plain.b, columns=[1, 3])
    check(plain, (TOKENS,), kept={"a.weight": (6, 6), "b.weight": (4, 6)})


def test_channels_outside_the_normalised_axis() -> None:
    """A norm over the width of a picture: its channels stand outside and go one by one."""

    class Width(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.LayerNorm(6), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(self.norm(self.a(x)))
            return z

    model = randomized(Width())
    kill(model.b, columns=[1, 4])
    check(model, (PIC,), kept={"a.weight": (6, 3, 1, 1), "b.weight": (4, 6, 1, 1)})


class Heads(nn.Module):
    """Attention with norms of q and k over the head axis."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 6)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        z: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return z


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(4), lambda: nn.LayerNorm(4)])
def test_norms_of_heads(norm: Callable[[], nn.Module]) -> None:
    model = randomized(Heads(norm))
    kill(model.q, [1, 5], bias=True)
    kill(model.k, [1, 5], bias=True)
    width = 6 if isinstance(norm(), nn.RMSNorm) else 8  # a layer norm makes something of a zero
    check(model, (TOKENS,), kept={"q.weight": (width, 6), "k.weight": (width, 6)})
    kill(model.v, [4, 5, 6, 7], bias=True)  # a whole head
    check(model, (TOKENS,), kept={"v.weight": (4, 6), "out.weight": (6, 4)})


# ---------------------------------------------------------------------------------------- group norm
class Grouped(nn.Module):
    def __init__(self, norm: Any, back: nn.Module | None = None, act: Op = F.relu) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), back or nn.Conv2d(8, 4, 1)
        self.g, self.h = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.norm = norm if isinstance(norm, nn.Module) else None
        self.functions = [norm, act]
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.norm(y) if self.norm is not None else self.functions[0](y, self.g, self.h)
        z: Tensor = self.b(self.functions[1](y))
        return z


GROUP: dict[str, Any] = {
    "module": lambda: nn.GroupNorm(2, 8),
    "no affine": lambda: nn.GroupNorm(2, 8, affine=False),
    "functional": lambda: lambda y, g, h: F.group_norm(y, 2, g, h),
    "torch": lambda: lambda y, g, h: torch.group_norm(y, 2, g, h),
    "aten": lambda: lambda y, g, h: aten.group_norm.default(y, 2, g, h, 1e-5),
    "native": lambda: lambda y, g, h: aten.native_group_norm.default(y, g, h, y.shape[0], 8, 36, 2, 1e-5)[0],
}


@pytest.mark.parametrize("name", GROUP)
def test_group_norm(name: str) -> None:
    """Channels that are constant and not read: one group loses two, the other one."""
    model = Grouped(GROUP[name]())
    constant(model.a, (1.0, -2.0), 1)
    constant(model.a, (0.5,), 6)
    kill(model.b, columns=[1, 2, 6])
    kept = {"a.weight": (5, 3, 1, 1), "b.weight": (4, 5, 1, 1)}
    check(model, (PIC,), kept=kept, routes=["symbolic"] if name == "native" else ["symbolic", "export"])


def test_group_norm_reads_its_constants() -> None:
    """A constant whose output is read stays, one with gamma 0 goes."""
    model = Grouped(nn.GroupNorm(2, 8))
    constant(model.a, DIFFERENT, 1)
    check(model, (PIC,), kept={"a.weight": (8, 3, 1, 1)}, reasons=[Reason.NOT_LINEAR_IN_NORM])
    with torch.no_grad():
        model.norm.weight[[1, 3]] = 0
    check(model, (PIC,), kept={"a.weight": (6, 3, 1, 1), "norm.weight": (6,), "b.weight": (4, 6, 1, 1)})


def test_a_whole_group_goes() -> None:
    """All channels of a group are constants, or nobody reads the group: then its varying channels go too."""
    model = Grouped(nn.GroupNorm(2, 8))
    constant(model.a, (1.0, 2.0, 3.0, 5.0), 4)
    check(model, (PIC,), kept={"a.weight": (4, 3, 1, 1), "norm.weight": (4,), "b.weight": (4, 4, 1, 1)})
    model = Grouped(nn.GroupNorm(2, 8))
    kill(model.b, columns=[0, 1, 2, 3])
    check(model, (PIC,), kept={"a.weight": (4, 3, 1, 1), "norm.weight": (4,), "b.weight": (4, 4, 1, 1)})
    kill(model.b, columns=[5])
    check(
        model,
        (PIC,),
        kept={"a.weight": (4, 3, 1, 1), "norm.weight": (4,), "b.weight": (4, 4, 1, 1)},
    )


def test_group_norm_of_a_flat_input_and_three_dimensions() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.GroupNorm(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(self.norm(self.a(x)))
            return z

    model = randomized(Flat())
    constant(model.a, DIFFERENT)
    kill(model.b, columns=[1, 2])
    check(model, (X,), kept={"a.weight": (5, 6), "b.weight": (3, 5)})  # a whole group is constant


def test_instance_norm() -> None:
    """Each channel has its own statistics: dead ones go like those of a batch norm."""
    for affine in (True, False):
        model = Grouped(nn.InstanceNorm2d(8, affine=affine))
        kill(model.b, columns=[1, 2])
        check(model, (PIC,), kept={"b.weight": (4, 6, 1, 1)})


# ---------------------------------------------------------------------------------------- barriers
class GRN(nn.Module):
    """ConvNeXtV2's global response norm of [N, H, W, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.h = nn.Parameter(torch.ones(1, 1, 1, width)), nn.Parameter(torch.ones(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        y: Tensor = x + self.g * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.h
        return y


class Barred(nn.Module):
    """GRN runs channels last, local response norm over axis 1."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm if isinstance(norm, nn.Module) else None
        self.function = [norm]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, GRN):
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = self.function[0](x)
        return y


LOCAL = [nn.LocalResponseNorm(3), lambda x: F.local_response_norm(x, 3, k=2.0)]


@pytest.mark.parametrize("norm", [GRN(8), *LOCAL])
def test_barriers(norm: Any) -> None:
    """They mix channels in a way that no rule follows; nothing breaks, and other axes are not touched."""
    model = Grouped(Barred(norm), nn.Conv2d(8, 4, 1))
    constant(model.a, DIFFERENT)
    kill(model.b, columns=[5, 6])
    kill(model.b, rows=[0])
    reasons = [] if isinstance(norm, GRN) else [Reason.CHANNEL_MIXING]
    check(model, (PIC,), kept={"a.weight": (8, 3, 1, 1)}, reasons=reasons)


def test_zeros_leave_a_global_response_norm() -> None:
    """Length 0 adds nothing to the mean of lengths, whose divisor stays; a shift is a constant for the reader."""
    model = Grouped(Barred(GRN(8)), nn.Conv2d(8, 4, 1))
    constant(model.a, ZERO)
    check(model, (PIC,), kept={"a.weight": (5, 3, 1, 1), "b.weight": (4, 5, 1, 1)})


@pytest.mark.parametrize("norm", LOCAL)
def test_local_response_norm_leaves_other_axes_alone(norm: Any) -> None:
    """Of [N, T, C] it mixes T: channels that nobody reads go. Exported, it is a pooling that is given both axes."""
    model = randomized(Sandwich(nn.Linear(6, 8), norm, nn.Linear(8, 4)))
    kill(model.back, columns=[1, 2])
    kept = {"front.weight": (6, 6), "back.weight": (4, 6)}
    check(model, (torch.randn(2, 5, 6),), kept=kept, routes=("symbolic",))


# ---------------------------------------------------------------------------------------- again
def zero_more(small: nn.Module, layer: str, rows: Sequence[int], seed: int = 1) -> nn.Module:
    """As if the small model had been trained, then pruned: other weights, and these rows constant."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        module = small.get_submodule(layer)
        module.weight[list(rows)] = 0
    return small


def minimize_again(small: nn.Module, kept: dict[str, tuple[int, ...]]) -> fx.GraphModule:
    """Minimize a minimized module as it is, its compensated norms being modules; twice, the second time in vain."""
    x = torch.randn(7, 6, dtype=torch.float64)
    again = minimize(small, (X.double(),))
    assert_equivalent(small, again, (x,), rtol=1e-9, float32=None)
    found = shapes(again)
    assert {name: found[name] for name in kept} == kept, found
    assert shapes(minimize(again, (X.double(),))) == found
    return again


AGAIN: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(8),
    "layer plain": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(8),
    "rms plain": lambda: nn.RMSNorm(8, elementwise_affine=False),
    "functional": lambda: lambda y, g, h: F.layer_norm(y, (8,), g, h),
    "functional rms": lambda: lambda y, g, h: F.rms_norm(y, (8,), g),
    "group": lambda: nn.GroupNorm(2, 8),
    "functional group": lambda: lambda y, g, h: F.group_norm(y, 2, g, h),
}


@pytest.mark.parametrize("values", [ZERO, EQUAL, DIFFERENT])
@pytest.mark.parametrize("name", AGAIN)
def test_minimized_trained_pruned_minimized(name: str, values: Sequence[float]) -> None:
    model = Plain(AGAIN[name](), values).double()
    if "group" in name:
        kill(model.b, columns=[1, 2, 3])
    small = minimize(fx.symbolic_trace(model), (X.double(),))
    if isinstance(AGAIN[name](), nn.LayerNorm):
        assert isinstance(small.get_submodule("norm"), CompensatedLayerNorm)
    if name == "group":
        assert isinstance(small.get_submodule("norm"), CompensatedGroupNorm)
    width = small.get_submodule("a").out_features
    zero_more(small, "a", [0, 2])
    if "group" in name:
        kill(small.get_submodule("b"), columns=[0, 2])
    check(small, (X,), routes=["export"])  # by then the norm is spelled by plain ops
    check(small, (X,), routes=["symbolic"], kept={"a.weight": (width - 2, 6)})
    again = minimize_again(small, {"a.weight": (width - 2, 6)})
    zero_more(again, "a", [1])
    if "group" in name:
        kill(again.get_submodule("b"), columns=[1])
    minimize_again(again, {"a.weight": (width - 3, 6)})
    check(again, (X,), routes=["symbolic"], kept={"a.weight": (width - 3, 6)})


def test_statistics_that_nobody_reads_any_more_go() -> None:
    model = Plain(nn.LayerNorm(8), DIFFERENT).double()
    small = minimize(fx.symbolic_trace(model), (X.double(),))
    assert small.get_submodule("norm").emits == ("r", "mu_r")
    kill(small.get_submodule("b"), columns=[5])
    assert minimize_again(small, {"b.weight": (5, 6)}).get_submodule("norm").emits == ("mu_r",)
    kill(small.get_submodule("b"), columns=[6])
    assert minimize_again(small, {"b.weight": (5, 5)}).get_submodule("norm").emits == ()
    check(small, (X,), routes=["symbolic"], kept={"b.weight": (5, 5)})


def test_statistics_behind_an_activation_stay() -> None:
    """After an edit by hand the statistics are read by something that is not linear: they stay as they are."""

    class Edited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(10, 5)
            self.norm = CompensatedLayerNorm(8, _removed(), emits=("r", "mu_r"))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(torch.tanh(self.norm(self.a(x))))
            return z

    model = randomized(Edited())
    constant(model.a, DIFFERENT)
    check(model, (X,), kept={"a.weight": (8, 6)}, reasons=[Reason.NOT_LINEAR_IN_NORM], routes=["symbolic"])


def _removed() -> Any:
    return RemovedConstants.from_values([1.0, 3.0])


def test_exported_again() -> None:
    """A small model that is exported and decomposed to plain ops stays exact, and is never larger."""
    for norm in (nn.LayerNorm(8), nn.RMSNorm(8)):
        model = Plain(norm, DIFFERENT).double()
        small = minimize(fx.symbolic_trace(model), (X.double(),))
        exported = torch.export.export(small, (X.double(),)).run_decompositions().module()
        again = minimize(exported, (X.double(),))
        assert count(again) <= count(small)
        torch.testing.assert_close(again(X.double()), model(X.double()), rtol=1e-9, atol=1e-12)


def test_values_and_gradients() -> None:
    for norm in (nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)):
        model = Plain(norm, DIFFERENT).double()
        if isinstance(norm, nn.GroupNorm):
            kill(model.b, columns=[1, 2])
        assert_equivalent(model, plan_of(model, (X.double(),)).small, (X,), rtol=1e-9)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_constants_that_differ_from_head_to_head_stay_in_the_statistics(
    norm: type[nn.Module], bias: bool
) -> None:
    """Nobody reads lane 1 of any head; the norm of each head does, and every head has another number there."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.norm, self.back = nn.Linear(5, 12), norm(4), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.norm(self.front(x).unflatten(-1, (3, 4))).flatten(-2))

    model = randomized(Heads())
    kill(model.front, [1, 5, 9], bias=not bias)
    kill(model.back, columns=[1, 5, 9])
    check(model, (torch.randn(2, 5),), kept={"front.weight": (12 if bias else 9, 5)})
