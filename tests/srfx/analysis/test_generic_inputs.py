"""Examples that say too little: a batch of 1, pictures that shrink to one pixel, two axes of one size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srfx
from srfx.analysis.generic_inputs import generic_survey
from srfx.ir.shapes import survey
from tests.helpers import relative_error
from tests.snapshots import assert_unchanged, snapshot

DEAD = [1, 2, 5]


class Dead(nn.Module):
    """A layer with three constant channels of eight, an op, and perhaps a layer that reads it."""

    def __init__(self, front: nn.Module, op: Callable[[Tensor], Tensor], back: nn.Module | None) -> None:
        super().__init__()
        self.front, self.back = front, back
        with torch.no_grad():
            front.weight[DEAD] = 0
            front.bias[DEAD] = front.bias[DEAD].abs() + 0.5
        object.__setattr__(self, "op", op)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(F.relu(self.front(x)))
        return y if self.back is None else self.back(y)


def rows(op: Callable[[Tensor], Tensor], back: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Dead(nn.Linear(5, 8), op, nn.Linear(8, 3) if back else None).double().eval()


def pictures(op: Callable[[Tensor], Tensor], back: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Dead(nn.Conv2d(3, 8, 3, stride=2), op, nn.Linear(8, 3) if back else None).double().eval()


def agree(model: nn.Module, example: Tensor, *others: Tensor) -> fx.GraphModule:
    """Traced and minimized with one example, the result computes the same on the others too."""
    traced = fx.symbolic_trace(model)
    kept, before = example.clone(), snapshot(traced)
    small = srfx.minimize(traced, (example,))
    assert torch.equal(example, kept)
    assert_unchanged(traced, before)
    for x in (example, *others):
        wanted, found = model(x), small(x)
        assert wanted.shape == found.shape
        assert relative_error(wanted, found) < 1e-12
    return small


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MERGED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "view": (lambda y: y.view(-1), False),
    "reshape": (lambda y: y.reshape(-1) * 2, False),
    "flatten": (lambda y: y.flatten(), False),
    "sum": (lambda y: y.sum(0), True),
    "sum over size": (lambda y: y.sum(0) / y.size(0), True),
    "product": (lambda y: y.prod(0), True),
    "norm": (lambda y: y.norm(dim=0), True),
    "cumsum": (lambda y: y.cumsum(0), True),
    "softmax": (lambda y: y.softmax(0), True),
    "logsumexp": (lambda y: y.logsumexp(0), True),
    "gram": (lambda y: y.t() @ y, True),
    "cat": (lambda y: torch.cat([y, y], 0).view(y.size(0), -1), False),
    "repeat": (lambda y: y.unsqueeze(1).repeat(1, y.size(0), 1).reshape(y.size(0), -1), False),
}


@pytest.mark.parametrize("name", list(MERGED))
def test_a_batch_of_one(name: str) -> None:
    op, back = MERGED[name]
    agree(rows(op, back), numbers(1, 5), numbers(4, 5), numbers(7, 5))


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "squeeze": lambda y: y.squeeze(1),
    "centred": lambda y: y - y.mean(0, keepdim=True),
    "pairs": lambda y: y.unsqueeze(1).expand(-1, y.size(0), -1).reshape(-1, 8),
}


@pytest.mark.parametrize("name", list(TAKEN))
def test_a_batch_of_one_loses_what_any_batch_loses(name: str) -> None:
    small = agree(rows(TAKEN[name]), numbers(1, 5), numbers(4, 5))
    assert tuple(small.get_submodule("back").weight.shape) == (3, 5)


def test_pictures_of_one_pixel() -> None:
    one, more = numbers(2, 3, 3, 3), numbers(2, 3, 9, 11)
    agree(pictures(lambda y: y.flatten(1), False), one, more)
    agree(pictures(lambda y: y.sum((2, 3))), one, more)
    agree(pictures(lambda y: F.max_pool2d(y, 3).sum((2, 3))), numbers(1, 3, 7, 7), numbers(2, 3, 17, 19))
    small = agree(pictures(lambda y: y.mean((2, 3))), one, more)
    assert tuple(small.get_submodule("back").weight.shape) == (3, 5)


def test_axes_of_one_size() -> None:
    """Channels and rows of a picture change places in a view: nobody knows them apart at 8 x 8 x 8."""
    agree(
        pictures(lambda y: y.view(y.size(0), y.size(2), y.size(1), y.size(3)), False),
        numbers(2, 3, 17, 17),
        numbers(2, 3, 9, 13),
    )
    agree(rows(lambda y: y.view(y.size(0), y.size(2), y.size(1)), False), numbers(2, 8, 5), numbers(2, 3, 5))
    agree(rows(lambda y: y.view(y.size(1), y.size(0), 8)), numbers(4, 4, 5), numbers(2, 3, 5))


class Two(nn.Module):
    """Two inputs with one batch axis, and one with an axis of size 1 that has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)

    def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(y)], 0) * scale.view(())


def form(model: nn.Module, *inputs: Tensor) -> tuple[bool, list[tuple[int, ...]]]:
    """Whether another survey was made, and the sizes that are analysed."""
    gm = fx.symbolic_trace(model)
    known = survey(gm, list(inputs))
    found = generic_survey(gm, known)
    return found is not known, [tuple(t.shape) for t in found.inputs]


def test_form_of_the_inputs() -> None:
    assert form(nn.Linear(5, 8), numbers(2, 5).float()) == (False, [(2, 5)])
    assert form(nn.Linear(5, 8), numbers(1, 5).float()) == (True, [(2, 5)])
    assert form(Two(), numbers(1, 5).float(), numbers(1, 5).float(), numbers(1).float()) == (
        True,
        [(2, 5), (2, 5), (1,)],
    )
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert form(net, numbers(2, 3, 8, 8).float()) == (
        False,
        [(2, 3, 8, 8)],
    )  # the pool says 1, not the picture
    changed, ((n, c, h, w),) = form(nn.Conv2d(3, 4, 3), numbers(2, 3, 3, 3).float())
    assert changed
    assert c == 3
    assert min(h, w) > 3
    assert len({n, c, h, w}) == 4


def test_a_static_export_is_analysed_as_it_is() -> None:
    gm = torch.export.export(nn.Linear(5, 8).eval(), (torch.randn(1, 5),)).module()
    known = survey(gm)
    assert generic_survey(gm, known) is known


def test_sizes_that_do_not_fit_are_tried_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    form(rows(lambda y: y.view(y.size(1), y.size(0), 8)).float(), numbers(4, 4, 5).float())
    assert "failed while" not in capfd.readouterr().err


def test_flops_are_those_of_the_example() -> None:
    model = rows(lambda y: y)
    one = srfx.report(srfx.minimize(fx.symbolic_trace(model), (numbers(1, 5),)))
    two = srfx.report(srfx.minimize(fx.symbolic_trace(model), (numbers(2, 5),)))
    assert two.before.flops == 2 * one.before.flops
    assert two.after.flops == 2 * one.after.flops


class Patches(nn.Module):
    """A picture of a fixed size becomes tokens; a larger picture would become more pictures, with channels mixed in."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.other = nn.Conv2d(3, 4, 1), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.front(x).reshape(-1, 4, 16).permute(0, 2, 1)
        return self.other(tokens.cumsum(2)) + tokens


def test_a_size_at_which_a_view_means_something_else_is_no_size_of_the_model() -> None:
    """Found by fuzzing: the constants of a sum were stored for pictures of nine times the size."""
    model = Patches().double().eval()
    with torch.no_grad():
        model.front.weight[1] = 0
        model.other.weight.zero_()
    given = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gm = fx.symbolic_trace(model)
    known = survey(gm, [given])
    assert [tuple(t.shape)[1:] for t in generic_survey(gm, known).inputs] == [(3, 4, 4)]
    agree(model, given, torch.randn(5, 3, 4, 4, dtype=torch.float64))


def test_picks_of_an_axis_that_a_view_merged() -> None:
    """With one pixel they are channels; of larger pictures they would be pixels of the first channel."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Linear(7, 2, bias=False)
            with torch.no_grad():
                self.front.weight[0] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.back(F.max_pool2d(self.front(x), 2).flatten(1)[:, 1:8])

    torch.manual_seed(0)
    small = agree(Picks().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert small.get_parameter("front.weight").shape[0] == 7


@pytest.mark.parametrize(
    ("batch_axis", "rest"),
    [
        (0, lambda y: y.flatten(0, 1)[:2]),
        (0, lambda y: y.flatten(0, 1).t()),
        (1, lambda y: y.flatten(0, 1)[:2]),
        (1, lambda y: y.flatten(0, 1).t()),
    ],
)
def test_samples_and_tokens_in_one_axis_hide_no_batch(
    batch_axis: int, rest: Callable[[Tensor], Tensor]
) -> None:
    """Picked from or turned, it made the batch of 1 look like all there is: a sum over it took in constants once."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(5, 8), nn.Linear(8, 3)
            with torch.no_grad():
                self.front.weight[DEAD] = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.sigmoid(self.front(x))
            return self.back(y.sum(batch_axis)), rest(y)

    torch.manual_seed(0)
    model = Sums().double().eval()

    def given(n: int) -> Tensor:
        return torch.randn((n, 3, 5) if batch_axis == 0 else (3, n, 5), dtype=torch.float64)

    small = srfx.minimize(fx.symbolic_trace(model), (given(1),))
    for n in (1, 3):
        x = given(n)
        for wanted, found in zip(model(x), small(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
