"""Convolutions: borders, groups, depthwise and transposed ones, and weights with several sites."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from srfx.minimize import minimize
from tests.helpers import check, kill, masked, randomized, relative_error

X = torch.randn(2, 3, 6, 7)


OTHER = (torch.randn(3, 3, 9, 8),)


def chain(*layers: nn.Module) -> nn.Sequential:
    model = randomized(nn.Sequential(*layers))
    assert isinstance(model, nn.Sequential)
    return model


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"padding": "same"}, {"padding": "valid"}, {"stride": 2},
                                     {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"bias": False},
                                     {"padding": 1, "padding_mode": "circular"}])  # fmt: skip
def test_convolutions(n: int, options: dict[str, object]) -> None:
    """Three dead rows: nonzero constants, of which zero padding keeps one as a carrier."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    if options.get("padding_mode") == "reflect" and n == 3:
        options = {**options, "padding_mode": "replicate"}
    model = chain(conv(3, 8, 1), nn.ReLU6(), conv(8, 4, 3, **options))
    with torch.no_grad():
        model[0].bias.abs_()
    kill(model[0], [0, 3, 7])
    has_border = options.get("padding") in (1, "same") and "padding_mode" not in options
    size = (6, 7, 5)[:n]
    kept = {"0.weight": (6 if has_border else 5, 3, *[1] * n)}
    check(
        model, (torch.randn(2, 3, *size),), others=[(torch.randn(3, 3, *[s + 2 for s in size]),)], kept=kept
    )


def test_border_of_constants_of_other_sizes_and_a_kept_carrier() -> None:
    model = chain(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1)
    )
    kill(model[0], [0, 3, 7])
    check(model, (X,), others=[OTHER], kept={"0.weight": (6, 3, 3, 3), "3.weight": (4, 6, 3, 3)})


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise(multiplier: int, padding: int, bias: bool) -> None:
    """A zero producer in front of a depthwise convolution with a bias gives its bias."""
    n = 6 * multiplier
    model = chain(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, n, 3, padding=padding, groups=6), nn.Conv2d(n, 4, 1)
    )
    kill(model[0], [1, 4], bias=bias)
    with torch.no_grad():
        model[0].bias.abs_()
    kept = {"0.weight": (4, 3, 1, 1), "2.weight": (4 * multiplier, 1, 3, 3)} if bias or not padding else None
    check(model, (X,), others=[OTHER], kept=kept)


@pytest.mark.parametrize("dead", [[0, 4], [0, 1, 2, 3], [0, 1, 5]])
def test_grouped(dead: list[int]) -> None:
    """Two groups of four: equal counts stay, a whole group may go."""
    model = chain(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 4, 1))
    kill(model[0], dead)
    kill(model[2], [0, 1, 2] if len(dead) == 4 else [0, 3])
    kept = {2: (4, 3, 3, 3), 4: (3, 4, 3, 3), 3: (4, 3, 3, 3)}[len(dead)]
    check(model, (X,), others=[OTHER], kept={"2.weight": kept})


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed(n: int, groups: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    model = chain(
        conv(3, 8, 1), nn.ReLU(), up(8, 6, 3, stride=2, groups=groups, output_padding=1), conv(6, 4, 1)
    )
    kill(model[0], [0, 4], bias=True)
    kill(model[2], columns=[1, 5])
    size = (4, 5, 3)[:n]
    check(model, (torch.randn(2, 3, *size),), kept={"0.weight": (4, 3, *[1] * n)})


def test_a_convolution_used_twice() -> None:
    """The call sites see different constants, so nothing is folded that differs between them."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.back = (
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.Conv2d(6, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.back(F.relu(self.conv(F.relu(self.conv(torch.sigmoid(self.stem(x)))))))

    for seed in range(4):
        check(masked(randomized(Twice(), seed), seed), (X,), others=[OTHER])


class SharedGroups(nn.Module):
    """One weight, read by a convolution without and by one with groups, in either order."""

    def __init__(self, grouped_first: bool, other: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.grouped_first, self.other = grouped_first, other

    def forward(self, x: Tensor) -> Tensor:
        def plain() -> Tensor:
            if self.other == "matrix":
                return F.linear(self.a(x).mean((2, 3)), self.weight[:, :, 0, 0])[:, :, None, None]
            return F.conv2d(F.relu(self.a(x)), self.weight)

        def grouped() -> Tensor:
            return F.conv2d(F.relu(self.b(x)), self.weight, groups=2)

        first, second = (grouped, plain) if self.grouped_first else (plain, grouped)
        return self.c(first() + second())


@pytest.mark.parametrize("grouped_first", [False, True], ids=["plain first", "grouped first"])
@pytest.mark.parametrize("other", ["conv", "matrix"])
def test_a_weight_shared_by_convolutions_of_different_groups(grouped_first: bool, other: str) -> None:
    model = randomized(SharedGroups(grouped_first, other))
    kill(model.a, [1])
    kill(model.b, [2, 3, 6])
    with torch.no_grad():
        model.weight[[1, 6]] = 0
    check(model, (X,), others=[OTHER], kept={"weight": (8, 4, 3, 3)}, reasons=[Reason.SHARED_WEIGHT])


def test_a_grouped_weight_shared_by_sites_that_group_it_alike() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 8, 3, groups=2, padding=1),
                nn.Conv2d(8, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(F.relu(self.b(self.a(x)))))

    model = randomized(Twice())
    for layer in (model.a, model.b):
        kill(layer, [1, 6], bias=True)
    check(model, (X,), others=[OTHER], kept={"b.weight": (6, 3, 3, 3), "a.weight": (6, 3, 1, 1)})


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_decomposed(groups: int) -> None:
    """Both kinds are one op then, aten.convolution, with an argument that tells them apart."""
    model = chain(
        nn.ConvTranspose2d(3, 8, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=groups),
        nn.Conv2d(6, 4, 1),
    ).double()
    kill(model[0], [1, 5], bias=True)
    exported = torch.export.export(model, (X.double(),)).run_decompositions().module()
    small = minimize(exported)
    assert relative_error(model(X.double()), small(X.double())) < 1e-12
    assert tuple(small.get_parameter("0.weight").shape) == (3, 6, 2, 2)
    assert tuple(small.get_parameter("2.weight").shape) == (6, 6 // groups, 2, 2)


def test_a_constant_without_a_channel_of_its_own_meets_a_border() -> None:
    """PReLU with one slope: its result of one channel carries no label, so that the constant stays where it is."""
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.PReLU(), nn.Conv2d(1, 4, 3, padding=1))
    kill(randomized(model)[0], [0])
    check(model, (torch.randn(2, 3, 5, 5),), others=[(torch.randn(1, 3, 4, 7),)], idempotent=False)
