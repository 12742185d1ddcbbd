"""Containers are looked up once in generated code, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx.ir.short_paths import ShortPaths, shorten_paths
from tests.helpers import kill, randomized


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))))


class Nested(nn.Module):
    """Two blocks far down, and a layer at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Block(), Block())])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def shortened(model: nn.Module) -> fx.GraphModule:
    gm = fx.symbolic_trace(model)
    shorten_paths(gm)
    return gm


def body(*lines: str) -> list[str]:
    return [line + "\n" for line in lines]


def test_a_container_is_looked_up_once_and_before_its_first_use() -> None:
    model = randomized(Nested())
    gm = shortened(model)
    assert gm.code.count("self.stages") == 1
    assert gm.code.count('"0")') == 2, "the stage, and its first block"
    assert "stages_0_0.a(x)" in gm.code
    assert "self.head(" in gm.code
    x = torch.randn(4, 3)
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


def test_what_is_used_once_stays() -> None:
    lines = body("a = self.x.y(b)", 'c = getattr(self.z, "0")(a)', "w = self.v.weight", "return c")
    assert ShortPaths()(lines) == lines


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (
            ["w = self.x.weight", "b = self.x.bias"],
            ["x = self.x", "w = x.weight", "b = x.bias"],
        ),
        (
            ["x = self.x.a(y)", "z = self.x.b(x)"],
            ["x_ = self.x", "x = x_.a(y)", "z = x_.b(x)"],
        ),
        (
            ['a : torch.Tensor = getattr(self, "0").a(y);  y = None', 'self("x", getattr(self, "0"))', 'b = getattr(self, "0").b(a)'],
            ['_0 = getattr(self, "0")', "a : torch.Tensor = _0.a(y);  y = None", 'self("x", getattr(self, "0"))', "b = _0.b(a)"],
        ),
        (
            ["a = self.x.y.a(c)", "b = self.x.y.b(a)", "d = self.x.z(b)"],
            ["x = self.x", "x_y = x.y", "a = x_y.a(c)", "b = x_y.b(a)", "d = x.z(b)"],
        ),
    ],
    ids=["parameters", "name-taken", "numbers", "nested"],
)  # fmt: skip
def test_code(lines: list[str], wanted: list[str]) -> None:
    assert ShortPaths()(body(*lines)) == body(*wanted)


def test_fragments_that_are_no_statement_stay() -> None:
    lines = ["# COUNTER: 0\n", "a = self.x.f(b)", ";  b = None  # self.x\n", "c = self.x.g(", "a)\n"]
    assert ShortPaths()(lines) == lines


def test_a_module_that_is_exchanged_counts() -> None:
    model = randomized(Nested())
    gm = shortened(model)
    x = torch.randn(4, 3)
    before = gm(x)
    gm.set_submodule("stages.0.1.a", nn.Identity())
    model.stages[0][1].a = nn.Identity()
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
    assert not torch.equal(gm(x), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "retrace", "script", "save"])
def test_a_minimized_model_goes_on(way: str, tmp_path: object) -> None:
    model = randomized(Nested()).eval()
    kill(model.stages[0][0].a, [1])
    small = srfx.minimize(fx.symbolic_trace(model), torch.randn(2, 3))
    assert small.code.count("self.stages") == 1
    if way == "deepcopy":
        other = copy.deepcopy(small)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(small))
    elif way == "script":
        other = torch.jit.script(small)
    elif way == "save":
        srfx.save(small, f"{tmp_path}/small.safetensors")
        other = srfx.load(f"{tmp_path}/small.safetensors", model)
    else:
        other = fx.symbolic_trace(small)
    x = torch.randn(4, 3)
    torch.testing.assert_close(other(x), small(x), rtol=0, atol=0)
    if way in ("deepcopy", "pickle", "save"):
        assert other.code.count("self.stages") == 1
