"""Steps of [N, T, C] values and of vectors: linear layers, norms, blocks of transformers."""

from __future__ import annotations

from srfx.testing.programs.anywhere import activation
from srfx.testing.programs.builder import IMAGE, TOKENS, VECTOR, Builder, Val, Weight


def linear(b: Builder, x: Val) -> Val:
    """A linear layer of some width."""
    return b.linear_on(x, b.width())


def norm(b: Builder, x: Val) -> Val:
    """A norm over channels, in any spelling; batch norm for vectors and transposed tokens."""
    c = x.width
    kind = b.choose.pick(("layer", "rms", "batch", "rms spelled", "layer plain", "functional", "group"))
    if kind == "batch":
        name = b.module("bn", f"nn.BatchNorm1d({c})")
        b.note(name, None, None, True)
        if x.kind == VECTOR:
            return b.like(x, f"{name}({x.name})")
        return b.like(x, f"{name}({x.name}.transpose(1, 2)).transpose(1, 2)")
    if kind == "group" and x.kind == VECTOR:
        g = b.choose.pick([g for g in range(1, c + 1) if c % g == 0])
        name = b.module("gn", f"nn.GroupNorm({g}, {c})")
        b.note(name, None, None, True)
        return b.like(x, f"{name}({x.name})")
    if kind in ("functional", "rms spelled"):
        gamma = b.parameter((c,), "gamma")
        b.weights.append(Weight(gamma.removeprefix("self."), None, None))
        if kind == "functional":
            beta = b.parameter((c,), "beta")
            return b.like(x, f"F.layer_norm({x.name}, ({c},), {gamma}, {beta})")
        square = b.choose.pick((f"{x.name}.pow(2)", f"{x.name} * {x.name}"))
        return b.like(x, f"{gamma} * ({x.name} * torch.rsqrt(({square}).mean(-1, keepdim=True) + 1e-6))")
    if kind == "layer plain":
        name = b.module("ln", f"nn.LayerNorm({c}, elementwise_affine=False)")
        return b.like(x, f"{name}({x.name})")
    cls = "RMSNorm" if kind == "rms" else "LayerNorm"
    name = b.module("ln", f"nn.{cls}({c})")
    b.note(name, None, None, cls == "LayerNorm")
    return b.like(x, f"{name}({x.name})")


def feed_forward(b: Builder, x: Val) -> Val:
    """Two layers and an activation, or a gated unit."""
    inner = b.choose.pick((8, 4, 6, 12, 5))
    if b.choose.flag(0.35):
        one, two = b.linear_on(x, inner), b.linear_on(x, inner)
        f = b.choose.pick(("F.silu", "F.gelu", "torch.sigmoid"))
        y = b.like(one, f"{f}({one.name}) * {two.name}")
    else:
        y = activation(b, b.linear_on(x, inner))
    return b.linear_on(y, x.width)


def positions(b: Builder, x: Val) -> Val:
    """Something learnt for each position."""
    t, c = x.dims
    form = b.choose.pick(("add", "class token", "conv", "roll", "cat", "shift"))
    if form == "add":
        p = b.parameter((1, t, c), "pos")
        return b.like(x, f"{x.name} + {p}")
    if form == "class token" and t < 8:
        p = b.parameter((1, 1, c), "cls")
        grown = b.choose.pick((f"{p}.expand({x.name}.shape[0], -1, -1)", f"{p}.expand({x.name}.size(0), 1, {c})",
                               f"{p}.repeat({x.name}.shape[0], 1, 1)"))  # fmt: skip
        return b.let(f"torch.cat([{grown}, {x.name}], 1)", TOKENS, (t + 1, c))
    if form == "conv":
        out = b.width()
        name = b.module("conv", f"nn.Conv1d({c}, {out}, 3, padding=1)")
        b.note(name, (0, out), (1, c), True)
        return b.let(f"{name}({x.name}.transpose(1, 2)).transpose(1, 2)", TOKENS, (t, out))
    if form == "cat" and t <= 4:
        return b.let(f"torch.cat([{x.name}, {x.name}.flip(1)], dim=1)", TOKENS, (2 * t, c))
    if form == "shift" and t > 1:
        return b.let(f"{x.name}[:, 1:] - {x.name}[:, :-1]", TOKENS, (t - 1, c))
    return b.like(x, f"torch.roll({x.name}, 1, 1)")


def to_vector(b: Builder, x: Val) -> Val:
    """A sequence becomes a vector."""
    t, c = x.dims
    form = b.choose.pick(("mean", "first", "last", "max", "flatten"))
    if form == "flatten" and t * c <= 80:
        return b.let(f"{x.name}.{b.choose.pick(('flatten(1)', f'reshape(-1, {t * c})'))}", VECTOR, (t * c,))
    code = {"mean": ".mean(1)", "first": "[:, 0]", "last": "[:, -1]", "max": ".max(1)[0]"}.get(
        form, ".sum(dim=1)"
    )
    return b.let(x.name + code, VECTOR, (c,))


def vector_to(b: Builder, x: Val) -> Val:
    """A vector becomes a picture or a sequence."""
    c = x.width
    form = b.choose.pick(("tokens", "image", "split", "expand"))
    if form == "image":
        side = 2 if c % 4 == 0 else 1
        if b.choose.flag():
            return b.let(
                f"{x.name}.view(-1, {c // side**2}, {side}, {side})", IMAGE, (c // side**2, side, side)
            )
        return b.let(
            f"{x.name}.unflatten(1, ({c // side**2}, {side}, {side}))", IMAGE, (c // side**2, side, side)
        )
    if form == "split" and c % 2 == 0:
        return b.let(f"{x.name}.reshape(-1, 2, {c // 2})", TOKENS, (2, c // 2))
    if form == "expand":
        return b.let(f"{x.name}[:, None].expand(-1, 3, -1)", TOKENS, (3, c))
    return b.let(f"{x.name}.unsqueeze(1)", TOKENS, (1, c))
