"""Remove nodes that nobody reads and that do nothing else."""

from __future__ import annotations

from torch import fx

from srfx.ir.attrs import drop_unused_attributes, get_attr
from srfx.ir.effects import is_mutating, is_random, is_torch_function, op_name


def is_removable(node: fx.Node) -> bool:
    """Whether a node without readers can go: no write, no random draw, no user code or hook in it.

    torch.fx's own ``eliminate_dead_code`` is not used: it takes methods such as ``add_`` for pure.
    """
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "get_attr":
        return True
    if is_mutating(node) or is_random(node):
        return False
    if node.op == "call_module":
        assert node.graph.owning_module is not None
        module = get_attr(node.graph.owning_module, str(node.target))
        is_torch = type(module).__module__.startswith("torch.nn.modules")
        return is_torch and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    if node.op == "call_method":
        return True
    return (
        is_torch_function(node.target)
        and "assert" not in op_name(node)
        and not op_name(node).startswith("sym_c")
    )


def remove_dead_nodes(gm: fx.GraphModule) -> bool:
    """Erase all dead removable nodes and then all attributes nobody reads; whether a node went."""
    n_before = len(gm.graph.nodes)
    for node in reversed(gm.graph.nodes):
        if not node.users and is_removable(node):
            gm.graph.erase_node(node)
    drop_unused_attributes(gm)
    return len(gm.graph.nodes) < n_before
