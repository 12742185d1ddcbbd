"""Whole models drawn from choices: a class in readable Python, its masks, its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srfx.testing.programs import anywhere, image, recurrent, tokens
from srfx.testing.programs.builder import IMAGE, TOKENS, VECTOR, Builder, Val, Weight
from srfx.testing.programs.choices import Choices
from srfx.testing.programs.residual import residual
from srfx.testing.programs.volume import volume

Step = Callable[[Builder, Val], Val]

ANYWHERE: tuple[Step, ...] = (
    anywhere.activation, anywhere.arithmetic, anywhere.join, anywhere.concat, anywhere.cut, anywhere.in_place,
    anywhere.unknown,
)  # fmt: skip
STEPS: dict[str, tuple[Step, ...]] = {
    IMAGE: (image.convolution, residual, image.convolution, image.norm, image.pool, image.transposed, image.gate,
            image.shuffle, image.pixels, volume, image.to_tokens, image.to_vector, *ANYWHERE),
    TOKENS: (tokens.linear, residual, residual, tokens.norm, residual, tokens.positions, recurrent.layer,
             recurrent.cell, tokens.to_vector, *ANYWHERE),
    VECTOR: (tokens.linear, tokens.linear, tokens.norm, residual, tokens.vector_to, *ANYWHERE),
}  # fmt: skip
MAX_STEPS = 7


@dataclass(frozen=True)
class Program:
    """A generated model as data.

    Attributes:
        choices: what it was made from.
        source: Python that defines ``model`` and ``inputs(n)``.
    """

    choices: tuple[int, ...]
    source: str

    def build(self) -> tuple[nn.Module, Callable[[int], tuple[Any, ...]]]:
        """The masked model in float64, and a function that makes inputs of a batch size."""
        names: dict[str, Any] = {"__name__": "generated"}
        exec(compile(self.source, "<generated program>", "exec"), names)
        return names["model"], names["inputs"]

    def __repr__(self) -> str:
        return "\n" + self.source


def generate(choose: Choices) -> Program:
    """Draw a program."""
    b = Builder(choose)
    signature, making = _inputs(b)
    for _ in range(choose.between(1, MAX_STEPS)):
        x = choose.pick(b.values[-4:][::-1]) if choose.flag(0.25) else b.values[-1]
        choose.pick(STEPS[x.kind])(b, x)
    result = _outputs(b)
    masks = _masks(b)
    is_training = choose.flag(0.05) and not any("Dropout" in line or "Transformer" in line for line in b.init)
    source = _source(b, signature, making, result, masks, is_training, choose.below(4))
    return Program(tuple(choose.made), source)


def replay(choices: Sequence[int]) -> Program:
    """The program of recorded choices."""
    return generate(Choices.replay(choices))


def of_seed(seed: int) -> Program:
    """The program of a seed."""
    return generate(Choices.of_seed(seed))


def _inputs(b: Builder) -> tuple[list[str], list[str]]:
    """Arguments of forward, code that makes them; each goes through a layer first."""
    signature, making = [], []
    for i in range(2 if b.choose.flag(0.15) else 1):
        kind = b.choose.pick((IMAGE, TOKENS, "words", VECTOR))
        name = b.fresh("x")
        signature.append(name)
        if kind == IMAGE:
            c, side = b.choose.pick((3, 1, 2)), b.choose.pick((6, 5, 4))
            making.append(f"library.floats(n, {c}, {side}, {side}, seed=n + {i})")
            image.convolution(b, Val(name, IMAGE, (c, side, side)))
        elif kind == VECTOR:
            c = b.choose.pick((5, 3))
            making.append(f"library.floats(n, {c}, seed=n + {i})")
            b.linear_on(Val(name, VECTOR, (c,)), b.width())
        else:
            t = b.choose.pick((4, 3, 5))
            if kind == TOKENS:
                making.append(f"library.floats(n, {t}, 3, seed=n + {i})")
                b.linear_on(Val(name, TOKENS, (t, 3)), b.width())
            else:
                making.append(f"library.words(n, {t}, 7, seed=n + {i})")
                c = b.width()
                if b.choose.flag(0.25):
                    _bag(b, name, c)
                    continue
                table = b.module("table", f"nn.Embedding(7, {c})")
                b.weights.append(Weight(f"{table.removeprefix('self.')}.weight", None, (1, c)))
                b.let(f"{table}({name})", TOKENS, (t, c))
            if b.choose.flag(0.3):
                mask = b.fresh("seen")
                signature.append(mask)
                b.masks.append((mask, t))
                making.append(f"library.seen(n, {t}, seed=n + {i})")
                if b.choose.flag(0.4):
                    x = b.values[-1]
                    form = b.choose.pick(("{x} * {m}[:, :, None]", "{x}.masked_fill(~{m}[..., None], 0.0)"))
                    b.like(x, form.format(x=x.name, m=mask))
    return signature, making


def _bag(b: Builder, words: str, c: int) -> None:
    """Words become one vector: their sum, mean or largest."""
    mode = b.choose.pick(("mean", "sum", "max"))
    rest = ", padding_idx=0" if b.choose.flag(0.3) else ""
    table = b.module("bag", f"nn.EmbeddingBag(7, {c}, mode='{mode}'{rest})")
    b.weights.append(Weight(f"{table.removeprefix('self.')}.weight", None, (1, c)))
    b.let(f"{table}({words})", VECTOR, (c,))


def _outputs(b: Builder) -> str:
    last = b.values[-1]
    if last.kind != VECTOR and b.choose.flag(0.5):
        last = (image if last.kind == IMAGE else tokens).to_vector(b, last)
    if last.kind == VECTOR and b.choose.flag(0.7):
        last = b.linear_on(last, b.choose.pick((3, 2, 4)))
    if b.choose.flag(0.65):
        return last.name
    other = b.choose.pick(b.values[::-1])
    form = b.choose.pick(("({0}, {1})", "{{'a': {0}, 'b': {1}}}", "[{0}, None, {1}]", "{{'a': ({0}, {1}), 'n': None}}",
                          "({1}, {1}, {0})", "({0}, {0}.shape[0])", "({0}, {1}.argmax(1))"))  # fmt: skip
    return form.format(last.name, other.name)


def _masks(b: Builder) -> list[str]:
    """Statements that put zeros into the weights."""
    streams: dict[int, list[int]] = {}
    found: list[str] = []
    choose = b.choose
    for i, weight in enumerate(b.weights):
        if weight.rows is None and weight.columns is None:
            if choose.flag(0.35):
                found.append(f"entries = model.{weight.path}.view(-1)")
                found.append(f"entries[::{choose.pick((2, 3, 1))}] = {choose.pick(('0.0', '-0.0'))}")
            continue
        if choose.flag(0.08):
            found.append(f"model.{weight.path}.zero_()")
            continue
        if weight.rows is not None and choose.flag(0.65):
            axis, n = weight.rows[0], weight.rows[1] // weight.gates
            if n not in streams or choose.flag(0.3):
                streams[n] = choose.subset(n, max(1, (2 * n) // 3))
            rows = [gate * n + unit for gate in range(weight.gates) for unit in streams[n]]
            found += _zero(weight.path, axis, rows)
            if weight.bias and rows and choose.flag(0.4):
                found += _zero(weight.bias, 0, rows)
        if weight.columns is not None and choose.flag(0.3):
            axis, n = weight.columns
            found += _zero(weight.path, axis, choose.subset(n, max(1, n // 2)))
        if choose.flag(0.3):
            found.append(f"library.thin(model.{weight.path}, {choose.pick((0.5, 0.8, 0.2))}, {i})")
    return found


def _zero(path: str, axis: int, positions: list[int]) -> list[str]:
    return [f"model.{path}[{':, ' * axis}{positions}] = 0.0"] if positions else []


def _source(
    b: Builder,
    signature: list[str],
    making: list[str],
    result: str,
    masks: list[str],
    is_training: bool,
    seed: int,
) -> str:
    body = [
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "",
        "from srfx.testing.programs import library",
        "",
        "",
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in b.init),
        "",
        f"    def forward(self, {', '.join(signature)}):",
        *(f"        {line}" for line in b.forward),
        f"        return {result}",
        "",
        "",
        f"model = library.randomize(Model(), {seed}).double().{'train' if is_training else 'eval'}()",
        "with torch.no_grad():",
        *(f"    {line}" for line in masks or ["pass"]),
        "",
        "",
        "def inputs(n):",
        f"    return ({', '.join(making)},)",
    ]
    return "\n".join(body) + "\n"


def tensors(value: Any) -> list[Tensor]:
    """Tensors of an output."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
