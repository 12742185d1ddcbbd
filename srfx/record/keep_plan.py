"""What was kept of every tensor, axis by axis, as plain data that goes to JSON and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srfx.errors import PlanError, UnknownChannelError
from srfx.record.carry import carry_optimizer

VERSION = 1
"""Version of the JSON form; a reader refuses any other."""


Resize = Callable[["KeepPlan", nn.Module, nn.Module | None, Any, Any], nn.Module]
"""Brings a plan into a user's own module, given the small one, inputs and keyword arguments; `srfx.apply` stands above
this layer and hands it down."""

_RESIZE: list[Resize] = []


def resizes_by(function: Resize) -> Resize:
    """Declare what `KeepPlan.apply_` calls."""
    _RESIZE[:] = [function]
    return function


@dataclass(frozen=True)
class AxisCut:
    """One selection along one axis of a tensor.

    Attributes:
        axis: which axis.
        size: its length before this cut.
        kept: the positions that stay, in their new order.
        layout: shape of ``kept``: ``(n,)``, or the tensor's rank with 1 where rows do not differ (the heads
            of an attention layer may keep different channels, equally many each); ``kept`` is then in
            row-major order.
    """

    axis: int
    size: int
    kept: tuple[int, ...]
    layout: tuple[int, ...]


@dataclass(frozen=True)
class TensorPlan:
    """One parameter, buffer or constant, under the name it has in the source (masks baked).

    Attributes:
        name: its first name.
        aliases: its other names, when it is tied.
        role: ``parameter`` or ``buffer``.
        dtype: for example ``float32``.
        status: ``kept`` (maybe cut), ``removed``, ``created`` (by minimize), ``unread`` (no node reads it, so
            it is not part of the result).
        shape: before; for a created tensor the shape it has.
        kept_shape: after; None when it is gone.
        cuts: selections to apply one after the other; none when every channel stays.
        origin: for a created tensor that is a copy of a tensor of the source, whose ``cuts`` it has: its name.
    """

    name: str
    aliases: tuple[str, ...]
    role: str
    dtype: str
    status: str
    shape: tuple[int, ...]
    kept_shape: tuple[int, ...] | None
    cuts: tuple[AxisCut, ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class RefusalNote:
    """A site that was not taken, by the pass that met it.

    Attributes:
        node: name of the node (or of the parameter) in the captured graph.
        reason: name of a member of `srfx.ir.plan.Reason`; ``message`` is its text.
        detail: what the pass adds, for an unknown op its name.
        n_channels: channels (classes of tied ones) that had to stay because of it, as far as is known.
        source: name of the pass.
    """

    node: str
    reason: str
    message: str
    detail: str = ""
    n_channels: int = 0
    source: str = ""


@dataclass(frozen=True)
class KeepPlan:
    """Everything minimize decided, deterministic for one model and one set of options.

    Attributes:
        tensors: every tensor of the source, then the created ones.
        removed_nodes: nodes of the captured graph that the result no longer has.
        added_nodes: nodes that only the result has.
        refusals: see `RefusalNote`.
        options: the arguments of minimize that matter.
        graph: digest of the captured graph (ops, operands, shapes of its tensors), to tell whether a plan
            fits.
        version: see `VERSION`.

    Example:
        >>> cut = AxisCut(axis=0, size=3, kept=(2,), layout=(1,))
        >>> weight = TensorPlan("fc.weight", (), "parameter", "float32", "kept", (3, 2), (1, 2), (cut,))
        >>> plan = KeepPlan((weight,))
        >>> plan.kept("fc.weight", 0).tolist(), plan.kept("fc.weight", 1).tolist()
        ([2], [0, 1])
        >>> KeepPlan.from_json(plan.to_json()) == plan
        True
    """

    tensors: tuple[TensorPlan, ...] = ()
    removed_nodes: tuple[str, ...] = ()
    added_nodes: tuple[str, ...] = ()
    refusals: tuple[RefusalNote, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    graph: str = ""
    version: int = VERSION

    def tensor(self, name: str) -> TensorPlan:
        """The plan of one tensor, by any of its names.

        Raises:
            UnknownChannelError: no tensor has this name.
        """
        for found in self.tensors:
            if name == found.name or name in found.aliases:
                return found
        raise UnknownChannelError(f"the plan has no tensor named {name!r}")

    def kept(self, name: str, axis: int) -> Tensor:
        """Positions of the source that stay along an axis.

        Returns:
            Long tensor [n]; a layout tensor where rows differ (see `AxisCut`); empty when the tensor is gone.

        Raises:
            UnknownChannelError: no such tensor or axis.
        """
        found = self.tensor(name)
        if not -len(found.shape) <= axis < len(found.shape):
            raise UnknownChannelError(f"{name} has {len(found.shape)} axes, there is no axis {axis}")
        axis %= len(found.shape)
        if found.kept_shape is None:
            return torch.empty(0, dtype=torch.long)
        positions = torch.arange(found.shape[axis])
        for cut in found.cuts:
            if cut.axis == axis:
                index = torch.tensor(cut.kept, dtype=torch.long).view(cut.layout)
                positions = positions[index] if positions.dim() == 1 else positions.gather(axis, index)
        return positions

    def apply_to_optimizer(self, optimizer: Optimizer, before: nn.Module, after: nn.Module) -> None:
        """Hand an optimizer of the model that was minimized over to the result, in place.

        Moments are cut by the plan; hyperparameters, parameter groups, hooks and attached schedulers stay, so that
        training goes on as it would have.  Works for every optimizer whose state tensors are laid out like their
        parameter or are single numbers: SGD, Adam, AdamW and kin, also foreach, fused and capturable.
        `srfx.record.carry` says what each kind of parameter gets.

        Args:
            optimizer: holds parameters of ``before``; parameters of other modules stay in it.
            before: the model that was given to minimize, unchanged since.
            after: the result, unchanged since.

        Raises:
            PlanError: the optimizer holds nothing of ``before``, or keeps state of another layout (LBFGS); nothing
                is changed then.
        """
        carry_optimizer(self, optimizer, before, after)

    def apply_(
        self, module: nn.Module, small: nn.Module | None = None, *, inputs: Any = None, kwargs: Any = None
    ) -> nn.Module:
        """Resize the module that was minimized, in place, to what this plan keeps: `srfx.apply_` for this plan.

        Args:
            module: what was minimized, or another instance of the same architecture.
            small: the result that this plan is of, also after training or `srfx.load`; it has the values.  Can be
                left out as long as it is in memory.
            inputs: positional arguments to compare on; without, some are made up.
            kwargs: keyword arguments.

        Returns:
            ``module``.

        Raises:
            ApplyError: what cannot be resized; ``module`` is unchanged.
            PlanError: ``small`` is of another plan, was not made by `srfx.minimize`, or was left out and is gone.
        """
        return _RESIZE[0](self, module, small, inputs, kwargs)

    def to_json(self) -> str:
        """One line of JSON; equal plans give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> KeepPlan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: not JSON, damaged, or of another version.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"a plan is a JSON object, this is not: {error}") from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            raise PlanError(f"expected a plan of version {VERSION}, got version {version!r}")
        try:
            tensors = tuple(_tensor_plan(t) for t in data.pop("tensors"))
            refusals = tuple(RefusalNote(**r) for r in data.pop("refusals"))
            for key in ("removed_nodes", "added_nodes"):
                data[key] = tuple(data[key])
            return cls(tensors=tensors, refusals=refusals, **data)
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan is damaged: {error}") from error

    def digest(self) -> str:
        """SHA-256 of the JSON text: processes that must agree compare it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _tensor_plan(data: dict[str, Any]) -> TensorPlan:
    cuts = tuple(
        AxisCut(c["axis"], c["size"], tuple(c["kept"]), tuple(c["layout"])) for c in data.pop("cuts")
    )
    kept_shape = data.pop("kept_shape")
    return TensorPlan(
        aliases=tuple(data.pop("aliases")),
        shape=tuple(data.pop("shape")),
        kept_shape=None if kept_shape is None else tuple(kept_shape),
        cuts=cuts,
        **data,
    )
