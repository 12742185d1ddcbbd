"""Random inputs for a graph: floats from a normal distribution, integers that fit their tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from srfx.ir.attrs import get_attr

_EMBEDDINGS = (F.embedding, torch.embedding, torch.ops.aten.embedding.default)


@dataclass(frozen=True)
class Spec:
    """Shape, dtype and device of a tensor to make up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"


def generate(gm: fx.GraphModule, specs: list[Any], generator: torch.Generator, n_more: int = 0) -> list[Any]:
    """One value per placeholder.

    Integers that reach an embedding stay below its number of rows; other integers are 0 or 1, with 1 at
    position 0 of the last axis, so that a mask hides no row altogether.

    Args:
        gm: the graph the values are for.
        specs: one entry per placeholder; every `Spec` in it becomes a tensor, the rest stays.
        generator: where the randomness comes from.
        n_more: added to the size of the leading axis of all tensors that share it (another batch size).
    """
    batch = _batch_size(specs)
    values = []
    for node, spec in zip(gm.graph.find_nodes(op="placeholder"), specs, strict=True):
        n_rows = _table_rows(gm, node)

        def make(s: Spec, n_rows: int | None = n_rows) -> Tensor:
            shape = list(s.shape)
            if shape and shape[0] == batch:
                shape[0] += n_more
            return _random(shape, s.dtype, generator, n_rows).to(s.device)

        values.append(pytree.tree_map_only(Spec, make, spec))
    return values


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator, n_rows: int | None) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).to(
            dtype
        )
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    if n_rows is not None:
        return torch.randint(0, n_rows, shape, generator=generator).to(dtype)
    value = torch.randint(0, 2, shape, generator=generator)
    if shape and shape[-1] > 0:
        value[..., 0] = 1
    return value.to(dtype)


def _batch_size(specs: list[Any]) -> int | None:
    sizes = [s.shape[0] for s in pytree.tree_leaves(specs) if isinstance(s, Spec) and s.shape]
    return sizes[0] if sizes else None


def _table_rows(gm: fx.GraphModule, placeholder: fx.Node) -> int | None:
    """Rows of the smallest embedding whose index comes from the placeholder."""
    reached, rows = {placeholder}, []
    for node in gm.graph.nodes:
        if not reached.intersection(node.all_input_nodes):
            continue
        table = _table(gm, node, reached)
        if table is None:
            reached.add(node)
        else:
            rows.append(int(table.shape[0]))
    return min(rows, default=None)


def _table(gm: fx.GraphModule, node: fx.Node, reached: set[fx.Node]) -> Tensor | None:
    if node.op == "call_module":
        module = get_attr(gm, str(node.target))
        return module.weight if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
    if node.target not in _EMBEDDINGS:
        return None
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            found = get_attr(gm, str(source.target))
            return found if isinstance(found, Tensor) else None
    return None
