"""`apply_`: give the tensors of a minimized model to the module it was made from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from srfx.apply.heads import head_sizes, head_widths, own_sizes
from srfx.apply.layers import (
    CHANNELS_FIRST,
    is_channels_first,
    norm_of,
    parent_of,
    readers,
    settings,
)
from srfx.apply.outputs import FullRows, full_rows
from srfx.errors import RUN_FAILURES, ApplyError, PlanError, VerificationError
from srfx.ir.attrs import split_path
from srfx.ir.generate import generate
from srfx.record.attach import model_of, record_of
from srfx.record.keep_plan import KeepPlan, TensorPlan, resizes_by
from srfx.record.record import Record
from srfx.verify import call_arguments, generated_specs, verify

MAX_NAMED = 8
"""How many problems an error names."""


def apply_(module: nn.Module, small: fx.GraphModule, *, inputs: Any = None, kwargs: Any = None) -> nn.Module:
    """Resize a module in place to what minimize kept of it; its class, its methods and its parameters' identity stay.

    Parameters and buffers take the values of the small model's, under the same names.  Layers of torch.nn learn their
    new sizes, norms that lost channels are replaced by their compensated forms, biases that folding made are added, and
    modules of other classes have those numbers corrected that they keep about their layers.  Then both models run and
    are compared.  Only a forward that takes its sizes from its tensors or attributes can follow; when this one does not,
    the module is left exactly as it was.

    Args:
        module: what ``small`` was made from, or another instance of the same architecture (its values do not matter).
        small: a result of `srfx.minimize`, also after training or `srfx.load`.
        inputs: positional arguments to compare on; without, some are made up from the shapes that ``small`` remembers.
        kwargs: keyword arguments.

    Returns:
        ``module``.

    Raises:
        ApplyError: what cannot be resized, or how far the two are apart; ``module`` is unchanged.
        PlanError: ``small`` was not made by `srfx.minimize`.

    Example:
        >>> import srfx
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:].zero_()
        >>> apply_(net, srfx.minimize(net, torch.randn(1, 4)))[0]
        Linear(in_features=4, out_features=2, bias=True)

    Cost: a copy of the small weights, and the runs of `srfx.verify`.
    """
    record = record_of(small)
    if record is None:
        raise PlanError(f"this {type(small).__name__} carries no record: give a result of srfx.minimize")
    change = _Change(module, small, record)
    if change.problems:
        raise ApplyError(_text(change.problems))
    before = _Snapshot(module)
    try:
        with torch.no_grad():
            change.resize()
        found = _compare(small, module, record, inputs, kwargs)
        if found is not None and change.correct_heads():
            found = _compare(small, module, record, inputs, kwargs)
        if found is None:
            _tell_heads(small, module, record, inputs, kwargs)
    except BaseException:
        before.restore()
        raise
    if found is not None:
        before.restore()
        raise ApplyError(
            f"{found}: the forward of {type(module).__name__} has sizes of its own that do not follow"
        )
    return module


@resizes_by
def _apply_plan(
    plan: KeepPlan, module: nn.Module, small: nn.Module | None, inputs: Any, kwargs: Any
) -> nn.Module:
    """`KeepPlan.apply_`."""
    if small is None:
        small = model_of(plan)
        if small is None:
            raise PlanError("the minimized model of this plan is no longer in memory: give it as `small`")
    record = record_of(small)
    if record is not None and record.plan != plan:
        raise PlanError(
            f"this {type(small).__name__} was made by another plan: give the result that the plan is of"
        )
    return apply_(module, cast(fx.GraphModule, small), inputs=inputs, kwargs=kwargs)


class _Change:
    """What has to become of each tensor and module; reading only, until `resize`."""

    def __init__(self, module: nn.Module, small: fx.GraphModule, record: Record) -> None:
        self.module, self.small, self.plan = module, small, record.plan
        self.reads = readers(small)
        self.problems: list[str] = []
        self.values: dict[int, tuple[Tensor, Tensor]] = {}
        self.plans: dict[str, TensorPlan] = {}
        self.norms: dict[str, nn.Module] = {}
        values = {
            **dict(small.named_parameters(remove_duplicate=False)),
            **dict(small.named_buffers(remove_duplicate=False)),
        }
        planned = {name: t for t in self.plan.tensors for name in (t.name, *t.aliases)}
        self.full = {
            path: rows
            for path, rows in full_rows(small).items()
            if isinstance(_module(module, path), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        }
        for path, rows in self.full.items():
            self._fill(path, rows, planned, values)
        for name, tensors in _names(module).items():
            self._tensor(name, tensors, planned, values)
        self.biases = self._new_biases(values)

    def _fill(
        self, path: str, rows: FullRows, planned: dict[str, TensorPlan], values: dict[str, Tensor]
    ) -> None:
        """A layer whose rows are an output gets them all back, those of constants as zeros with a bias."""
        weight, bias = f"{path}.weight", f"{path}.bias"
        if weight not in values or weight not in planned:
            return
        values[weight] = rows.weight(values[weight])
        planned[weight] = dataclasses.replace(planned[weight], kept_shape=tuple(values[weight].shape))
        full = rows.bias(values.get(bias))
        if bias in values or bool(full.any()):
            values[bias] = full
        if bias in planned and bias in values:
            planned[bias] = dataclasses.replace(planned[bias], status="kept", kept_shape=tuple(full.shape))

    def _tensor(
        self, name: str, tensor: Tensor, planned: dict[str, TensorPlan], values: dict[str, Tensor]
    ) -> None:
        found = planned.get(name)
        if found is None:
            twin = next((n for n, t in _names(self.module).items() if t is tensor and n in planned), None)
            if twin is None and tensor.dim() and isinstance(tensor, nn.Parameter):
                self.problems.append(f"{name} was taken apart, or is not known to the plan")
            return
        if found.status == "unread" or not (tensor.dim() and tensor.is_floating_point()):
            return  # positions, counts and the like
        if tuple(tensor.shape) != found.shape:
            self.problems.append(f"{name} is {list(tensor.shape)}, the plan was made for {list(found.shape)}")
            return
        value = values.get(name)
        if found.status == "removed" or value is None:
            value = self._folded(name, tensor)
            if value is None:
                return
            kept = tuple(value.shape)
            found = dataclasses.replace(found, kept_shape=kept)
        self.plans[name] = found
        self.values[id(tensor)] = (tensor, value)
        path = parent_of(name)
        if found.kept_shape != found.shape and path not in self.norms:
            norm = norm_of(self.small, path, self.reads)
            if norm is not None:
                self.norms[path] = norm

    def _folded(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table that was looked up at one place only, so that its row became a constant of the small graph.

        It keeps the columns that the tables beside it keep, with which it is summed; whether that is right, the
        comparison of the outputs will show.
        """
        path = parent_of(name)
        if isinstance(self.module.get_submodule(path), nn.Embedding):
            for other, layer in self.module.get_submodule(parent_of(path)).named_children():
                beside = f"{parent_of(path)}.{other}.weight".lstrip(".")
                found = next((t for t in self.plan.tensors if beside in (t.name, *t.aliases)), None)
                if isinstance(layer, nn.Embedding) and found is not None and found.kept_shape is not None:
                    columns = self.plan.kept(found.name, -1)
                    return tensor.detach().index_select(-1, columns.to(tensor.device))
        self.problems.append(
            f"{name}: the small model has nothing in its place (taken apart, folded or not read)"
        )
        return None

    def _new_biases(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Biases that folding made, by the path in the module."""
        found: dict[str, Tensor] = {}
        done = {name for rows in self.full.values() for name in rows.buffers}
        for path in self.full:
            if f"{path}.bias" in values:
                found[f"{path}.bias"] = values[f"{path}.bias"]
        parameters = dict(self.small.named_parameters())
        for created in (t.name for t in self.plan.tensors if t.status == "created" and t.name not in done):
            if created in parameters and _module(self.module, parent_of(created)) is None:
                self.problems.append(f"{created}: the small model has a layer more")
                continue
            for node, named in self.reads.get(created, []):
                weight, bias = named.get("weight"), named.get("bias")
                is_bias = isinstance(bias, fx.Node) and bias.target == created
                if is_bias and isinstance(weight, fx.Node) and weight.op == "get_attr":
                    found[f"{parent_of(str(weight.target))}.bias"] = values[created]
                elif node.target in (torch.where, torch.ops.aten.where.self):
                    self.problems.append(
                        f"{created}: an output channel is constant and is filled in by the small graph"
                    )
            parent, _, last = created.rpartition(".")
            if created not in self.reads and last == "bias":
                found[created] = values[created]
            elif created not in self.reads and parent not in self.norms and "template" in created:
                self.problems.append(f"{created}: the small graph fills in a constant")
        return {name: value for name, value in found.items() if name not in self.plans}

    def resize(self) -> None:
        for tensor, value in self.values.values():
            tensor.grad = None
            _put(tensor, value.detach().to(tensor.device, copy=True))
        for name, value in self.biases.items():
            path, _, last = name.rpartition(".")
            self.module.get_submodule(path)._parameters[last] = nn.Parameter(value.detach().clone())
        for path, norm in self.norms.items():
            self._put_norm(path, norm)
        for path, layer in list(self.module.named_modules()):
            own = {
                n: self.plans[f"{path}.{n}" if path else n]
                for n in _own(layer)
                if (f"{path}.{n}" if path else n) in self.plans
            }
            if any(p.kept_shape != p.shape for p in own.values()) and path not in self.norms:
                self._set(path, layer, own)

    def _put_norm(self, path: str, norm: nn.Module) -> None:
        old = self.module.get_submodule(path)
        device = next(t.device for t in _own(old).values())
        new = copy.deepcopy(norm).to(device).train(old.training)
        first = CHANNELS_FIRST.get(type(new))
        is_own = type(old) not in (nn.LayerNorm, nn.RMSNorm)
        if is_own and first is not None and is_channels_first(path, self.reads):
            new.__class__ = first
        for name, tensor in _own(old).items():
            if name in new._parameters and isinstance(tensor, nn.Parameter):
                new._parameters[name] = tensor  # the same object, for optimizers
        parent, last = split_path(path)
        self.module.get_submodule(parent)._modules[last] = new  # in the place it had

    def _set(self, path: str, layer: nn.Module, own: dict[str, TensorPlan]) -> None:
        if not type(layer).__module__.startswith("torch.nn."):
            found: dict[str, Any] | None = own_sizes(layer, own)
        else:
            twin = None if path in self.full else _module(self.small, path)
            found = settings(layer, self.reads.get(f"{path}.weight", []), twin)
        if found is None:
            raise ApplyError(f"{path}: it is not known how to resize a {type(layer).__name__}")
        for name, value in found.items():
            setattr(layer, name, value)

    def correct_heads(self) -> bool:
        is_new = False
        for path, module in self.module.named_modules():
            if not type(module).__module__.startswith("torch.nn."):
                for name, value in head_sizes(module, path, self.plan).items():
                    setattr(module, name, value)
                    is_new = True
        return is_new


class _Snapshot:
    """Everything `apply_` may change, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self.dicts = [(m.__dict__, {k: _shallow(v) for k, v in m.__dict__.items()}) for m in module.modules()]
        self.tensors = [(t, t.data, t.grad) for t in {id(t): t for t in _names(module).values()}.values()]

    def restore(self) -> None:
        for live, saved in self.dicts:
            for key in [k for k in live if k not in saved]:
                del live[key]
            for key, value in saved.items():
                now = live.get(key)
                if isinstance(value, dict) and isinstance(now, dict):
                    now.clear()
                    now.update(value)
                else:
                    live[key] = value
        for tensor, data, grad in self.tensors:
            _put(tensor, data)
            tensor.grad = grad


def _put(tensor: Tensor, data: Tensor) -> None:
    """Replace what a tensor holds.

    A graph that is still alive (the loss of the last step) remembers the old shape for the tensor's gradients, and would for
    those of later graphs too; torch forgets it only when the dtype changes, so the dtype changes on the way.
    """
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    if tensor.shape != data.shape and tensor.is_floating_point():
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _shallow(value: Any) -> Any:
    return dict(value) if type(value) is dict else value


def _tell_heads(small: fx.GraphModule, module: nn.Module, record: Record, inputs: Any, kwargs: Any) -> None:
    """Correct what nothing reads in a forward but code that puts in a new head; taken back when a forward did read it."""
    found = head_widths(module, record.plan)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in found]
    for owner, name, value in found:
        setattr(owner, name, value)
    if found and _compare(small, module, record, inputs, kwargs) is not None:
        for owner, name, value in before:
            setattr(owner, name, value)


def _compare(
    small: fx.GraphModule, module: nn.Module, record: Record, inputs: Any, kwargs: Any
) -> str | None:
    """None when both compute the same, else what is wrong."""
    if inputs is None and not kwargs:
        inputs, kwargs = call_arguments(
            small, generate(small, generated_specs(record), torch.Generator().manual_seed(0))
        )
    try:
        found = verify(small, module, inputs, kwargs=kwargs)
    except (VerificationError, *RUN_FAILURES) as error:
        return f"it cannot run resized ({str(error).strip().splitlines()[0] if str(error) else type(error).__name__})"
    return None if found.ok else f"it computes something else resized ({found})"


def _names(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {
        n: t for store in (module._parameters, module._buffers) for n, t in store.items() if t is not None
    }


def _module(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _text(problems: Iterable[str]) -> str:
    every = list(problems)
    more = f"; and {len(every) - MAX_NAMED} more" if len(every) > MAX_NAMED else ""
    return f"the module cannot be resized: {'; '.join(every[:MAX_NAMED])}{more}"
