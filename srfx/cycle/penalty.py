"""Penalties that make structure: the norm of everything that would leave together, and plain L1.

    group penalty    sum over groups g of scale[g] * sqrt(sum of squares of g's weights + tiny),  scale[g] = sqrt(size of g)
    L1 penalty       sum of absolute weights

The groups are srfx's own (`srfx.cycle.groups`).  Both take the parameters by name from the module they are called with,
so that they see the tensors that train: under pruning hooks the masked weight, under FSDP2 the gathered one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from srfx.cycle.groups import NO_GROUP, ChannelGroups, channel_groups
from srfx.ir.live import add_to_gradient, live_tensor, parameter

Wanted = Callable[[str], bool]
"""Whether the parameter of this name counts."""


class GroupPenalty:
    """Sum over all groups of the norm of all their weights, times sqrt(their number).

    Args:
        model: what `srfx.minimize` takes; only read, and not kept.  Minimize it first when it has fused
            projections: the analysis takes them apart, and finds them again in a minimized model only.
        example_inputs: as for `srfx.minimize`.
        example_kwargs: as for `srfx.minimize`.
        inputs: whether an input column of the first layers is a group: see `channel_groups`.
        biases: whether added vectors count.  A channel leaves with any bias, so they need not vanish.
        parameters: which parameters count, by name; default all that train.
        tiny: keeps the slope at zero finite; pruning puts groups exactly there, where the slope is then 0.

    Attributes:
        groups: see `ChannelGroups`.
        sizes: number of weights of each group, [n_groups].
        scale: factor of each group, [n_groups]; may be replaced, for example by the FLOPs a channel costs.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> penalty = GroupPenalty(net, torch.zeros(1, 4))
        >>> loss = net(torch.ones(1, 4)).square().sum() + 1e-3 * penalty(net)
        >>> loss.backward()

    Cost: forward and backward read each weight once; no copy of the weights is kept between them.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        example_inputs: Any = None,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        inputs: bool = False,
        biases: bool = False,
        parameters: Wanted | None = None,
        tiny: float = 1e-12,
    ) -> None:
        self.groups: ChannelGroups = channel_groups(
            model, example_inputs, example_kwargs=example_kwargs, inputs=inputs
        )
        if self.groups.replaced:
            warnings.warn(
                f"{len(self.groups.replaced)} parameters are not penalised, since minimize will store them otherwise "
                f"(the first is {self.groups.replaced[0]}): minimize the model before the penalty is made",
                stacklevel=2,
            )
        self.tiny = tiny
        self._layouts: dict[str, list[Tensor]] = {}
        for s in self.groups.slices:
            if (biases or not s.is_bias) and (parameters is None or parameters(s.name)):
                # what belongs to no group is added to one more, which nobody reads
                groups = torch.where(s.groups == NO_GROUP, self.groups.n_groups, s.groups)
                self._layouts.setdefault(s.name, []).append(groups)
        module = model.module() if isinstance(model, ExportedProgram) else model
        counts = [torch.ones_like(live_tensor(module, name), device="cpu") for name in self._layouts]
        self.sizes = _sums(counts, list(self._layouts.values()), self.groups.n_groups)
        self.scale = self.sizes.sqrt()
        self._on: dict[torch.device, list[list[Tensor]]] = {}

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a module with the parameters of the one it was made for; a scalar with a gradient.

        Raises:
            ShapeMismatchError: a parameter is missing or has another shape (the model was minimized since).
        """
        tensors, layouts = self._live(model)
        scale = self.scale.to(tensors[0].device) if tensors else self.scale
        value = _GroupNorms.apply(layouts, scale, self.tiny, *tensors)  # type: ignore[no-untyped-call]
        assert isinstance(value, Tensor)
        return value

    @torch.no_grad()
    def norms(self, model: nn.Module) -> Tensor:
        """The norm of each group, [n_groups]."""
        tensors, layouts = self._live(model)
        return _sums(tensors, layouts, self.groups.n_groups).sqrt()

    @torch.no_grad()
    def add_gradients(
        self, model: nn.Module, strength: float, only: Collection[Tensor] | None = None
    ) -> None:
        """Add ``strength`` times the gradient of the penalty to ``.grad`` in place, where there is a gradient.

        The same as a backward pass of the penalty, for loops that call it once before each optimizer step.

        Args:
            model: as for a call; its parameters must be plain ones or DTensors, not masked by hooks.
            strength: factor.
            only: the parameters that get it (by identity); default all.
        """
        tensors, layouts = self._live(model)
        if not tensors:
            return
        norms = (_sums(tensors, layouts, self.groups.n_groups) + self.tiny).sqrt()
        factors = torch.cat([strength * self.scale.to(norms) / norms, norms.new_zeros(1)])
        chosen = None if only is None else {id(p) for p in only}
        for name, tensor, slices in zip(self._layouts, tensors, layouts, strict=True):
            p = parameter(model, name)
            if p.grad is not None and (chosen is None or id(p) in chosen):
                factor = sum((factors[groups] for groups in slices[1:]), factors[slices[0]])
                add_to_gradient(p, tensor * factor.to(tensor.dtype))

    def _live(self, model: nn.Module) -> tuple[list[Tensor], list[list[Tensor]]]:
        tensors = [
            live_tensor(model, name, tuple(max(n) for n in zip(*(g.shape for g in layouts), strict=True)))
            for name, layouts in self._layouts.items()
        ]
        device = tensors[0].device if tensors else torch.device("cpu")
        if device not in self._on:
            self._on[device] = [[g.to(device) for g in layouts] for layouts in self._layouts.values()]
        return tensors, self._on[device]


class L1Penalty:
    """Sum of the absolute values of all weights that train; added vectors (biases) only on request.

    Args: as for `GroupPenalty`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> torch.equal(L1Penalty(net, torch.zeros(1, 4))(net), net[0].weight.abs().sum() + net[2].weight.abs().sum())
        True
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        example_inputs: Any = None,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        biases: bool = False,
        parameters: Wanted | None = None,
    ) -> None:
        groups = channel_groups(model, example_inputs, example_kwargs=example_kwargs)
        names = [n for n in groups.parameters if biases or n not in groups.biases]
        self.names = [n for n in names if parameters is None or parameters(n)]

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a module with these parameters; a scalar with a gradient."""
        parts = [live_tensor(model, name).abs().sum() for name in self.names]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    @torch.no_grad()
    def add_gradients(
        self, model: nn.Module, strength: float, only: Collection[Tensor] | None = None
    ) -> None:
        """Add ``strength`` times the gradient to ``.grad`` in place; see `GroupPenalty.add_gradients`."""
        chosen = None if only is None else {id(p) for p in only}
        for name in self.names:
            p = parameter(model, name)
            if p.grad is not None and (chosen is None or id(p) in chosen):
                p.grad.add_(p.sign(), alpha=strength)  # of each shard its own


def _sums(tensors: list[Tensor], layouts: list[list[Tensor]], n_groups: int) -> Tensor:
    """Sum of squares of each group, [n_groups], in float32 or better."""
    total: Tensor | None = None
    for tensor, slices in zip(tensors, layouts, strict=True):
        wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
        square = tensor.detach().to(wide).square()
        for groups in slices:
            over = [a for a, n in enumerate(groups.shape) if n == 1 and tensor.shape[a] > 1]
            part = square.sum(over) if over else square
            if total is None:
                total = part.new_zeros(n_groups + 1)
            total.index_add_(0, groups.reshape(-1), part.reshape(-1).to(total.dtype))
    return torch.zeros(n_groups) if total is None else total[:n_groups]


class _GroupNorms(torch.autograd.Function):
    """d/dw sqrt(s) = w / sqrt(s): the gradient of a weight is the weight times the sum of its groups' factors."""

    @staticmethod
    def forward(
        ctx: Any, layouts: list[list[Tensor]], scale: Tensor, tiny: float, *tensors: Tensor
    ) -> Tensor:
        norms = (_sums(list(tensors), layouts, scale.numel()).to(scale.device) + tiny).sqrt()
        ctx.save_for_backward(*tensors)
        ctx.layouts = layouts
        ctx.factors = torch.cat([scale.to(norms) / norms, norms.new_zeros(1)])
        return (norms * scale.to(norms)).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        factors, found = ctx.factors * upstream, []
        for tensor, slices in zip(ctx.saved_tensors, ctx.layouts, strict=True):
            factor = sum((factors[groups] for groups in slices[1:]), factors[slices[0]])
            found.append(tensor * factor.to(tensor.dtype))
        return (None, None, None, *found)
