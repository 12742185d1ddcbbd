"""``torch.compile(model, backend="srfx")``: freeze the weights, minimize, hand the rest to another backend.

Registered in setup.cfg under the entry point ``torch_dynamo_backends``, so the name works without an import.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from srfx.errors import SrfxError
from srfx.ir.aliases import AliasClasses, written_operand
from srfx.ir.attrs import free_path, set_attr
from srfx.ir.clone import clone_graph
from srfx.ir.effects import is_mutating
from srfx.minimize import minimize

Runner = Callable[..., Any]


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Runner:
    """A Dynamo backend that runs the minimized graph with its weights frozen.

    Parameters and buffers that the graph only reads become constants of the compiled function.  When one of them is
    written or replaced later, the call notices and runs the graph as it was traced, with a warning, until
    ``torch.compiler.reset()``; a frozen value is never used out of date.  (A write through ``tensor.data`` or from
    outside torch leaves no trace and is not noticed.)  With gradients on nothing is frozen: the graph goes to the
    inner backend as it is.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs, parameters among them.
        kwargs: ``options`` of torch.compile: ``{"backend": "inductor"}`` names the backend that compiles the small
            graph (default inductor); all other entries go to `srfx.minimize`.  ``mode`` goes to the inner backend.

    Returns:
        A callable with the signature of ``gm``.

    Raises:
        ValueError: ``options`` hold an argument that minimize does not take.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     fast = torch.compile(net, backend=backend, options={"backend": "eager"})
        ...     fast(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """
    options = dict(kwargs.pop("options", None) or {})
    inner = _inner(options.pop("backend", "inductor"), kwargs)
    if torch.is_grad_enabled():
        warnings.warn(
            "backend 'srfx' freezes weights, which training cannot use: this graph is compiled as it is; "
            "call the compiled model under torch.no_grad() to have it minimized",
            stacklevel=2,
        )
        return inner(gm, list(example_inputs))
    held = frozen_inputs(gm, example_inputs)
    given = [x for i, x in enumerate(example_inputs) if i not in held]
    try:
        small = minimize(freeze(gm, held), tuple(map(_hint, given)), **options)
    except TypeError as error:
        raise ValueError(f"options of backend 'srfx' are 'backend' and those of minimize: {error}") from error
    except SrfxError as error:
        warnings.warn(f"backend 'srfx' compiles this graph as it is: {error}", stacklevel=2)
        return inner(gm, list(example_inputs))
    return _Frozen(gm, held, inner(small, given))


def frozen_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, Tensor]:
    """Positions of the inputs that are parameters or buffers of the user's modules and that the graph only reads."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = _written(gm)
    return {
        i: value
        for i, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
        if isinstance(value, Tensor) and node not in written and _is_stored(node, value)
    }


def freeze(gm: fx.GraphModule, held: Mapping[int, Tensor]) -> fx.GraphModule:
    """The graph with these inputs read from attributes instead; tensors are shared, ``gm`` is left as it is."""
    frozen = fx.GraphModule(gm, clone_graph(gm.graph))
    for i, node in enumerate(frozen.graph.find_nodes(op="placeholder")):
        if i not in held:
            continue
        path = free_path(frozen, node.name)
        set_attr(frozen, path, held[i])
        with frozen.graph.inserting_before(node):
            node.replace_all_uses_with(frozen.graph.get_attr(path))
        frozen.graph.erase_node(node)
    frozen.recompile()
    return frozen


class _Frozen:
    """The compiled small graph, and a watch over the tensors it was made from."""

    def __init__(self, original: fx.GraphModule, held: dict[int, Tensor], small: Runner) -> None:
        self.original = original
        self.held = [(i, tensor, tensor._version) for i, tensor in held.items()]
        self.small = small
        self.has_warned = False

    def __call__(self, *args: Any) -> Any:
        if any(args[i] is not tensor or tensor._version != version for i, tensor, version in self.held):
            return self._run_original(args)
        taken = {i for i, _, _ in self.held}
        return self.small(*(x for i, x in enumerate(args) if i not in taken))

    def _run_original(self, args: Sequence[Any]) -> Any:
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                "weights changed since backend 'srfx' froze them: the graph runs as it was traced; "
                "call torch.compiler.reset() to minimize the new weights",
                stacklevel=3,
            )
        return self.original(*args)


def _inner(name: str | Runner, kwargs: dict[str, Any]) -> Callable[..., Runner]:
    found: Callable[..., Runner] = torch._dynamo.lookup_backend(name) if isinstance(name, str) else name
    mode = kwargs.pop("mode", None)
    if mode in (None, "default"):
        return found
    if name != "inductor":
        raise ValueError(f"mode={mode!r} is a setting of inductor; the backend here is {name!r}")
    config = torch._inductor.list_mode_options(mode)

    def compiled(gm: fx.GraphModule, inputs: list[Any]) -> Runner:
        return found(gm, inputs, config_patches=config)

    return compiled


def _written(gm: fx.GraphModule) -> set[fx.Node]:
    """Everything that shares storage with what the graph writes, running statistics among it."""
    writers = [node for node in gm.graph.nodes if is_mutating(node)]
    classes = AliasClasses(gm.graph)
    found: set[fx.Node] = set()
    for writer in writers:
        operand = written_operand(writer)
        for source in [operand] if operand is not None else writer.all_input_nodes:
            found.update(classes.members(source))
    return found


def _is_stored(node: fx.Node, value: Tensor) -> bool:
    """Whether Dynamo found the tensor on a module; it marks those as static addresses."""
    return isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def _hint(value: Any) -> Any:
    """A concrete value in place of a symbolic one; reading it must not pin the symbol (a guard would)."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return pytree.tree_map_only(Tensor, _concrete, value)


def _concrete(tensor: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty([_hint(n) for n in tensor.shape], dtype=tensor.dtype, device=tensor.device)
