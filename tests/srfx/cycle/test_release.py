"""Release: zeros only, and no layer changes by more than was allowed."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import srfx
from srfx.cycle.release import LayerChanges
from srfx.errors import CycleError


class Net(nn.Module):
    """Linear, convolution, embedding, norm, and one weight that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.table = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = F.relu(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.head(x @ self.table.t())


def sparse(net: nn.Module, share: float = 0.6) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_((torch.rand(p.shape, generator=g) > share).to(p))
            else:
                p[0] = 0
    return net


def changes(before: nn.Module, after: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Relative change of each layer, measured by hand: the hooks of both models see the first one's operands."""
    found: dict[str, float] = {}
    others = dict(after.named_modules())

    def hook(name: str, old: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        new = others[name](*args)
        found[name] = float((new - old).norm() / old.norm())

    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: hook(name, out, m, args))
        for name, m in before.named_modules()
        if list(m.parameters(recurse=False)) and not list(m.children())
    ]
    with torch.no_grad():
        before(*inputs)
    for h in handles:
        h.remove()
    return found


@pytest.mark.parametrize("noise", [0.01, 0.3])
@pytest.mark.parametrize("form", ["module", "symbolic", "exported"])
def test_no_layer_changes_by_more_than_allowed(noise: float, form: str) -> None:
    ids = torch.randint(7, (5, 9), generator=torch.Generator().manual_seed(2))
    plain = sparse(Net()).eval()
    model = {
        "module": lambda: plain,
        "symbolic": lambda: fx.symbolic_trace(plain),
        "exported": lambda: torch.export.export(plain, (ids,)).module(),
    }[form]()
    before = copy.deepcopy(model.state_dict())
    free = srfx.release(model, noise, ids)
    loaded = copy.deepcopy(plain)
    loaded.load_state_dict(free.state_dict(), strict=False)
    found = changes(plain, loaded, ids)
    assert found.keys() == {"embed", "norm", "conv", "head"}
    assert max(found.values()) <= noise
    assert max(found["conv"], found["embed"], found["head"]) > noise / 2, "calibrated, not merely small"
    x = torch.randn(4, 6)
    assert not torch.equal(x @ loaded.table, x @ plain.table)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the input is not changed"


def test_only_zeros_of_matrices_change() -> None:
    net = sparse(Net())
    free = srfx.release(net, 0.1)
    for (name, old), new in zip(net.named_parameters(), free.parameters(), strict=True):
        kept = old != 0
        assert torch.equal(old[kept], new[kept])
        assert bool((new != 0).all()) if old.dim() > 1 else torch.equal(old, new), name
    assert free.embed.weight is free.head.weight


def test_without_inputs_the_norm_of_each_weight_is_bounded() -> None:
    net = sparse(Net())
    free = srfx.release(net, 0.1)
    for old, new in zip(net.parameters(), free.parameters(), strict=True):
        old, new = old.detach().double(), new.detach().double()
        change, size = float((new - old).norm()), float(old.norm())
        assert change <= 0.1 * size
        assert change > 0.0999 * size or old.dim() == 1


def test_noise_is_never_larger_than_the_weights() -> None:
    net = nn.Linear(100, 100)
    with torch.no_grad():
        net.weight[0, :50] = 0  # half a percent: ten times their size would still be a small change
    free = srfx.release(net, 10.0)
    std = float(net.weight[net.weight != 0].square().mean().sqrt())
    assert abs(float(free.weight[0, :50].square().mean().sqrt()) / std - 1) < 0.4


def test_the_seed_decides() -> None:
    net = sparse(Net())
    one, same, other = (srfx.release(net, 0.1, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["conv.weight"], other["conv.weight"])


def test_in_place_keeps_the_parameters_and_the_statistics() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    sparse(net)
    held, statistics = list(net.parameters()), copy.deepcopy(net[1].state_dict())
    assert srfx.release(net, 0.1, torch.randn(8, 4), inplace=True) is net
    assert all(a is b for a, b in zip(net.parameters(), held, strict=True))
    assert not bool((net[0].weight == 0).any())
    assert torch.equal(net[1].running_mean, statistics["running_mean"])
    assert net.training
    assert net[1].training


def test_chosen_parameters_and_no_noise() -> None:
    net = sparse(Net())
    free = srfx.release(net, 0.1, parameters=lambda name: name == "conv.bias")
    assert torch.equal(free.conv.weight, net.conv.weight)
    assert free.conv.bias[0] != 0
    ids = torch.randint(7, (2, 5))
    for still in (srfx.release(net, 0.0), srfx.release(net, 0.0, ids)):
        assert all(torch.equal(a, b) for a, b in zip(still.parameters(), net.parameters(), strict=True))


def test_a_layer_that_is_not_linear_in_its_weight() -> None:
    net = nn.Sequential(nn.LSTM(4, 5, batch_first=True))
    sparse(net)
    x = torch.randn(3, 7, 4)
    free = srfx.release(net, 0.02, x)
    before, after = net(x)[0], free(x)[0]
    state_b, state_a = net(x)[1], free(x)[1]
    change = sum(
        float((a - b).detach().double().square().sum())
        for a, b in zip((after, *state_a), (before, *state_b), strict=True)
    )
    size = sum(float(b.detach().double().square().sum()) for b in (before, *state_b))
    assert 0.01 < (change / size) ** 0.5 <= 0.02


def test_the_measurement_itself() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU()))
    x = torch.randn(4, 3)
    found = LayerChanges(gm, {"0.weight": 0.5 * gm.get_parameter("0.weight").detach()}).measure([x])
    assert found.keys() == {"_0"}
    paths, change = found["_0"]
    assert paths == {"0.weight"}
    assert change == pytest.approx(0.5)


def test_masks_have_to_go_first() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(CycleError, match="0 are computed from a mask"):
        srfx.release(net, 0.1)
    with pytest.raises(ValueError, match="at least 0"):
        srfx.release(nn.Linear(2, 2), -1)
