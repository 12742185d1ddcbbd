"""Groups are what would leave together, and zeroing one makes it leave."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import srfx
from tests.helpers import count


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm(x)
        return self.head(x + self.attention(h, h, h, need_weights=False)[0])


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(4)
        self.up, self.down = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.gain * self.down(F.relu(self.up(self.norm(self.depthwise(x)))))
        return self.head(x.flatten(1))


def by_position(found: srfx.ChannelGroups, name: str, axis: int) -> list[set[int]]:
    """Groups of each position of a parameter along an axis."""
    slices = [
        s.groups.flatten()
        for s in found.slices
        if s.name == name and s.groups.numel() == s.groups.shape[axis] > 1
    ]
    return [{int(g) for g in row if g >= 0} for row in torch.stack(slices, 1)]


def test_hidden_channel_is_row_bias_and_column() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found = srfx.channel_groups(net, torch.zeros(2, 4))
    assert found.n_groups == 3
    assert found.members(1) == [("0.weight", 0, [1]), ("0.bias", 0, [1]), ("2.weight", 1, [1])]
    assert found.biases == {"0.bias", "2.bias"}
    assert found.uncovered == ("2.bias",)  # logits stay
    assert not found.replaced


def test_input_columns_only_on_request() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found = srfx.channel_groups(net, torch.zeros(2, 4), inputs=True)
    assert found.n_groups == 3 + 4
    assert sum(found.members(g) == [("0.weight", 1, [2])] for g in range(found.n_groups)) == 1


def test_stream_with_norm_depthwise_and_flatten() -> None:
    found = srfx.channel_groups(ConvNet(), torch.zeros(2, 3, 8, 8))
    assert found.n_groups == 4 + 6
    members = {name: (axis, at) for name, axis, at in found.members(0)}
    assert members["stem.weight"] == (0, [0])
    assert members["depthwise.weight"] == (0, [0])
    assert members["norm.weight"] == members["gain"] == members["norm.bias"] == (0, [0])
    assert members["up.weight"] == (1, [0])
    assert members["down.weight"] == (0, [0])
    assert members["head.weight"] == (1, [0, 1, 2, 3])
    depthwise = [s for s in found.slices if s.name == "depthwise.weight"]
    assert len(depthwise) == 1, "its two channel axes are one and count once"


def test_heads_hold_their_lanes_and_a_norm_joins_both_sides() -> None:
    x = torch.randn(2, 6, 5)
    found = srfx.channel_groups(srfx.minimize(Attention().eval(), x), x)
    q, v = (by_position(found, f"attention.{n}_proj.weight", 0) for n in "qv")
    out = by_position(found, "attention.out_proj.weight", 1)
    heads = [q[0] & q[1], q[2] & q[3]]
    assert [len(h) for h in heads] == [1, 1]
    assert heads[0] != heads[1]
    assert heads == [v[0] & v[1], v[2] & v[3]] == [out[0] & out[1], out[2] & out[3]]
    assert all(len(lane) == 2 for lane in (*q, *v, *out)), "each lane: itself and its head"
    stream = by_position(found, "embed.weight", 0)
    for name, axis in (("norm.weight", 0), ("attention.q_proj.weight", 1), ("head.weight", 1)):
        assert by_position(found, name, axis) == stream, name


def test_groups_of_a_grouped_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    found = srfx.channel_groups(net, torch.zeros(1, 3, 5, 5))
    assert found.n_groups == 4 + 8 + 2
    first = [s for s in found.slices if s.name == "1.weight" and s.groups.shape[:2] == (8, 2)]
    columns = by_position(found, "0.weight", 0)
    assert [int(g) for g in first[0].groups[:, 0].flatten()] == [min(columns[0])] * 4 + [min(columns[2])] * 4
    whole = columns[0] & columns[1]
    assert len(whole) == 1
    assert whole == set.intersection(*by_position(found, "1.weight", 0)[:4])


def test_what_is_pinned_makes_no_group() -> None:
    class Softmaxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).softmax(-1))

    assert srfx.channel_groups(Softmaxed(), torch.zeros(1, 4)).n_groups == 0


@pytest.mark.parametrize("form", ["module", "training", "symbolic", "exported", "pruned"])
def test_every_form_gives_the_same_groups(form: str) -> None:
    x = torch.zeros(2, 3, 8, 8)
    net = ConvNet()
    wanted = srfx.channel_groups(copy.deepcopy(net).eval(), x)
    model: nn.Module = net.train(form == "training")
    if form == "symbolic":
        model = torch.fx.symbolic_trace(net)
    elif form == "exported":
        model = torch.export.export(net, (x,)).module()
    elif form == "pruned":
        nn.utils.prune.l1_unstructured(net.up, "weight", 0.5)
    mode = model.training
    found = srfx.channel_groups(model, x)
    assert found.n_groups == wanted.n_groups

    def partition(groups: srfx.ChannelGroups) -> set[tuple[tuple[str, tuple[int, ...]], ...]]:
        return {
            tuple(sorted((n, tuple(at)) for n, _, at in groups.members(g))) for g in range(groups.n_groups)
        }

    assert partition(found) == partition(wanted)
    assert model.training is mode


def test_fused_projections_are_named() -> None:
    found = srfx.channel_groups(Attention().eval(), torch.zeros(2, 6, 5))
    assert found.replaced == ("attention.in_proj_weight", "attention.in_proj_bias")


@pytest.mark.parametrize(
    ("net", "x"), [(ConvNet(), torch.randn(2, 3, 8, 8)), (Attention(), torch.randn(2, 6, 5))]
)
def test_a_group_that_is_zero_leaves(net: nn.Module, x: Tensor) -> None:
    small = srfx.minimize(net.eval(), x)
    found = srfx.channel_groups(small, x)
    n_lanes = 0
    for g in range(found.n_groups):
        zeroed = copy.deepcopy(small)
        with torch.no_grad():
            for s in found.slices:
                zeroed.get_parameter(s.name).mul_((s.groups != g).to(torch.float32))
        if count(srfx.minimize(zeroed, x)) == count(small):
            n_lanes += 1
    # a single lane of a head is held by the other head's equal count
    assert n_lanes == (8 if isinstance(net, Attention) else 0)
