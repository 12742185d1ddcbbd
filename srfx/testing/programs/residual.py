"""Residual blocks of values of every kind."""

from __future__ import annotations

from srfx.testing.programs import image, tokens
from srfx.testing.programs.attention import attention
from srfx.testing.programs.builder import IMAGE, TOKENS, Builder, Val, Weight


def residual(b: Builder, x: Val) -> Val:
    """X + f(x), with a norm before or after, or none."""
    if x.kind == IMAGE:
        return image.residual(b, x)
    is_pre = b.choose.flag()
    y = tokens.norm(b, x) if is_pre else x
    y = attention(b, y) if x.kind == TOKENS and b.choose.flag(0.6) else tokens.feed_forward(b, y)
    if b.choose.flag(0.15):
        gamma = b.parameter((x.width,), "gamma")
        b.weights.append(Weight(gamma.removeprefix("self."), None, None))
        y = b.like(y, f"{y.name} * {gamma}")
    y = b.like(
        x, b.choose.pick((f"{x.name} + {y.name}", f"{y.name} + {x.name}", f"torch.add({x.name}, {y.name})"))
    )
    return y if is_pre or b.choose.flag(0.3) else tokens.norm(b, y)
