"""A program under construction: lines of Python, and the shape of every value."""

from __future__ import annotations

from dataclasses import dataclass, field

from srfx.testing.programs.choices import Choices

IMAGE, TOKENS, VECTOR = "image", "tokens", "vector"  # [N, C, H, W], [N, T, C], [N, C]
WIDTHS = (4, 6, 3, 8, 5, 2, 12, 7, 1)


@dataclass(frozen=True)
class Val:
    """A value: its name in the code, and its sizes without the batch axis."""

    name: str
    kind: str
    dims: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.dims[-1] if self.kind == TOKENS else self.dims[0]

    @property
    def axis(self) -> int:
        """The channel axis."""
        return 2 if self.kind == TOKENS else 1


@dataclass(frozen=True)
class Weight:
    """A weight that may be masked.

    Attributes:
        path: of the parameter.
        rows: axis and number of its output channels, or None.
        columns: axis and number of its input channels, or None (a norm scale, a grouped convolution).
        bias: path of the bias, or "".
        gates: how many rows a unit of a recurrent layer has; its rows are masked together.
    """

    path: str
    rows: tuple[int, int] | None
    columns: tuple[int, int] | None
    bias: str = ""
    gates: int = 1


@dataclass
class Builder:
    """Collects the lines of ``__init__`` and ``forward``."""

    choose: Choices
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    values: list[Val] = field(default_factory=list)
    masks: list[tuple[str, int]] = field(
        default_factory=list
    )  # name, T of bool [N, T], True where a token is seen
    modules: list[tuple[str, str, int, int]] = field(
        default_factory=list
    )  # attribute, kind, in, out: may be reused
    _counts: dict[str, int] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        """A new name."""
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return f"{stem}{self._counts[stem]}"

    def width(self) -> int:
        """A number of channels."""
        return self.choose.pick(WIDTHS)

    # ------------------------------------------------------------------ lines
    def module(self, stem: str, code: str) -> str:
        """A submodule; returns ``self.name``."""
        name = self.fresh(stem)
        self.init.append(f"self.{name} = {code}")
        return f"self.{name}"

    def parameter(self, shape: tuple[int, ...], stem: str = "p") -> str:
        """A parameter of its own; returns ``self.name``."""
        name = self.fresh(stem)
        self.init.append(f"self.{name} = nn.Parameter(torch.ones({shape}))")
        return f"self.{name}"

    def line(self, code: str) -> None:
        """Any statement of ``forward``."""
        self.forward.append(code)

    def let(self, code: str, kind: str, dims: tuple[int, ...]) -> Val:
        """``name = code``; returns the value."""
        name = self.fresh("x")
        self.forward.append(f"{name} = {code}")
        found = Val(name, kind, dims)
        self.values.append(found)
        return found

    def like(self, x: Val, code: str) -> Val:
        """``name = code`` of the shape of x."""
        return self.let(code, x.kind, x.dims)

    # ------------------------------------------------------------------ layers
    def linear(self, x: str, c_in: int, c_out: int, bias: bool | None = None) -> str:
        """Code of a linear layer on x: a module, or one that is there already."""
        again = [m for m in self.modules if m[1:] == ("linear", c_in, c_out)]
        if again and self.choose.flag(0.15):
            return f"{self.choose.pick(again)[0]}({x})"
        has_bias = self.choose.flag(0.75) if bias is None else bias
        name = self.module("fc", f"nn.Linear({c_in}, {c_out}{'' if has_bias else ', bias=False'})")
        self.note(name, (0, c_out), (1, c_in), has_bias)
        self.modules.append((name, "linear", c_in, c_out))
        if again and self.choose.flag(0.1):
            self.init.append(f"{name}.weight = {again[0][0]}.weight")
        return f"{name}({x})"

    def note(
        self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None, has_bias: bool
    ) -> None:
        """Let the weight of a module be masked."""
        path = name.removeprefix("self.")
        self.weights.append(Weight(f"{path}.weight", rows, columns, f"{path}.bias" if has_bias else ""))

    def linear_on(self, x: Val, c_out: int, bias: bool | None = None) -> Val:
        """A linear layer on tokens or a vector, in one of its spellings."""
        dims = (*x.dims[:-1], c_out)
        spelling = self.choose.pick(("module", "module", "module", "F.linear", "matmul", "einsum"))
        if spelling == "module":
            return self.let(self.linear(x.name, x.width, c_out, bias), x.kind, dims)
        turned = spelling == "matmul"
        w = self.parameter((x.width, c_out) if turned else (c_out, x.width), "w")
        rows, columns = ((1, c_out), (0, x.width)) if turned else ((0, c_out), (1, x.width))
        self.weights.append(Weight(w.removeprefix("self."), rows, columns))
        if turned:
            return self.let(f"{x.name} @ {w}", x.kind, dims)
        if spelling == "einsum":
            return self.let(f"torch.einsum('...c,dc->...d', {x.name}, {w})", x.kind, dims)
        b = self.parameter((c_out,), "b") if self.choose.flag() else None
        return self.let(f"F.linear({x.name}, {w}{f', {b}' if b else ''})", x.kind, dims)
