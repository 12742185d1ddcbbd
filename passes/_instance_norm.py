"""Instance norms as decomposition writes them.

    v = x.view(1, N C, *space);  r = _native_batch_norm_legit(v, weight.repeat(N), bias.repeat(N), True, m, eps)[0]
    y = r.view(N, C, *space)                                                 is  instance_norm(x, weight, bias, eps)

Both normalise every channel of every example by itself; a row-major view puts channel c of example n at n C + c, where
the repeated weight has weight[c].
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from srfx.ir.program import Param, Program
from srfx.ops.registry import resolve
from srfx.ops.views import Reshaping

aten = torch.ops.aten
NATIVE = (aten._native_batch_norm_legit.no_stats,)
TARGET = aten.instance_norm.default


def instance_norm(program: Program, node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The last node of a decomposed instance norm, and the arguments of ``aten.instance_norm``; None if it is none.

    Args:
        program: the graph.
        node: a call of `NATIVE`.
    """
    view, weight, bias, _, momentum, eps = node.args
    results = [u for u in node.users if u.users]
    if not isinstance(view, fx.Node) or len(results) != 1 or results[0].args[1:] != (0,):
        return None
    readers = list(results[0].users)
    if results[0].target is not operator.getitem or len(readers) != 1:
        return None
    x, last = _source(program, view), readers[0]
    if x is None or _source(program, last) is not results[0]:
        return None
    shape = program.shape(program.value(x))
    if len(shape) < 3 or program.shape(view) != (1, shape[0] * shape[1], *shape[2:]):
        return None
    if program.shape(last) != shape:
        return None
    vectors = []
    for repeated in (weight, bias):
        stored = _repeated(program, repeated, shape[0], shape[1])
        if repeated is not None and stored is None:
            return None
        vectors.append(stored)
    return last, (x, *vectors, None, None, True, momentum, eps, False)


def _source(program: Program, node: fx.Node) -> fx.Node | None:
    """What a view is a view of."""
    if not node.op.startswith("call") or not program.is_tensor(node):
        return None
    source = node.args[0] if isinstance(resolve(node, program)[0], Reshaping) else None
    return source if isinstance(source, fx.Node) else None


def _repeated(program: Program, node: Any, times: int, width: int) -> fx.Node | None:
    """The stored vector that is repeated."""
    if not isinstance(node, fx.Node) or node.target is not aten.repeat.default:
        return None
    stored = node.args[0]
    if not isinstance(stored, fx.Node) or not isinstance(program.value(stored), Param):
        return None
    fits = program.shape(program.value(stored)) == (width,) and program.shape(node) == (times * width,)
    return stored if fits else None
