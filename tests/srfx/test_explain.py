"""Why a channel stays: the chain is made of true reads, it is the shortest, and it ends where something holds."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import srfx
from srfx.errors import PlanError, UnknownChannelError
from srfx.record.keep_plan import KeepPlan
from tests.helpers import kill, randomized

X = torch.randn(2, 4)


class Bypass(nn.Module):
    """Channel 0 reaches the output on a short and a long way, channel 1 on the long one only, channel 2 on none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.short = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(self.c(self.b(x))) + self.short(x)


def bypass() -> nn.Module:
    net = randomized(Bypass())
    kill(net.short, columns=[1, 2])
    kill(net.b, columns=[2])
    return net


def readers(found: srfx.Explanation) -> list[str]:
    return [step.reader for step in found.steps]


def test_the_shortest_chain() -> None:
    small = srfx.minimize(bypass(), X)
    assert readers(srfx.explain(small, "a", 0)) == ["short"]
    assert readers(srfx.explain(small, "a", 1)) == ["b", "c", "out"]
    found = srfx.explain(small, "a.weight", 1)
    assert [step.value for step in found.steps] == ["a", "b", "c"]
    assert (found.reason, found.site, found.position) == ("OUTPUT", "add", 1)
    assert str(found).splitlines()[1] == "  channel 1 of a is read by b (Linear)"
    gone = srfx.explain(small, "a", 2)
    assert (gone.position, gone.steps) == (None, ())
    assert "gone" in str(gone)
    assert gone.to_dict()["tensor"] == "a.weight"


def test_each_step_is_a_true_read() -> None:
    """Only some weights are not zero; the chain has to go along these."""
    torch.manual_seed(3)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    net = randomized(nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 2)))
    with torch.no_grad():
        for layer in layers:
            layer.weight *= torch.eye(6)[torch.randperm(6)]
    small = srfx.minimize(net, X)
    weights = {f"_{i}": small.get_parameter(f"{i}.weight") for i in range(6)}
    for channel in range(6):
        found = srfx.explain(small, "0", channel)
        assert readers(found) == [f"_{i}" for i in range(1, 6)]
        places = [step.channel for step in found.steps]
        for step, after in zip(found.steps, places[1:], strict=False):
            assert weights[step.reader][after, step.channel] != 0


def test_where_chains_end() -> None:
    net = randomized(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    kill(net[0], rows=range(5))
    small = srfx.minimize(net, X, multiple_of=4)
    kept = srfx.plan(small).kept("0.weight", 0).tolist()
    (revived,) = [c for c in kept if c < 5]
    found = srfx.explain(small, "0", revived)
    assert (found.steps, found.reason) == ((), "MULTIPLE_OF")
    assert readers(srfx.explain(small, "0", 7)) == ["_2"]

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).sort(-1).values)

    net = randomized(Sorted())
    kill(net.a, rows=[1])
    found = srfx.explain(srfx.minimize(net, X), "a", 1)
    assert found.position == 1
    assert found.reason in ("CHANNEL_MIXING", "UNKNOWN_OP")
    assert found.site == "sort"


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 8) for _ in range(4))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_that_have_to_be_equal() -> None:
    net = randomized(Heads())
    kill(net.v, rows=[0, 1, 4], bias=True)  # the second head keeps three lanes, so the first does too
    small = srfx.minimize(net, torch.randn(2, 3, 6))
    kept = srfx.plan(small).kept("v.weight", 0).tolist()
    assert len(kept) == 6
    (revived,) = [c for c in kept if c in (0, 1)]
    found = srfx.explain(small, "v", revived)
    assert found.reason == "BLOCK_COUNT"
    assert srfx.explain(small, "v", 7).reason == "OUTPUT"


def test_the_same_after_copies(tmp_path: Path) -> None:
    small = srfx.minimize(bypass(), X)
    wanted = srfx.explain(small, "a", 1)
    srfx.save(small, tmp_path / "x.srfx")
    for other in (pickle.loads(pickle.dumps(small)), srfx.load(tmp_path / "x.srfx")):
        assert srfx.explain(other, "a", 1) == wanted


def test_unknown_names() -> None:
    small = srfx.minimize(bypass(), X)
    with pytest.raises(UnknownChannelError, match="nothing"):
        srfx.explain(small, "nothing", 0)
    with pytest.raises(UnknownChannelError, match="has 3 channels along axis 0, there is no 3"):
        srfx.explain(small, "a", 3)
    with pytest.raises(UnknownChannelError, match="no axis 2"):
        srfx.explain(small, "a", 0, axis=2)
    with pytest.raises(PlanError, match="no record"):
        srfx.explain(fx.symbolic_trace(bypass()), "a", 0)


def test_from_the_plan() -> None:
    small = srfx.minimize(bypass(), X)
    plan = srfx.plan(small)
    wanted = srfx.explain(small, "a", 1)
    other = srfx.minimize(randomized(nn.Sequential(nn.Linear(4, 3))), X)
    assert srfx.explain(plan, "a", 1) == wanted
    assert srfx.explain(KeepPlan.from_json(plan.to_json()), "a", 1) == wanted
    copied = copy.deepcopy(small)
    del small
    gc.collect()
    assert srfx.explain(plan, "a", 1) == wanted  # the copy has the same plan
    del copied
    gc.collect()
    with pytest.raises(PlanError, match="no longer in memory"):
        srfx.explain(plan, "a", 1)
    assert srfx.explain(srfx.plan(other), "0", 0).reason == "OUTPUT"
