"""What a minimized network would be if somebody had built it dense at its widths: nothing in it that srfx added.

Plain norms in place of compensated ones, readers without the columns for their statistics, outputs not filled up.
It computes something else; it is there to be timed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srfx
from srfx.nn import CompensatedLayerNorm
from srfx.nn.functional import compensated_layer_norm
from srfx.nn.selection import add_at, spread

_READERS = (F.linear, torch.ops.aten.linear.default)


@torch.no_grad()
def native(small: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """A plain network of the widths of ``small``; ``x`` tells which widths arrive where."""
    gm = copy.deepcopy(small)
    added = {t.name for t in srfx.plan(small).tensors if t.status == "created"}
    run = fx.Interpreter(gm, garbage_collect_values=False)
    run.args_iter = iter([x])
    for node in list(gm.graph.nodes):
        arriving = run.env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op == "call_module":
            gm.set_submodule(node.target, _plain(gm.get_submodule(node.target), arriving))
        elif node.op == "call_function":
            if (through := _passed_through(node, added)) is not None:
                node.replace_all_uses_with(through)
                continue
            _simplify(node, run)
            if node.target in _READERS:
                _cut(gm, node, run)
        run.env[node] = run.run_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _passed_through(node: fx.Node, added: set[str]) -> fx.Node | None:
    """The value that srfx fills up to an output here."""
    is_ours = any(n.op == "get_attr" and n.target in added for n in node.all_input_nodes)
    values = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if is_ours and node.target in (torch.where, torch.index_select, spread, add_at):
        assert len(values) == 1, node.format_node()
        return values[0]
    return None


class Slice(nn.Module):
    """The first channels: a norm that somebody builds has no choice of those it writes."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.n_channels = n_channels

    def forward(self, x: Tensor) -> Tensor:
        """Channels are the last axis."""
        return x[..., : self.n_channels]


def _norm_and_slice(x: Tensor, shape: list[int], n_channels: int, eps: float) -> Tensor:
    return F.layer_norm(x, shape, eps=eps)[..., :n_channels]


def _plain(module: nn.Module, x: Any) -> nn.Module:
    dtype = torch.float32
    if isinstance(module, CompensatedLayerNorm):
        norm = nn.LayerNorm(module.normalized_shape, eps=module.eps, dtype=dtype)
        return norm if module.outputs is None else nn.Sequential(norm, Slice(len(module.outputs)))
    if isinstance(module, nn.Linear) and x.shape[-1] != module.in_features:
        return nn.Linear(x.shape[-1], module.out_features, module.bias is not None, dtype=dtype)
    if isinstance(module, nn.Conv2d) and module.groups == 1 and x.shape[1] != module.in_channels:
        settings: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dtype": dtype}
        settings["bias"] = module.bias is not None
        return nn.Conv2d(x.shape[1], module.out_channels, module.kernel_size, **settings)  # type: ignore[arg-type]
    assert not type(module).__module__.startswith("srfx"), f"say here what the plain form of {module} is"
    return module


def _simplify(node: fx.Node, run: fx.Interpreter) -> None:
    """A compensated norm in functional form becomes torch's."""
    if node.target is compensated_layer_norm:
        named = {key: node.kwargs[key] for key in ("weight", "bias", "eps") if key in node.kwargs}
        outputs = node.kwargs.get("outputs")
        if outputs is None:
            node.target, node.args, node.kwargs = F.layer_norm, node.args[:2], named
            return
        assert isinstance(outputs, fx.Node)
        eps = named.get("eps", 1e-5)
        node.target, node.args, node.kwargs = (
            _norm_and_slice,
            (*node.args[:2], run.env[outputs].numel(), eps),
            {},
        )
        return
    ours = getattr(node.target, "__module__", "") or ""
    assert not ours.startswith("srfx"), f"say here what the plain form of {node.format_node()} is"


def _cut(gm: fx.GraphModule, node: fx.Node, run: fx.Interpreter) -> None:
    """A linear function's weight loses the columns for which nothing arrives any more."""
    value, held = node.args[:2]
    assert isinstance(value, fx.Node)
    assert isinstance(held, fx.Node)
    weight, width = run.env[held], run.env[value].shape[-1]
    if weight.shape[-1] != width:
        owner, _, last = str(held.target).rpartition(".")
        run.env[held] = gm.get_submodule(owner)._parameters[last] = nn.Parameter(weight[:, :width].clone())
