"""The model that a file was made from, as far as loading needs it: its functions, its modules, and whether it fits."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from srfx.errors import FileError
from srfx.files.graphs import custom_name
from srfx.ir.capture import Captured, capture
from srfx.ir.shapes import SharedHints, survey
from srfx.minimize import canonicalise
from srfx.record.record import Record, TensorSpec
from srfx.record.recorder import inventory
from srfx.verify import call_arguments

MAX_NAMED = 5
"""How many differences an error names."""


class Original:
    """What the user gave to `load` as model.

    Args:
        given: a module, an exported program, or a function that makes one of them.
        record: the record in the file, for the shapes of the inputs.

    Raises:
        FileError: it is something else.
    """

    def __init__(self, given: Any, record: Record | None) -> None:
        if not isinstance(given, (nn.Module, ExportedProgram)) and callable(given):
            given = given()
        if isinstance(given, ExportedProgram):
            given = given.module()
        if not isinstance(given, nn.Module):
            raise FileError(
                f"model has to be an nn.Module or a function that returns one, this is a {type(given).__name__}"
            )
        self.module: nn.Module = given
        self.record = record
        self.graph: fx.Graph | None = None

    def functions(self, graph: fx.Graph) -> dict[str, Any]:
        """The functions that its graph calls, by `custom_name`.

        Args:
            graph: the graph in the file as far as it has been read: its inputs and their nesting.
        """
        self.graph = graph
        called = self.captured.graph_module.graph.nodes
        return {custom_name(node.target): node.target for node in called if node.op == "call_function"}

    @cached_property
    def captured(self) -> Captured:
        """Its graph; a plain module is traced, at the input shapes of the record."""
        if self.record is None or self.graph is None:
            return capture(self.module)
        values = pytree.tree_map_only(TensorSpec, _zeros, self.record.inputs)
        args, kwargs = call_arguments(_inputs_only(self.graph), values)
        return capture(self.module, args, kwargs)

    def check(self, gm: fx.GraphModule) -> None:
        """Compare its tensors with those that the plan was made for.

        Raises:
            FileError: others, or of other shapes.
        """
        if self.record is None:
            return
        self.graph = gm.graph
        own = self.captured.graph_module
        known = survey(own, self.captured.inputs)
        canonicalise(own, SharedHints(known))
        found = {name: t.shape for t in inventory(own).values() for name in (t.name, *t.aliases)}
        differences = []
        for tensor in self.record.plan.tensors:
            if tensor.status not in ("created", "unread"):
                shapes = [found.pop(name, None) for name in (tensor.name, *tensor.aliases)]
                if tensor.shape not in shapes:
                    got = "missing" if shapes[0] is None else f"{list(shapes[0])}"
                    differences.append(f"{tensor.name} is {got}, the file was made for {list(tensor.shape)}")
        differences += [f"{name} is unknown to the file" for name in found]
        if differences:
            more = len(differences) - MAX_NAMED
            text = "; ".join(differences[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
            raise FileError(f"the given model is not the one the file was made from: {text}")


def _zeros(spec: TensorSpec) -> torch.Tensor:
    return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)


def _inputs_only(graph: fx.Graph) -> fx.GraphModule:
    inputs = fx.Graph()
    for node in graph.find_nodes(op="placeholder"):
        inputs.node_copy(node)
    inputs.output(None)
    inputs._codegen = graph._codegen
    return fx.GraphModule(nn.Module(), inputs)
