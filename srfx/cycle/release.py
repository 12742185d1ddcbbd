"""Release: give every exact zero that is left in the weights a small random value, so that it trains again.

Where W is zero:  W' = W + s * std * N(0, 1),  std = root mean square of the tensor's nonzero entries, 0 <= s <= 1.

``s`` is the largest for which the change that was asked for is not exceeded, tensor by tensor:

* with inputs, on these inputs: ||y' - y|| <= noise * ||y|| for the result y of every layer, where a layer is a call that
  reads a released tensor, and y' what it makes of the same operands;
* without, ||W' - W|| <= noise * ||W|| (Frobenius).  For operands with uncorrelated channels of equal power, that is the
  ratio of the expected squares of change and result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srfx.errors import CycleError
from srfx.ir.attrs import get_attr
from srfx.ir.capture import capture
from srfx.ir.masks import find_masks
from srfx.ir.shapes import hint_inputs
from srfx.ir.surroundings import plain_torch

MAX_ROUNDS = 20
"""How often the scales are reduced before a tensor that still exceeds its share is not released at all."""


def release(
    model: nn.Module,
    noise: float = 0.05,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    parameters: Callable[[str], bool] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Turn the exact zeros of a model's weights into small noise; nothing else changes.

    Args:
        model: usually one that `srfx.minimize` returned.  Not changed unless ``inplace``.
        noise: allowed relative change of each layer's result, at least 0; see the module's docstring.
        example_inputs: positional arguments to measure on, real data; None bounds the weights' norms instead.
        example_kwargs: keyword arguments to measure on.
        seed: of the noise.  The same seed gives the same values on every device.
        parameters: which tensors to release, by name; default every trainable float parameter with at least two
            axes.  Biases, norm scales and buffers stay as they are.
        inplace: write into the model's own parameters and return it (an optimizer keeps its hold on them).

    Returns:
        A copy with the same graph, names and training flag, or the model itself.

    Raises:
        CycleError: masks are still on the weights (hooks or parametrizations): minimize the model first.
        CaptureError: the model cannot be turned into a graph (only with inputs).
        ValueError: ``noise`` is negative or not a number.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = net.weight[0].zero_()
        >>> free = release(net, noise=0.1)
        >>> int((free.weight == 0).sum()), torch.equal(free.weight[1], net.weight[1])
        (0, True)

    Cost: without inputs one pass over the weights; with inputs two to four forward passes.
    """
    if not noise >= 0:
        raise ValueError(f"noise is a relative change, at least 0; got {noise}")
    masks = find_masks(model)
    if masks.edits or masks.refusals:
        where = (masks.edits or masks.refusals)[0].node or "the model itself"
        raise CycleError(f"the weights of {where} are computed from a mask: minimize the model, then release")
    if not inplace:
        model = copy.deepcopy(model)
    with plain_torch(), torch.no_grad():
        chosen = _chosen(model, parameters)
        deltas = _draw(chosen, seed)
        if example_inputs is None and example_kwargs is None:
            scales = _by_norm(chosen, deltas, noise)
        else:
            scales = _by_inputs(model, deltas, noise, example_inputs, example_kwargs)
        for name, delta in deltas.items():
            chosen[name].add_(delta * scales[name])
    return model


def _chosen(model: nn.Module, parameters: Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    """The tensors to release, shared ones once."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point() and (parameters(name) if parameters else p.requires_grad and p.dim() >= 2)
    }


def _draw(chosen: dict[str, nn.Parameter], seed: int) -> dict[str, Tensor]:
    """Noise at the zeros of each tensor that has some, at s = 1; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in chosen.items():
        zeros = (p == 0).flatten()
        n_zeros, n_others = int(zeros.sum()), int((~zeros).sum())
        if n_zeros and n_others:
            std = p.double().square().sum().div(n_others).sqrt()
            drawn = torch.randn(n_zeros, generator=generator, dtype=torch.float64) * std.cpu()
            delta = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            delta[zeros] = drawn.to(delta)
            found[name] = delta.view(p.shape)
    return found


def _by_norm(chosen: dict[str, nn.Parameter], deltas: dict[str, Tensor], noise: float) -> dict[str, float]:
    scales = {}
    for name, delta in deltas.items():
        ratio = float(delta.double().norm() / chosen[name].double().norm())
        scales[name] = min(1.0, _within(noise, delta) / ratio)
    return scales


def _within(noise: float, like: Tensor) -> float:
    """A little less, so that rounding the scaled values does not exceed the bound."""
    return noise * (1 - 4 * torch.finfo(like.dtype).eps)


def _by_inputs(
    model: nn.Module, deltas: dict[str, Tensor], noise: float, args: Any, kwargs: Mapping[str, Any] | None
) -> dict[str, float]:
    """Scales are reduced until no layer changes by more than ``noise``; most layers are linear in their weight."""
    captured = capture(model, args, kwargs)
    gm = copy.deepcopy(captured.graph_module)  # statistics that the forward pass updates are its own
    for module in gm.modules():
        module.training = False
    positional = tuple(args) if isinstance(args, (tuple, list)) else () if args is None else (args,)
    inputs = hint_inputs(gm, positional, kwargs or {})
    names = _names_in(gm, model, deltas)
    scales = dict.fromkeys(deltas, 1.0 if noise else 0.0)
    for _ in range(MAX_ROUNDS):
        shifts = {path: deltas[name] * scales[name] for path, name in names.items()}
        changes = LayerChanges(gm, shifts).measure(inputs)
        exceeding = [(paths, change) for paths, change in changes.values() if change > noise]
        if not exceeding:
            return scales
        factor = dict.fromkeys(deltas, 1.0)
        for paths, change in exceeding:
            for path in paths:
                factor[names[path]] = min(factor[names[path]], 0.999 * noise / change)
        scales = {name: scale * factor[name] for name, scale in scales.items()}
    for paths, _ in exceeding:
        for path in paths:
            scales[names[path]] = 0.0
    return scales


def _names_in(gm: fx.GraphModule, model: nn.Module, deltas: dict[str, Tensor]) -> dict[str, str]:
    """Every path under which the graph holds a released tensor -> its name in ``deltas``."""
    first: dict[int, str] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, p in every.items():
        first.setdefault(id(p), name)
    paths = [name for name, _ in gm.named_parameters(remove_duplicate=False)]
    return {
        path: first[id(every[path])] for path in paths if path in every and first[id(every[path])] in deltas
    }


class LayerChanges(fx.Interpreter):
    """Runs a graph, and beside it every call that reads a shifted tensor, on the same operands.

    Args:
        gm: the graph.
        shifts: what is added to its tensors, by path.
    """

    def __init__(self, gm: fx.GraphModule, shifts: dict[str, Tensor]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.shifts = shifts
        self.shifted: dict[fx.Node, Any] = {}  # values made from shifted tensors alone
        self.paths: dict[fx.Node, frozenset[str]] = {}  # the tensors they are made from
        self.reached: set[fx.Node] = set()  # by an input
        self.changes: dict[str, tuple[frozenset[str], float]] = {}

    def measure(self, inputs: list[Any]) -> dict[str, tuple[frozenset[str], float]]:
        """For each layer, by node name: the shifted tensors it reads, and ||y' - y|| / ||y||."""
        self.run(*inputs, enable_io_processing=False)
        return self.changes

    def run_node(self, n: fx.Node) -> Any:
        """Run it, and again with what is shifted."""
        value = super().run_node(n)
        if n.op == "placeholder" or any(i in self.reached for i in n.all_input_nodes):
            self.reached.add(n)
        if n.op == "get_attr" and n.target in self.shifts:
            self.shifted[n], self.paths[n] = value + self.shifts[str(n.target)], frozenset([str(n.target)])
        elif n.op.startswith("call"):
            self._call(n, value)
        return value

    def _call(self, n: fx.Node, value: Any) -> None:
        operands = [i for i in n.all_input_nodes if i in self.shifted]
        paths = frozenset().union(*(self.paths[i] for i in operands))
        own: dict[str, Tensor] = {}
        if n.op == "call_module":
            prefix = f"{n.target}."
            own = {p[len(prefix) :]: s for p, s in self.shifts.items() if p.startswith(prefix)}
            paths |= {prefix + p for p in own}
        if not paths:
            return
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda i: self.shifted.get(i, self.env.get(i)))
        if n.op == "call_module":
            module = get_attr(self.module, str(n.target))
            tensors = {p: get_attr(module, p) + s for p, s in own.items()}
            result = torch.func.functional_call(module, tensors, args, kwargs)
        else:
            result = getattr(self, n.op)(n.target, args, kwargs)
        if n in self.reached:
            self.changes[n.name] = paths, _relative_change(value, result)
        else:
            self.shifted[n], self.paths[n] = result, paths


def _relative_change(before: Any, after: Any) -> float:
    """||after - before|| / ||before|| over all float tensors of a result; inf where it was zero and is not."""
    change = size = 0.0
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            change += float((b.double() - a.double()).square().sum())
            size += float(a.double().square().sum())
    if not change:
        return 0.0
    return (change / size) ** 0.5 if size else float("inf")
