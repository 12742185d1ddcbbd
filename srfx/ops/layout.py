"""Views that lean on the strides of what they view (theory: Lemma A5).

``view`` asks for strides that fit, ``reshape`` does not.  Which strides a result has is no part of its value: scaled dot
product attention lays it out by tokens or by heads, as the kernel for its widths does.  A view of it that was valid at
the original widths (torch.export leaves out a ``contiguous`` that did nothing there) may not be so at the new ones.
"""

from __future__ import annotations

import torch
from torch import fx

from srfx.ir.edits import ViewAnyLayout
from srfx.ir.program import Program
from srfx.ops.elementwise import Elementwise
from srfx.ops.movement import Movement
from srfx.ops.registry import rule_of

aten = torch.ops.aten


def loosened_views(node: fx.Node, program: Program) -> list[ViewAnyLayout]:
    """An edit for each view that takes its strides from ``node``, through movement and elementwise ops."""
    stack, seen, found = [node], {node}, list[ViewAnyLayout]()
    while stack:
        for user in stack.pop().users:
            if user in seen or not user.op.startswith("call") or not program.is_tensor(user):
                continue
            if not isinstance(rule_of(user, program.modules), (Elementwise, Movement)):
                continue
            seen.add(user)
            stack.append(user)
            if (user.target == "view" and not _is_of_dtype(user)) or user.target is aten.view.default:
                found.append(ViewAnyLayout(user.name))
    return found


def _is_of_dtype(view: fx.Node) -> bool:
    """``x.view(torch.int32)`` reads the bits as another type."""
    return bool(view.kwargs) or any(isinstance(a, torch.dtype) for a in view.args)
