"""Recurrent layers of [N, T, C] values: stacked, in both directions, projected, with states given; and cells."""

from __future__ import annotations

from srfx.testing.programs.builder import TOKENS, VECTOR, Builder, Val, Weight

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(b: Builder, x: Val) -> Val:
    """A recurrent layer: its sequence of states, or the last ones."""
    t, c = x.dims
    h, cls = b.choose.pick((4, 3, 6, 2)), b.choose.pick(("LSTM", "GRU", "RNN"))
    is_first, has_bias, two_ways = b.choose.flag(0.8), not b.choose.flag(0.2), b.choose.flag(0.3)
    layers = 2 if b.choose.flag(0.25) else 1
    wide = b.choose.between(1, h - 1) if cls == "LSTM" and h > 2 and b.choose.flag(0.25) else h
    options = [
        f"{c}, {h}",
        *(["batch_first=True"] if is_first else []),
        *([] if has_bias else ["bias=False"]),
    ]
    options += ["bidirectional=True"] if two_ways else []
    options += ["num_layers=2"] if layers == 2 else []
    options += [f"proj_size={wide}"] if wide < h else []
    options += ["nonlinearity='relu'"] if cls == "RNN" and b.choose.flag(0.4) else []
    name = b.module("rnn", f"nn.{cls}({', '.join(options)})")
    for k in range(layers):
        for way in ("", "_reverse")[: 1 + two_ways]:
            read = c if k == 0 else wide * (1 + two_ways)
            _note(b, name, f"_l{k}{way}", GATES[cls], h, read, wide, has_bias)
    source = x.name if is_first else f"{x.name}.transpose(0, 1)"
    start = _start(b, x, cls, layers * (1 + two_ways), h, wide)
    out, last = b.fresh("s"), b.fresh("last")
    b.line(f"{out}, {last} = {name}({source}{start})")
    if b.choose.flag(0.25):
        state = f"{last}[0]" if cls == "LSTM" else last
        return b.let(f"{state}[-1]", VECTOR, (wide,))
    return b.let(out if is_first else f"{out}.transpose(0, 1)", TOKENS, (t, wide * (1 + two_ways)))


def _start(b: Builder, x: Val, cls: str, n: int, h: int, wide: int) -> str:
    """The states before the first step: none, zeros, or learnt ones."""
    form = b.choose.pick(("", "", "zeros", "learnt"))
    if not form:
        return ""
    names = []
    for width in (wide, h)[: 2 if cls == "LSTM" else 1]:
        state = b.fresh("start")
        if form == "zeros":
            b.line(f"{state} = {x.name}.new_zeros({n}, {x.name}.shape[0], {width})")
        else:
            learnt = b.parameter((n, 1, width), "start")
            b.line(f"{state} = {learnt}.repeat(1, {x.name}.shape[0], 1)")
        names.append(state)
    return f", ({', '.join(names)})" if cls == "LSTM" else f", {names[0]}"


def cell(b: Builder, x: Val) -> Val:
    """A cell that takes a few tokens one after the other: its last state."""
    t, c = x.dims
    h, cls = b.choose.pick((4, 3, 6, 2)), b.choose.pick(("LSTM", "GRU", "RNN"))
    has_bias = not b.choose.flag(0.2)
    options = [f"{c}, {h}", *([] if has_bias else ["bias=False"])]
    options += ["nonlinearity='relu'"] if cls == "RNN" and b.choose.flag(0.4) else []
    name = b.module("cell", f"nn.{cls}Cell({', '.join(options)})")
    _note(b, name, "", GATES[cls], h, c, h, has_bias)
    state = b.fresh("s")
    for k in range(min(t, b.choose.between(1, 3))):
        given = f", {state}" if k else ""
        b.line(f"{state} = {name}({x.name}[:, {k}]{given})")
    return b.let(f"{state}[{b.choose.pick((0, 1))}]" if cls == "LSTM" else state, VECTOR, (h,))


def _note(
    b: Builder, name: str, suffix: str, gates: int, h: int, read: int, wide: int, has_bias: bool
) -> None:
    """Let the weights of one layer in one direction be masked, the rows of a unit together."""
    path = name.removeprefix("self.")
    for side, columns in (("ih", read), ("hh", wide)):
        bias = f"{path}.bias_{side}{suffix}" if has_bias else ""
        b.weights.append(Weight(f"{path}.weight_{side}{suffix}", (0, gates * h), (1, columns), bias, gates))
    if wide < h:
        b.weights.append(Weight(f"{path}.weight_hr{suffix}", (0, wide), (1, h)))
