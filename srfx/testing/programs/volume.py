"""A picture becomes a volume [N, C, D, H, W] for a few steps, and a picture again."""

from __future__ import annotations

from dataclasses import dataclass

from srfx.testing.programs.anywhere import ACTIVATIONS
from srfx.testing.programs.builder import IMAGE, Builder, Val

_PLAIN = tuple(code for code in ACTIVATIONS if not code.startswith(("nn:", "prelu")))


@dataclass(frozen=True)
class _Volume:
    """Its name in the code, its channels, and its other sizes."""

    name: str
    width: int
    sides: tuple[int, int, int]


def volume(b: Builder, x: Val) -> Val:
    """Layers of three dimensions between two of two."""
    c, h, w = x.dims
    form = b.choose.pick(("stack", "expand", "channels"))
    if form == "channels" and c % 2 == 0:
        v = _let(b, f"{x.name}.unflatten(1, ({c // 2}, 2))", c // 2, (2, h, w))
    elif form == "expand":
        v = _let(b, f"{x.name}[:, :, None].expand(-1, -1, 3, -1, -1)", c, (3, h, w))
    else:
        v = _let(b, f"torch.stack([{x.name}, {x.name}.flip(-1)], 2)", c, (2, h, w))
    v = _convolution(b, v)
    for _ in range(b.choose.between(0, 2)):
        v = b.choose.pick((_convolution, _convolution, _transposed, _norm, _pool, _activation))(b, v)
    return _picture(b, v)


def _let(b: Builder, code: str, width: int, sides: tuple[int, ...]) -> _Volume:
    name = b.fresh("v")
    b.line(f"{name} = {code}")
    d, h, w = sides
    return _Volume(name, width, (d, h, w))


def _picture(b: Builder, v: _Volume) -> Val:
    d, h, w = v.sides
    form = b.choose.pick(("mean", "first", "max", "flatten"))
    if form == "flatten" and v.width * d <= 24:
        return b.let(f"{v.name}.flatten(1, 2)", IMAGE, (v.width * d, h, w))
    code = {"first": "[:, :, 0]", "max": ".amax(2)"}.get(form, ".mean(2)")
    return b.let(v.name + code, IMAGE, (v.width, h, w))


def _groups(b: Builder, c: int, out: int) -> int:
    return b.choose.pick([1, 1, *(g for g in range(1, min(c, out) + 1) if c % g == 0 and out % g == 0)])


def _convolution(b: Builder, v: _Volume) -> _Volume:
    """Of one size, or strided; flat kernels too."""
    c, out = v.width, b.width()
    kernel, padding = b.choose.pick(((3, 1), (1, 0), ((1, 3, 3), (0, 1, 1)), ((2, 1, 1), 0)))
    stride = b.choose.pick((1, 1, 2))
    g, has_bias = _groups(b, c, out), b.choose.flag(0.7)
    reach = padding if isinstance(padding, tuple) else (padding,) * 3
    options = [f"stride={stride}", f"padding={padding}", *([f"groups={g}"] if g > 1 else [])]
    if any(reach) and all(p < s for p, s in zip(reach, v.sides, strict=True)) and b.choose.flag(0.3):
        options.append(f"padding_mode='{b.choose.pick(('replicate', 'circular'))}'")
    if not has_bias:
        options.append("bias=False")
    size = kernel if isinstance(kernel, tuple) else (kernel,) * 3
    sides = tuple((s + 2 * p - k) // stride + 1 for s, p, k in zip(v.sides, reach, size, strict=True))
    if min(sides) < 1:
        return _activation(b, v)
    name = b.module("conv", f"nn.Conv3d({c}, {out}, {kernel}, {', '.join(options)})")
    b.note(name, (0, out), (1, c) if g == 1 else None, has_bias)
    return _let(b, f"{name}({v.name})", out, sides)


def _transposed(b: Builder, v: _Volume) -> _Volume:
    c, out = v.width, b.width()
    kernel, stride = b.choose.pick((((1, 2, 2), (1, 2, 2)), (1, 1), (2, 1)))
    if max(v.sides) > 7:
        return _activation(b, v)
    g, has_bias = _groups(b, c, out), b.choose.flag(0.7)
    options = [f"stride={stride}", *([f"groups={g}"] if g > 1 else []), *([] if has_bias else ["bias=False"])]
    name = b.module("up", f"nn.ConvTranspose3d({c}, {out}, {kernel}, {', '.join(options)})")
    b.note(name, (1, out) if g == 1 else None, (0, c) if g == 1 else None, has_bias)
    size, steps = (k if isinstance(k, tuple) else (k,) * 3 for k in (kernel, stride))
    sides = tuple((s - 1) * t + k for s, t, k in zip(v.sides, steps, size, strict=True))
    return _let(b, f"{name}({v.name})", out, sides)


def _norm(b: Builder, v: _Volume) -> _Volume:
    kind = b.choose.pick(("batch", "instance", "group"))
    if kind == "instance":
        name = b.module("inorm", f"nn.InstanceNorm3d({v.width}, affine=True)")
    elif kind == "group":
        name = b.module("gn", f"nn.GroupNorm({_groups(b, v.width, v.width)}, {v.width})")
    else:
        name = b.module("bn", f"nn.BatchNorm3d({v.width})")
    b.note(name, None, None, True)
    return _let(b, f"{name}({v.name})", v.width, v.sides)


def _pool(b: Builder, v: _Volume) -> _Volume:
    form = b.choose.pick(("max", "avg", "adaptive", "same", "pad"))
    if form in ("max", "avg") and min(v.sides) >= 2:
        name = b.module("pool", "nn.MaxPool3d(2)" if form == "max" else "nn.AvgPool3d(2)")
        return _let(b, f"{name}({v.name})", v.width, tuple(s // 2 for s in v.sides))
    if form == "adaptive":
        f = b.choose.pick(("F.adaptive_avg_pool3d", "F.adaptive_max_pool3d"))
        return _let(b, f"{f}({v.name}, (1, 2, 2))", v.width, (1, 2, 2))
    if form == "pad" or min(v.sides) < 3:  # torch pools no volume smaller than the window, padded or not
        d, h, w = v.sides
        return _let(b, f"F.pad({v.name}, (0, 0, 1, 0, 1, 0))", v.width, (d + 1, h + 1, w))
    counted = b.choose.flag()
    return _let(b, f"F.avg_pool3d({v.name}, 3, 1, 1, count_include_pad={counted})", v.width, v.sides)


def _activation(b: Builder, v: _Volume) -> _Volume:
    return _let(b, b.choose.pick(_PLAIN).format(v.name), v.width, v.sides)
