"""Other forms of one model that have to be minimized alike."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from srfx.ir.clone import clone_structure
from srfx.ir.effects import is_mutating
from srfx.testing.programs import Program, library


def renamed(program: Program) -> Program:
    """Every attribute of the model has another name, with another order of names."""
    names = sorted(set(re.findall(r"^        self\.(\w+) =|register_buffer\('(\w+)'", program.source, re.M)))
    flat = sorted({name for pair in names for name in pair if name})
    source = program.source
    for i, name in enumerate(flat):
        source = re.sub(
            rf"(?<=self\.){name}\b|(?<=model\.){name}\b|(?<='){name}(?=')", f"{'zyxw'[i % 4]}{i}_new", source
        )
    return Program(program.choices, source)


def reordered(gm: fx.GraphModule, seed: int) -> fx.GraphModule:
    """The same graph with its nodes in another order that respects what reads what; effects stay in order."""
    found = clone_structure(gm)
    assert isinstance(found, fx.GraphModule)
    nodes = list(found.graph.nodes)
    waiting = {n: set(n.all_input_nodes) for n in nodes}
    fixed = [n for n in nodes if n.op in ("placeholder", "output")]
    for before, after in itertools.pairwise(fixed):
        waiting[after].add(before)
    writers = {n for n in nodes if is_mutating(n)}
    for i, node in enumerate(nodes):  # whoever stands before a write stays before it
        for other in nodes[i + 1 :]:
            if node in writers or other in writers:
                waiting[other].add(node)
    waiting[nodes[-1]].update(nodes[:-1])
    chance, order = random.Random(seed), list[fx.Node]()
    while waiting:
        ready = [n for n in nodes if n in waiting and not waiting[n]]
        chosen = chance.choice(ready)
        order.append(chosen)
        del waiting[chosen]
        for needs in waiting.values():
            needs.discard(chosen)
    for node in order:
        found.graph._root.prepend(node)
    found.graph.lint()
    found.recompile()
    return found


def hooked(model: nn.Module) -> nn.Module:
    """The zeros of every layer's weight come from a mask of torch.nn.utils.prune over a dense weight; in place."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv1d)) and isinstance(weight, nn.Parameter):
            mask = (weight != 0).to(weight)
            with torch.no_grad():
                weight.add_(1 - mask)
            prune.custom_from_mask(module, "weight", mask)
    return model


def interrupted(gm: fx.GraphModule, example: tuple[Any, ...], seed: int) -> fx.GraphModule:
    """An op that nobody knows behind one of the nodes that yield a float tensor."""
    found = clone_structure(gm)
    assert isinstance(found, fx.GraphModule)
    floats = _Floats(found)
    with torch.no_grad():
        floats.run(*example)
    if floats.names:
        node = random.Random(seed).choice([n for n in found.graph.nodes if n.name in floats.names])
        users = list(node.users)
        with found.graph.inserting_after(node):
            new = found.graph.call_function(library.odd, (node,))
        for user in users:
            user.replace_input_with(node, new)
        found.recompile()
    return found


class _Floats(fx.Interpreter):
    """Names of nodes behind which an op can be put."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.names: dict[str, None] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run, and note the node."""
        value = super().run_node(n)
        is_written = is_mutating(n) or any(is_mutating(u) for u in n.users)
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and n.op.startswith("call")
            and not is_written
        ):
            self.names[n.name] = None
        return value
