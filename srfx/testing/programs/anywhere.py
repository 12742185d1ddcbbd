"""Steps that values of every kind can take: activations, arithmetic, concatenation, slices, in-place writes."""

from __future__ import annotations

from srfx.testing.programs.builder import TOKENS, VECTOR, Builder, Val, Weight

ACTIVATIONS = (
    "F.relu({})", "nn:nn.ReLU()", "torch.sigmoid({})", "nn:nn.GELU()", "nn:nn.SiLU()", "torch.tanh({})",
    "nn:nn.ReLU6()", "nn:nn.Hardswish()", "nn:nn.LeakyReLU(0.1)", "F.elu({})", "nn:nn.Softplus()", "{}.relu()",
    "nn:nn.PReLU()", "prelu", "{}.clamp(-1.0, 2.0)", "nn:nn.ReLU(inplace=True)", "F.hardtanh({})", "nn:nn.Mish()",
    "{}.abs()", "{} ** 2", "torch.exp(-{}.abs())", "F.softsign({})", "nn:nn.Identity()", "nn:nn.Dropout(0.3)",
    "nn:nn.Threshold(0.1, 0.5)", "nn:nn.CELU()", "F.logsigmoid({})", "1 - {}", "-{}", "{} / 3", "{}.neg().exp()",
    "torch.cos({})", "{}.contiguous()", "{} + 0.5", "2 * {}", "{}.detach()", "{}.clone()", "F.hardsigmoid({})",
    "{0}.to({0}.dtype)", "{0}.type_as({0})", "F.logsigmoid({0}).to(device={0}.device)",
)  # fmt: skip


def activation(b: Builder, x: Val) -> Val:
    """Elementwise, of one operand."""
    code = b.choose.pick(ACTIVATIONS)
    if code == "prelu":
        code = f"nn:nn.PReLU({x.width if x.kind != TOKENS else x.dims[0]})"
    if code.startswith("nn:"):
        return b.like(x, f"{b.module('act', code[3:])}({x.name})")
    return b.like(x, code.format(x.name))


def _shape(b: Builder, x: Val) -> tuple[int, ...]:
    """A shape that broadcasts against x: one number for each channel, or one number."""
    if b.choose.flag(0.2):
        return b.choose.pick(((1,), ()))
    return (x.width,) + (1,) * (len(x.dims) - 1 if x.kind not in (TOKENS, VECTOR) else 0)


def arithmetic(b: Builder, x: Val) -> Val:
    """A parameter in arithmetic, or a size."""
    form = b.choose.pick(("scale", "shift", "both", "size", "sub", "div", "where", "gate", "addcmul"))
    if form == "size":
        return b.like(
            x, f"{x.name} / {x.name}.{b.choose.pick((f'size({x.axis})', f'shape[{x.axis}]'))} ** 0.5"
        )
    p = b.parameter(_shape(b, x))
    b.weights.append(_vector(p))
    if form == "scale":
        return b.like(
            x, b.choose.pick((f"{x.name} * {p}", f"torch.mul({p}, {x.name})", f"{x.name}.mul({p})"))
        )
    if form == "shift":
        return b.like(x, f"{x.name} + {p}")
    if form == "sub":
        return b.like(x, f"{p} - {x.name}")
    if form == "div":
        return b.like(x, f"{x.name} / (1 + {p}.abs())")
    if form == "where":
        return b.like(x, f"torch.where({x.name} > 0, {x.name}, {p})")
    if form == "gate":
        return b.like(x, f"{x.name} * torch.sigmoid({p})")
    q = b.parameter(_shape(b, x))
    b.weights.append(_vector(q))
    if form == "addcmul":
        return b.like(x, f"torch.addcmul({q}, {x.name}, {p})")
    return b.like(x, f"{x.name} * {p} + {q}")


def _vector(path: str) -> Weight:
    return Weight(path.removeprefix("self."), None, None)


def join(b: Builder, x: Val) -> Val:
    """Two values of one shape become one: the other is an earlier one, or made of x."""
    others = [v for v in b.values if v.kind == x.kind and v.dims == x.dims and v.name != x.name]
    y = b.choose.pick(others) if others and b.choose.flag(0.7) else activation(b, x)
    form = b.choose.pick(("{x} + {y}", "{x} * {y}", "{x} - {y}", "torch.add({x}, {y}, alpha=0.5)", "{x}.add({y})",
                          "torch.maximum({x}, {y})", "{x} * torch.sigmoid({y})", "torch.where({y} > 0, {x}, {y})",
                          "torch.lerp({x}, {y}, 0.3)", "{x} / (1 + {y}.abs())", "torch.stack([{x}, {y}]).sum(0)",
                          "torch.stack([{x}, {y}], -1).mean(-1)"))  # fmt: skip
    return b.like(x, form.format(x=x.name, y=y.name))


def concat(b: Builder, x: Val) -> Val:
    """Channels of several values one after the other."""
    others = [v for v in b.values if v.kind == x.kind and v.dims[:-1] == x.dims[:-1]] if x.kind == TOKENS else [
        v for v in b.values if v.kind == x.kind and v.dims[1:] == x.dims[1:]
    ]  # fmt: skip
    others = [v for v in others if v.width + x.width <= 24]
    if not others:
        return activation(b, x)
    y = b.choose.pick(others)
    axis = b.choose.pick((x.axis, x.axis - len(x.dims) - 1))
    parts = b.choose.pick((f"{x.name}, {y.name}", f"{y.name}, {x.name}"))
    total = x.width + y.width
    dims = (*x.dims[:-1], total) if x.kind == TOKENS else (total, *x.dims[1:])
    return b.let(f"torch.cat([{parts}], {axis})", x.kind, dims)


def _with(x: Val, width: int) -> tuple[int, ...]:
    return (*x.dims[:-1], width) if x.kind == TOKENS else (width, *x.dims[1:])


def cut(b: Builder, x: Val) -> Val:
    """Some channels: a slice, an index, one half, each part by itself."""
    c, axis = x.width, x.axis
    lead = ":, " * axis
    if c < 2:
        return activation(b, x)
    form = b.choose.pick(
        ("chunk", "slice", "split", "index", "glu", "flip", "roll", "narrow", "swap", "step", "unbind")
    )
    if form in ("chunk", "glu", "swap", "unbind") and c % 2:
        form = "slice"
    half = c // 2
    if form == "glu":
        return b.let(f"F.glu({x.name}, {axis})", x.kind, _with(x, half))
    if form in ("chunk", "swap"):
        one, two = b.fresh("h"), b.fresh("h")
        b.line(f"{one}, {two} = {x.name}.chunk(2, {axis})")
        if form == "swap":
            return b.like(x, f"torch.cat([{two}, F.relu({one})], {axis})")
        code = b.choose.pick(
            (f"{one} * torch.sigmoid({two})", f"{one} + {two}", f"F.silu({one}) * {two}", one)
        )
        return b.let(code, x.kind, _with(x, half))
    if form == "unbind":
        sizes = "(2, -1)" if b.choose.flag() else "(-1, 2)"
        at = axis if sizes == "(2, -1)" else axis + 1
        one, two = b.fresh("h"), b.fresh("h")
        b.line(f"{one}, {two} = {x.name}.unflatten({axis}, {sizes}).unbind({at})")
        return b.let(f"{one} + torch.tanh({two})", x.kind, _with(x, half))
    k = b.choose.between(1, c - 1)
    if form == "split":
        one, two = b.fresh("h"), b.fresh("h")
        b.line(f"{one}, {two} = torch.split({x.name}, [{k}, {c - k}], {axis})")
        return b.like(x, f"torch.cat([torch.sigmoid({one}), {two}], {axis})")
    if form == "slice":
        code = b.choose.pick((f"{x.name}[{lead}{c - k}:]", f"{x.name}[{lead}:{k}]", f"{x.name}[{lead}-{k}:]"))
        return b.let(code, x.kind, _with(x, k))
    if form == "step":
        return b.let(f"{x.name}[{lead}::2]", x.kind, _with(x, (c + 1) // 2))
    if form == "narrow":
        return b.let(f"{x.name}.narrow({axis}, {c - k}, {k})", x.kind, _with(x, k))
    if form == "index":
        chosen = [b.choose.below(c) for _ in range(b.choose.between(1, min(c, 5)))]
        name = b.fresh("index")
        b.init.append(f"self.register_buffer('{name}', torch.tensor({chosen}))")
        code = b.choose.pick((f"{x.name}.index_select({axis}, self.{name})", f"{x.name}[{lead}self.{name}]"))
        return b.let(code, x.kind, _with(x, len(chosen)))
    if form == "flip":
        return b.like(x, f"torch.flip({x.name}, [{axis}])")
    return b.like(x, f"torch.roll({x.name}, {k}, {axis})")


def in_place(b: Builder, x: Val) -> Val:
    """A write into a copy, or into a view of one."""
    y = b.like(x, b.choose.pick((f"{x.name} + 0.25", f"{x.name}.clone()", f"torch.sigmoid({x.name})")))
    lead = ":, " * x.axis
    k = b.choose.below(x.width)
    b.line(b.choose.pick((
        f"{y.name} += {x.name}", f"{y.name}.mul_(2)", f"{y.name}[{lead}{k}:] = 0.5", f"{y.name}[{lead}{k}] *= 2",
        f"{y.name}.narrow({x.axis}, {k}, 1).add_(1)", f"F.relu_({y.name})", f"{y.name}.add_({x.name}, alpha=0.5)",
        f"{y.name}.clamp_(min=0.1)", f"{y.name}.zero_().add_({x.name})", f"{y.name}.copy_({x.name})",
    )))  # fmt: skip
    return y


UNKNOWN = (
    "torch.cumsum({}, {a})", "torch.softmax({}, {a})", "{}.sort({a})[0]", "torch.fft.fft({}, dim={a}).real",
    "library.odd({})", "torch.logcumsumexp({}, {a})", "F.normalize({}, dim={a})", "torch.cummax({}, {a})[0]",
    "{} - {}.mean({a}, keepdim=True)", "{} / (1 + {}.norm(dim={a}, keepdim=True))", "{} - {}.amax({a}, keepdim=True)",
    "torch.nan_to_num({})", "{} + {}.argmax({a}, keepdim=True)", "{} * {}.std({a}, keepdim=True, unbiased=False)",
)  # fmt: skip


def unknown(b: Builder, x: Val) -> Val:
    """An op that mixes channels, or one that nobody knows."""
    code = b.choose.pick(UNKNOWN)
    return b.like(x, code.replace("{a}", str(x.axis)).replace("{}", x.name))
