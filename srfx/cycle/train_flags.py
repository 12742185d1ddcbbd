"""Dropout that follows the training flag, on graphs of torch.export, which freeze it."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from srfx.errors import CycleError
from srfx.ir.attrs import free_path, set_attr
from srfx.ir.capture import capture

aten = torch.ops.aten

_ATTENTION = (aten.scaled_dot_product_attention.default,)


def live_dropout(model: fx.GraphModule | ExportedProgram) -> fx.GraphModule:
    """Replace the dropout calls of an exported graph by ``nn.Dropout`` modules, so that ``train`` and ``eval`` work.

    Before: aten.dropout(x, 0.1, True)      After: a call of nn.Dropout(0.1)

    Args:
        model: an ExportedProgram or its module, exported in training mode (in eval mode there is no dropout left
            to see).

    Returns:
        A graph that shares the parameters and buffers of the model, in training mode, without export guards.

    Raises:
        CycleError: attention with a dropout of its own, which cannot be switched off later.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
        >>> graph = live_dropout(torch.export.export(net, (torch.ones(1, 2),)))
        >>> x = torch.ones(1, 2)
        >>> torch.equal(graph.eval()(x), net.eval()(x))
        True
    """
    gm = capture(model).graph_module
    for node in list(gm.graph.nodes):
        if node.target in _ATTENTION and _dropout_of(node):
            raise CycleError(
                f"{node.name}: attention drops out {_dropout_of(node)} in the exported graph, and always will: "
                "set the model's attention dropout to 0 before it is exported"
            )
        if node.target is aten.dropout.default:
            path = free_path(gm, str(node.name))
            set_attr(gm, path, nn.Dropout(float(node.args[1])))
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(path, (node.args[0],))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    gm.train()
    return gm


def _dropout_of(node: fx.Node) -> float:
    found = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return float(found) if isinstance(found, (int, float)) else 1.0
