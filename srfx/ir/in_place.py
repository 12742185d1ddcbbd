"""Which calls were in place before they were made functional, so that they can be in place again.

The mark is on the node, as what the user wrote is: it goes where fx copies a node, and says of which call it is, so
that on any other it means nothing.  Where it gets lost, a call stays functional.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from srfx.ir.attrs import get_attr
from srfx.ir.call import write_argument

KEY = "srfx_in_place"


def make_functional(node: fx.Node, target: Any) -> None:
    """Turn an in-place call into the functional one of the same arguments, and mark it."""
    node.args, node.kwargs = functional_arguments(node, target)
    mark(node, target)
    node.target = target


def functional_arguments(node: fx.Node, target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which ``target``, which may be the same function, does not write."""
    args, kwargs = node.args, dict(node.kwargs)
    if target is node.target:  # a function of torch.nn.functional with an inplace argument
        kwargs.pop("inplace", None)
        position = place_of_inplace(target)
        if len(args) > position:
            args = (*args[:position], False, *args[position + 1 :])
    return args, kwargs


def mark(node: fx.Node, functional: Any) -> None:
    """Remember that the call was in place while its target is ``functional``."""
    node.meta[KEY] = (functional, node.target)


def was_in_place(node: fx.Node) -> bool:
    """Whether this call was in place, and is the same op still."""
    found = node.meta.get(KEY)
    return found is not None and found[0] == node.target


def make_in_place(gm: fx.GraphModule, node: fx.Node) -> None:
    """The inverse of `make_functional`; of a module, for all its calls."""
    if node.op == "call_module":
        module = get_attr(gm, str(node.target))
        assert isinstance(module, nn.Module)
        module.inplace = True  # type: ignore[assignment]
    elif node.meta[KEY][1] is node.target:
        names = tuple(inspect.signature(node.target).parameters)
        write_argument(node, names, "inplace", True)
    else:
        node.target = node.meta[KEY][1]


def forget_in_place(graph: fx.Graph) -> None:
    """Remove all marks."""
    for node in graph.nodes:
        node.meta.pop(KEY, None)


def place_of_inplace(target: Any) -> int:
    """Where a function takes ``inplace`` as an argument by position."""
    return list(inspect.signature(target).parameters).index("inplace")
