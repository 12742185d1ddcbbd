"""Steps of [N, C, H, W] values: convolutions, norms, pools, shuffles, gates."""

from __future__ import annotations

from srfx.testing.programs.anywhere import activation
from srfx.testing.programs.builder import IMAGE, TOKENS, VECTOR, Builder, Val, Weight


def _divisors(a: int, b: int) -> list[int]:
    return [g for g in range(1, min(a, b) + 1) if a % g == 0 and b % g == 0]


def convolution(b: Builder, x: Val, width: int | None = None) -> Val:
    """Any convolution that keeps or shrinks the picture; with ``width`` it keeps the size."""
    c, h, w = x.dims
    side = min(h, w)
    fixed = width is not None
    out = width if width is not None else b.width()
    again = [m for m in b.modules if m[1:] == ("conv", c, out)]
    if again and b.choose.flag(0.2):
        return b.let(f"{b.choose.pick(again)[0]}({x.name})", IMAGE, (out, h, w))
    k = b.choose.pick([k for k in (3, 1, 2) if k <= side and not (fixed and k == 2)] or [1])
    options = []
    padding = (k // 2) if fixed else b.choose.pick((k // 2, 0, "'same'"))
    stride = 1 if fixed or padding == "'same'" else b.choose.pick((1, 1, 2))
    dilation = b.choose.pick((1, 1, 2)) if k == 3 and side >= 5 and not fixed else 1
    groups = b.choose.pick((1, 1, 1, "depthwise", "some"))
    if groups == "depthwise":
        out, g = (c if fixed else c * b.choose.pick((1, 2))), c
        g = c if out % c == 0 else 1
        if fixed and width != c:
            out, g = out if width is None else width, 1
    elif groups == "some":
        g = b.choose.pick(_divisors(c, out))
    else:
        g = 1
    if padding != 0:
        options.append(f"padding={padding}")
    if stride != 1:
        options.append(f"stride={stride}")
    if dilation != 1:
        options.append(f"dilation={dilation}")
    if g != 1:
        options.append(f"groups={g}")
    reach = padding if isinstance(padding, int) else dilation * (k - 1)
    if reach and reach < side and b.choose.flag(0.3):
        options.append(f"padding_mode='{b.choose.pick(('reflect', 'replicate', 'circular'))}'")
    has_bias = b.choose.flag(0.7)
    if not has_bias:
        options.append("bias=False")
    name = b.module("conv", f"nn.Conv2d({', '.join([str(c), str(out), str(k), *options])})")
    b.note(name, (0, out), (1, c) if g == 1 else None, has_bias)
    reach_all = dilation * (k - 1)
    sides = (
        (h, w)
        if padding == "'same'"
        else tuple(
            (s + 2 * (padding if isinstance(padding, int) else 0) - reach_all - 1) // stride + 1
            for s in (h, w)
        )
    )
    if min(sides) < 1:
        b.init.pop()
        b.weights.pop()
        return activation(b, x)
    if g == 1 and sides == (h, w):
        b.modules.append((name, "conv", c, out))
    return b.let(f"{name}({x.name})", IMAGE, (out, *sides))


def transposed(b: Builder, x: Val) -> Val:
    """A transposed convolution."""
    c, h, w = x.dims
    if max(h, w) > 9:
        return convolution(b, x)
    out = b.width()
    k, stride = b.choose.pick(((2, 2), (1, 1), (3, 2), (3, 1)))
    padding = b.choose.pick((0, 1)) if k == 3 else 0
    extra = b.choose.pick((0, 1)) if stride == 2 else 0
    g = b.choose.pick([1, 1, *_divisors(c, out)])
    has_bias = b.choose.flag(0.7)
    code = f"nn.ConvTranspose2d({c}, {out}, {k}, stride={stride}, padding={padding}, output_padding={extra}"
    code += f", groups={g}" if g > 1 else ""
    name = b.module("up", code + (")" if has_bias else ", bias=False)"))
    b.note(name, (1, out) if g == 1 else None, (0, c) if g == 1 else None, has_bias)
    sides = tuple((s - 1) * stride - 2 * padding + k + extra for s in (h, w))
    if min(sides) < 1:
        b.init.pop()
        b.weights.pop()
        return activation(b, x)
    return b.let(f"{name}({x.name})", IMAGE, (out, *sides))


def norm(b: Builder, x: Val) -> Val:
    """A norm of any kind."""
    c, h, w = x.dims
    kind = b.choose.pick(
        ("batch", "batch", "layer", "group", "instance", "batch plain", "functional", "rms", "lrn")
    )
    if kind in ("batch", "batch plain"):
        name = b.module("bn", f"nn.BatchNorm2d({c}{', affine=False' if kind == 'batch plain' else ''})")
        if kind == "batch":
            b.note(name, None, None, True)
        return b.like(x, f"{name}({x.name})")
    if kind == "group":
        name = b.module("gn", f"nn.GroupNorm({b.choose.pick(_divisors(c, c))}, {c})")
        b.note(name, None, None, True)
        return b.like(x, f"{name}({x.name})")
    if kind == "instance" and h * w > 1:
        affine = b.choose.flag()
        name = b.module("inorm", f"nn.InstanceNorm2d({c}{', affine=True' if affine else ''})")
        if affine:
            b.note(name, None, None, True)
        return b.like(x, f"{name}({x.name})")
    if kind == "lrn":
        return b.like(x, f"{b.module('lrn', 'nn.LocalResponseNorm(3)')}({x.name})")
    cls = "RMSNorm" if kind == "rms" else "LayerNorm"
    moved = f"{x.name}.permute(0, 2, 3, 1)"
    if kind == "functional":
        gamma, beta = b.parameter((c,), "gamma"), b.parameter((c,), "beta")
        b.weights.append(Weight(gamma.removeprefix("self."), None, None))
        return b.like(x, f"F.layer_norm({moved}, ({c},), {gamma}, {beta}, 1e-6).permute(0, 3, 1, 2)")
    name = b.module("ln", f"nn.{cls}({c})")
    b.note(name, None, None, cls == "LayerNorm")
    return b.like(x, f"{name}({moved}).permute(0, 3, 1, 2)")


def residual(b: Builder, x: Val) -> Val:
    """X + f(x), in several spellings; what follows the sum differs."""
    y = x
    if b.choose.flag(0.4):
        y = norm(b, y)
    inner = b.choose.pick((x.width, *(4, 6)))
    y = activation(b, convolution(b, y, inner))
    y = convolution(b, y, x.width)
    if y.dims != x.dims:
        return y
    if b.choose.flag(0.3):
        y = norm(b, y)
    if b.choose.flag(0.2):
        gamma = b.parameter((x.width, 1, 1), "gamma")
        b.weights.append(Weight(gamma.removeprefix("self."), None, None))
        y = b.like(y, f"{gamma} * {y.name}")
    form = b.choose.pick(("{x} + {y}", "{y} + {x}", "{y}.add({x})", "F.relu({x} + {y})"))
    if b.choose.flag(0.15):
        b.line(f"{y.name} += {x.name}")
        return y
    return b.like(x, form.format(x=x.name, y=y.name))


def gate(b: Builder, x: Val) -> Val:
    """Squeeze and excite."""
    c, inner = x.width, b.choose.pick((2, 3, 1))
    mean = b.choose.pick(("F.adaptive_avg_pool2d({}, 1)", "{}.mean((2, 3), keepdim=True)", "{}.mean([2, 3])"))
    y = mean.format(x.name)
    if mean == "{}.mean([2, 3])":
        y = f"torch.sigmoid({b.linear(f'F.relu({b.linear(y, c, inner)})', inner, c)})"
        return b.like(
            x, b.choose.pick((f"{x.name} * {y}[:, :, None, None]", f"{x.name} * {y}.view(-1, {c}, 1, 1)"))
        )
    one, two = b.module("se", f"nn.Conv2d({c}, {inner}, 1)"), b.module("se", f"nn.Conv2d({inner}, {c}, 1)")
    b.note(one, (0, inner), (1, c), True)
    b.note(two, (0, c), (1, inner), True)
    f = b.choose.pick(("torch.sigmoid", "F.hardsigmoid"))
    return b.like(x, f"{x.name} * {f}({two}(F.relu({one}({y}))))")


def pool(b: Builder, x: Val) -> Val:
    """A pool, an interpolation or a padding."""
    c, h, w = x.dims
    form = b.choose.pick(("max", "avg", "adaptive", "avg same", "interpolate", "pad", "lp", "zeropad"))
    if form in ("max", "avg", "lp") and min(h, w) >= 2:
        padding = b.choose.pick((0, 1)) if form != "lp" else 0
        code = {"max": "nn.MaxPool2d(2", "avg": "nn.AvgPool2d(2", "lp": "nn.LPPool2d(2, 2"}[form]
        ceil = ", ceil_mode=True" if b.choose.flag(0.2) and form != "lp" else ""
        sides = tuple((s + 2 * padding - 2 + (1 if ceil else 0)) // 2 + 1 for s in (h, w))
        if ceil:  # the last window has to begin inside
            sides = tuple(
                n - 1 if (n - 1) * 2 >= s + padding else n for n, s in zip(sides, (h, w), strict=True)
            )
        name = b.module("pool", code + (f", padding={padding}" if padding else "") + ceil + ")")
        return b.let(f"{name}({x.name})", IMAGE, (c, *sides))
    if form == "adaptive":
        side = b.choose.pick((1, 2))
        f = b.choose.pick(("F.adaptive_avg_pool2d", "F.adaptive_max_pool2d"))
        return b.let(f"{f}({x.name}, {side})", IMAGE, (c, side, side))
    if form == "interpolate" and max(h, w) <= 7:
        mode = b.choose.pick(("'nearest'", "'bilinear', align_corners=False", "'bicubic'"))
        return b.let(f"F.interpolate({x.name}, scale_factor=2, mode={mode})", IMAGE, (c, 2 * h, 2 * w))
    if form == "pad":
        mode = b.choose.pick(
            ("", ", value=0.5", ", mode='reflect'", ", mode='replicate'", ", mode='circular'")
        )
        if min(h, w) < 2:
            mode = ""
        return b.let(f"F.pad({x.name}, (1, 0, 1, 1){mode})", IMAGE, (c, h + 2, w + 1))
    if form == "zeropad":
        k = b.choose.pick((1, 2))
        return b.let(f"F.pad({x.name}, (0, 0, 0, 0, {k}, 0))", IMAGE, (c + k, h, w))
    return b.like(x, f"F.avg_pool2d({x.name}, 3, 1, 1, count_include_pad={b.choose.flag()})")


def shuffle(b: Builder, x: Val) -> Val:
    """Channels in another order, as views or as a module."""
    c = x.width
    groups = [g for g in _divisors(c, c) if 1 < g < c]
    if not groups:
        return activation(b, x)
    g = b.choose.pick(groups)
    if b.choose.flag(0.3):
        return b.like(x, f"{b.module('shuffle', f'nn.ChannelShuffle({g})')}({x.name})")
    n, h, w = b.fresh("n"), b.fresh("h"), b.fresh("w")
    b.line(f"{n}, _, {h}, {w} = {x.name}.shape")
    return b.like(
        x, f"{x.name}.view({n}, {g}, {c // g}, {h}, {w}).transpose(1, 2).reshape({n}, -1, {h}, {w})"
    )


def pixels(b: Builder, x: Val) -> Val:
    """Channels in exchange for pixels, either way; a convolution makes four channels of each where it has to."""
    c, h, w = x.dims
    if h % 2 == 0 and w % 2 == 0 and c <= 6 and b.choose.flag():
        code, dims = (
            b.choose.pick(("F.pixel_unshuffle({}, 2)", "nn:nn.PixelUnshuffle(2)")),
            (4 * c, h // 2, w // 2),
        )
    else:
        if max(h, w) > 7:
            return pool(b, x)
        if c % 4:
            x = convolution(b, x, b.choose.pick((4, 8)))
        code = b.choose.pick(("F.pixel_shuffle({}, 2)", "nn:nn.PixelShuffle(2)"))
        dims = (x.width // 4, 2 * h, 2 * w)
    code = f"{b.module('shuffle', code[3:])}({{}})" if code.startswith("nn:") else code
    return b.let(code.format(x.name), IMAGE, dims)


def to_vector(b: Builder, x: Val) -> Val:
    """A picture becomes a vector."""
    c, h, w = x.dims
    form = b.choose.pick(("mean", "flatten", "pool", "max"))
    if form == "flatten" and c * h * w <= 80:
        return b.let(f"{x.name}.flatten(1)", VECTOR, (c * h * w,))
    if form == "pool":
        return b.let(f"F.adaptive_avg_pool2d({x.name}, 2).flatten(1)", VECTOR, (4 * c,))
    if form == "max":
        return b.let(f"{x.name}.amax((2, 3))", VECTOR, (c,))
    return b.let(f"{x.name}.mean((2, 3))", VECTOR, (c,))


def to_tokens(b: Builder, x: Val) -> Val:
    """A picture becomes a sequence of its positions."""
    c, h, w = x.dims
    if h * w > 16:
        x, h, w = b.let(f"F.adaptive_avg_pool2d({x.name}, 2)", IMAGE, (c, 2, 2)), 2, 2
    code = b.choose.pick((".flatten(2).transpose(1, 2)", f".reshape(-1, {c}, {h * w}).permute(0, 2, 1)"))
    return b.let(x.name + code, TOKENS, (h * w, c))
