"""Constants of a spread move into the bias of the other summand, and the spread becomes add_at."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn

from srfx.nn.selection import add_at, spread
from srfx.passes import get_pass
from srfx.passes.move_templates import add_narrow_summands
from tests.helpers import check, kill, randomized

X = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(),)


class Downsampling(nn.Module):
    """A residual block whose shortcut is computed too; ``kind`` says how the sum is made."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(12, 4, 1)
        self.conv, self.norm = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.short, self.short_norm = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y, z = self.norm(self.conv(x)), self.short_norm(self.short(x))
        if self.kind == "pooled":
            z = F.max_pool2d(z, 3, 1)
            y = F.avg_pool2d(y, 3, 1)
        if self.kind == "rectified":
            y, z = y.relu(), z.relu()
        if self.kind == "read":
            z = z * z.mean((2, 3), keepdim=True) + (z + y) + y
        out: Tensor = self.head((y + z).relu())
        return out


def downsampling(kind: str = "plain", rows: tuple[range, range] = (range(4), range(7, 12))) -> nn.Module:
    model = randomized(Downsampling(kind))
    for conv, dead in zip((model.conv, model.short), rows, strict=True):
        kill(conv, rows=dead)
    return model


def forms(gm: fx.GraphModule) -> list[str]:
    """What is left of spreads, in graph order."""
    return [
        "add_at" if n.target is add_at else "template" if len(n.args) > 4 and n.args[4] else "bare"
        for n in gm.graph.nodes
        if n.target in (spread, add_at)
    ]


def small_of(model: nn.Module) -> fx.GraphModule:
    return check(model, X, ragged=True, routes=("symbolic",))["symbolic"].small


def test_a_whole_summand_takes_the_constants() -> None:
    """It brings all channels: its batch norm's bias grows, and no template is left."""
    assert forms(small_of(downsampling(rows=(range(4), range(0))))) == ["add_at"]
    assert forms(small_of(downsampling(rows=(range(0), range(4))))) == ["add_at"]


def test_two_spreads_share_one_template() -> None:
    """Constants that both bring are one number; those of channels that the other computes are in its bias."""
    small = small_of(downsampling(rows=(range(6), range(4, 9))))
    assert forms(small) == ["template", "add_at"]
    assert len([n for n in small.graph.nodes if "template" in str(n.target)]) == 1


def test_pools_pass_constants_on() -> None:
    assert forms(small_of(downsampling("pooled"))).count("add_at") == 1


def test_what_is_not_a_shift_keeps_its_template() -> None:
    """Behind a rectifier a number added before is another one; a value that others read is left alone."""
    assert forms(small_of(downsampling("rectified"))) == ["template", "template"]
    assert "template" in forms(small_of(downsampling("read")))


class Sums(nn.Module):
    """Any way to write a sum of a computed value and a spread of another."""

    def __init__(self, first: nn.Module, dim: int, n_others: int, is_shared: bool, subtracts: bool) -> None:
        super().__init__()
        self.first, self.others = first, nn.ModuleList(nn.Linear(5, 3) for _ in range(n_others))
        self.dim, self.is_shared, self.subtracts = dim, is_shared, subtracts
        self.n_places = 2 if isinstance(first, nn.Sequential) else 6
        for i in range(n_others):
            index = torch.randperm(7)[:3]
            self.register_buffer(f"index_{i}", index)
            self.register_buffer(f"template_{i}", torch.randn(7).index_fill(0, index, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        total = self.first(x)
        if self.is_shared:
            total = total + self.first(x + 1)
        if self.subtracts:
            total = total - x.flatten(1).mean(1).view([-1] + [1] * (x.dim() - 1))
        for i, layer in enumerate(self.others):
            y = layer(x) if self.dim == -1 else layer(x.mT)[:, : self.n_places].mT
            index, template = getattr(self, f"index_{i}"), getattr(self, f"template_{i}")
            total = total + spread(y, self.dim, index, 7, template)
        return total


def last(bias: bool) -> nn.Module:
    return nn.Linear(5, 7, bias=bias)


def normed(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 7, 2, bias=bias), nn.BatchNorm1d(7), nn.AvgPool1d(2))


def grouped(bias: bool) -> nn.Module:
    return nn.Conv1d(5, 7, 3, padding=1, bias=bias)


@given(
    st.sampled_from([last, normed, grouped]),
    st.booleans(),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_numbers(kind, bias, n_others, is_shared, subtracts, seed) -> None:  # type: ignore[no-untyped-def]
    """Whatever makes the sum: no number changes, and no template is left where a bias can take it."""
    torch.manual_seed(seed)
    dim = -1 if kind is last else -2
    model = randomized(Sums(kind(bias), dim, n_others, is_shared, subtracts), seed).double().eval()
    x = torch.randn(2, 5).double() if kind is last else torch.randn(2, 5, 6).double()
    gm = fx.symbolic_trace(model)
    wanted = model(x)
    add_narrow_summands(gm, [x], lambda: None)
    gm.recompile()
    gm.graph.lint()
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12, atol=1e-12)
    if not is_shared:
        assert forms(gm) == ["add_at"] * n_others
    elif n_others == 1:  # the bias serves two sites
        assert forms(gm) == ["template"]
    elif kind is last:  # a template of another spread takes them
        assert "add_at" in forms(gm)


def test_what_is_subtracted_takes_no_constants() -> None:
    """Though it could: they would count the other way round."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 3)
            self.register_buffer("index", torch.tensor([0, 3, 4]))
            self.register_buffer("template", torch.arange(7.0).index_fill(0, self.index, 0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).relu() - self.b(x) + spread(self.c(x), -1, self.index, 7, self.template)

    model, x = Net().double().eval(), torch.randn(2, 5).double()
    gm, wanted = fx.symbolic_trace(model), model(x)
    add_narrow_summands(gm, [x], lambda: None)
    gm.recompile()
    assert forms(gm) == ["template"]
    assert torch.equal(gm(x), wanted)


def test_a_template_is_written_down_and_the_old_ones_go() -> None:
    """The pass stands alone too: one edit for each sum, and a sum that is left alone is none."""
    model = Sums(last(True), -1, 2, False, False).eval()
    gm = fx.symbolic_trace(model)
    found = get_pass("move-templates", hints=[torch.randn(2, 5)])(gm)
    assert len(found.edits) >= 1
    assert forms(gm).count("bare") == len(found.edits)
    names = [name for name, _ in gm.named_buffers() if "template" in name]
    assert len(names) == 2 - len(found.edits)


def test_an_index_that_is_computed_is_left_alone() -> None:
    """Nothing is known of where such a spread puts its channels, on either side of the sum."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
            self.register_buffer("index", torch.tensor([0, 3, 4]))
            self.register_buffer("template", torch.arange(7.0).index_fill(0, self.index, 0.0))

        def forward(self, x: Tensor, places: Tensor) -> Tensor:
            y = spread(self.layers[0](x), -1, places, 7, self.template)
            return y + spread(self.layers[1](x), -1, self.index, 7, self.template)

    model, x = Net().double().eval(), (torch.randn(2, 5).double(), torch.tensor([0, 4, 3]))
    gm, wanted = fx.symbolic_trace(model), model(*x)
    add_narrow_summands(gm, list(x), lambda: None)
    gm.recompile()
    assert forms(gm) == ["template", "template"]
    assert torch.equal(gm(*x), wanted)
