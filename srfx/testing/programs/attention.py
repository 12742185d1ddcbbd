"""Attention in its spellings: scaled dot product, by hand, the module; fused, grouped and rotary."""

from __future__ import annotations

from srfx.testing.programs.builder import TOKENS, Builder, Val, Weight


def attention(b: Builder, x: Val) -> Val:
    """Self-attention; the result has the width of x."""
    t, c = x.dims
    heads = b.choose.pick((2, 1, 3))
    form = b.choose.pick(
        (
            "separate",
            "fused chunk",
            "fused heads",
            "fused last",
            "module",
            "grouped",
            "cross",
            "layer",
            "gqa",
            "decoder",
        )
    )
    if form == "module":
        return _module(b, x)
    if form == "layer":
        return _layer(b, x)
    if form == "decoder":
        return _decoder(b, x)
    d = b.choose.pick((2, 4, 3, 6))
    inner = heads * d
    d_v = d
    if form == "fused chunk":
        qkv = b.linear_on(x, 3 * inner)
        q, k, v = b.fresh("q"), b.fresh("k"), b.fresh("v")
        how = b.choose.pick((f"{qkv.name}.chunk(3, -1)", f"{qkv.name}.split({inner}, 2)"))
        b.line(f"{q}, {k}, {v} = {how}")
        q, k, v = (_heads(b, name, t, heads, d) for name in (q, k, v))
    elif form == "fused heads":
        qkv = b.linear_on(x, 3 * inner)
        q, k, v = b.fresh("q"), b.fresh("k"), b.fresh("v")
        unbind = b.choose.pick((".unbind(0)", ""))
        b.line(
            f"{q}, {k}, {v} = {qkv.name}.reshape(-1, {t}, 3, {heads}, {d}).permute(2, 0, 3, 1, 4){unbind or '.unbind()'}"
        )
    elif form == "fused last":
        qkv = b.linear_on(x, 3 * inner)
        q, k, v = b.fresh("q"), b.fresh("k"), b.fresh("v")
        b.line(f"{q}, {k}, {v} = {qkv.name}.view(-1, {t}, {heads}, {3 * d}).transpose(1, 2).chunk(3, dim=-1)")
    elif form == "gqa":
        heads = 2 * b.choose.pick((1, 2))
        q, k, v = (_heads(b, b.linear_on(x, n * d).name, t, n, d) for n in (heads, heads // 2, heads // 2))
        y = b.fresh("a")
        causal = ", is_causal=True" if b.choose.flag(0.3) else ""
        b.line(f"{y} = F.scaled_dot_product_attention({q}, {k}, {v}{causal}, enable_gqa=True)")
        return _output(b, y, t, heads, d, c)
    elif form == "grouped":
        heads = 2 * b.choose.pick((1, 2))
        inner = heads * d
        q = _heads(b, b.linear_on(x, inner).name, t, heads, d)
        k, v = (
            _repeated(b, _heads(b, b.linear_on(x, inner // 2).name, t, heads // 2, d), t, heads // 2, d)
            for _ in "kv"
        )
    else:
        d_v = b.choose.pick((d, 2, 3))
        source = x
        if form == "cross":
            others = [v for v in b.values if v.kind == TOKENS]
            source = b.choose.pick(others)
        s = source.dims[0]
        q = _heads(b, b.linear_on(x, inner).name, t, heads, d)
        k = _heads(b, b.linear_on(source, inner).name, s, heads, d)
        v = _heads(b, b.linear_on(source, heads * d_v).name, s, heads, d_v)
        return _output(b, _scores(b, q, k, v, t, s, d, heads), t, heads, d_v, c)
    if d % 2 == 0 and b.choose.flag(0.3):
        q, k = _rotary(b, q, k, t, d)
    return _output(b, _scores(b, q, k, v, t, t, d, heads), t, heads, d_v, c)


def _heads(b: Builder, name: str, t: int, heads: int, d: int) -> str:
    new = b.fresh("a")
    how = b.choose.pick((f"view(-1, {t}, {heads}, {d}).transpose(1, 2)", f"reshape(-1, {t}, {heads}, {d}).permute(0, 2, 1, 3)",
                         f"unflatten(-1, ({heads}, {d})).transpose(1, 2)"))  # fmt: skip
    b.line(f"{new} = {name}.{how}")
    return new


def _repeated(b: Builder, name: str, t: int, heads: int, d: int) -> str:
    new = b.fresh("a")
    if b.choose.flag(0.4):
        b.line(f"{new} = {name}.repeat_interleave(2, 1)")
    else:
        b.line(
            f"{new} = {name}[:, :, None].expand(-1, {heads}, 2, {t}, {d}).reshape(-1, {2 * heads}, {t}, {d})"
        )
    return new


def _rotary(b: Builder, q: str, k: str, t: int, d: int) -> tuple[str, str]:
    cos, sin = b.fresh("cos"), b.fresh("sin")
    if b.choose.flag():
        b.init.append(f"angle = torch.outer(torch.arange({t}.0), 0.5 ** torch.arange({d // 2}.0))")
        b.init.append(f"self.register_buffer('{cos}', torch.cat([angle.cos(), angle.cos()], -1))")
        b.init.append(f"self.register_buffer('{sin}', torch.cat([angle.sin(), angle.sin()], -1))")
        cos, sin = f"self.{cos}", f"self.{sin}"
    else:
        angle = b.fresh("angle")
        b.line(
            f"{angle} = torch.outer(torch.arange({t}, dtype=torch.float64), 0.5 ** torch.arange({d // 2}, dtype=torch.float64))"
        )
        b.line(f"{angle} = torch.cat([{angle}, {angle}], -1)")
        b.line(f"{cos}, {sin} = {angle}.cos(), {angle}.sin()")
    found = []
    for name in (q, k):
        new = b.fresh("a")
        half = f"torch.cat([-{name}[..., {d // 2}:], {name}[..., :{d // 2}]], -1)"
        b.line(f"{new} = {name} * {cos} + {half} * {sin}")
        found.append(new)
    return found[0], found[1]


def _scores(b: Builder, q: str, k: str, v: str, t: int, s: int, d: int, heads: int) -> str:
    new = b.fresh("a")
    mask = b.choose.pick(("", "", "causal", "key", "bias", "slopes"))
    fitting = [name for name, length in b.masks if length == s]
    if mask == "key" and not fitting:
        mask = ""
    if mask == "causal" and s != t:
        mask = ""
    given = f"{fitting[0]}[:, None, None]" if mask == "key" else ""
    if mask == "bias":
        given = b.parameter((t, s), "bias")
    if mask == "slopes":  # a number for each head and distance
        slopes = b.parameter((heads, 1, 1), "slope")
        b.weights.append(Weight(slopes.removeprefix("self."), None, None))
        given = b.fresh("bias")
        b.line(f"{given} = {slopes} * torch.arange({s}, dtype=torch.float64)[None, None]")
    if b.choose.flag(0.55):
        extra = {"": "", "causal": ", is_causal=True"}.get(mask, f", attn_mask={given}")
        extra += ", scale=0.5" if b.choose.flag(0.15) else ""
        b.line(f"{new} = F.scaled_dot_product_attention({q}, {k}, {v}{extra})")
        return new
    scores, kt = (
        b.fresh("s"),
        b.choose.pick((f"{k}.transpose(-2, -1)", f"{k}.permute(0, 1, 3, 2)", f"{k}.mT")),
    )
    scale = b.choose.pick(
        (f" / {d} ** 0.5", f" * {d} ** -0.5", f" / {q}.size(-1) ** 0.5", f" * {q}.shape[-1] ** -0.5")
    )
    product = b.choose.pick((f"{q} @ {kt}", f"torch.matmul({q}, {kt})"))
    b.line(f"{scores} = ({product}){scale}")
    if mask == "causal":
        b.line(
            f"{scores} = {scores}.masked_fill(torch.ones({t}, {t}, dtype=torch.bool).triu(1), float('-inf'))"
        )
    elif mask == "key":
        low = b.choose.pick(("-1e9", "float('-inf')"))
        b.line(f"{scores} = {scores}.masked_fill(~{given}, {low})")
    elif mask in ("bias", "slopes"):
        b.line(f"{scores} = {scores} + {given}")
    soft = b.choose.pick((f"{scores}.softmax(-1)", f"F.softmax({scores}, dim=-1)"))
    b.line(f"{new} = {soft} @ {v}")
    return new


def _output(b: Builder, name: str, t: int, heads: int, d: int, c: int) -> Val:
    joined = b.choose.pick((f".transpose(1, 2).reshape(-1, {t}, {heads * d})", ".transpose(1, 2).flatten(2)",
                            f".permute(0, 2, 1, 3).contiguous().view(-1, {t}, {heads * d})"))  # fmt: skip
    y = b.let(name + joined, TOKENS, (t, heads * d))
    return b.linear_on(y, c)


def _module(b: Builder, x: Val) -> Val:
    c = x.width
    heads = b.choose.pick([h for h in (2, 1, 3) if c % h == 0])
    bias = b.choose.flag(0.8)
    name = b.module(
        "mha", f"nn.MultiheadAttention({c}, {heads}, batch_first=True{'' if bias else ', bias=False'})"
    )
    path = name.removeprefix("self.")
    b.weights.append(
        Weight(f"{path}.in_proj_weight", (0, 3 * c), (1, c), f"{path}.in_proj_bias" if bias else "")
    )
    b.weights.append(
        Weight(f"{path}.out_proj.weight", (0, c), (1, c), f"{path}.out_proj.bias" if bias else "")
    )
    new = b.fresh("a")
    fitting = [m for m, length in b.masks if length == x.dims[0]]
    extra = f", key_padding_mask=~{fitting[0]}" if fitting and b.choose.flag(0.3) else ""
    b.line(f"{new}, _ = {name}({x.name}, {x.name}, {x.name}{extra}, need_weights={b.choose.flag(0.3)})")
    return b.like(x, new)


def _layer(b: Builder, x: Val) -> Val:
    c = x.width
    heads = b.choose.pick([h for h in (2, 1, 3) if c % h == 0])
    first = b.choose.flag()
    name = b.module(
        "block", f"nn.TransformerEncoderLayer({c}, {heads}, 6, batch_first=True, norm_first={first})"
    )
    path = name.removeprefix("self.")
    b.weights.append(
        Weight(f"{path}.self_attn.in_proj_weight", (0, 3 * c), (1, c), f"{path}.self_attn.in_proj_bias")
    )
    b.weights.append(Weight(f"{path}.linear1.weight", (0, 6), (1, c), f"{path}.linear1.bias"))
    b.weights.append(Weight(f"{path}.linear2.weight", (0, c), (1, 6), f"{path}.linear2.bias"))
    return b.like(x, f"{name}({x.name})")


def _decoder(b: Builder, x: Val) -> Val:
    """A decoder layer that looks at itself or at another sequence of its width."""
    c = x.width
    heads = b.choose.pick([h for h in (2, 1, 3) if c % h == 0])
    memory = b.choose.pick([v for v in b.values if v.kind == TOKENS and v.width == c])
    name = b.module("block", f"nn.TransformerDecoderLayer({c}, {heads}, 6, batch_first=True)")
    path = name.removeprefix("self.")
    for part in ("self_attn", "multihead_attn"):
        b.weights.append(
            Weight(f"{path}.{part}.in_proj_weight", (0, 3 * c), (1, c), f"{path}.{part}.in_proj_bias")
        )
    b.weights.append(Weight(f"{path}.linear1.weight", (0, 6), (1, c), f"{path}.linear1.bias"))
    b.weights.append(Weight(f"{path}.linear2.weight", (0, c), (1, 6), f"{path}.linear2.bias"))
    return b.like(x, f"{name}({x.name}, {memory.name})")
