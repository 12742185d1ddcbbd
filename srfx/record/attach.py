"""Keep a record with a GraphModule through deepcopy and pickle.

``fx.GraphModule`` copies ``meta`` in deepcopy but drops it when pickled.  Every GraphModule has a class of
its own (fx puts the generated ``forward`` there), so a ``__reduce__`` on that class concerns this one object
only.

fx pickles the generated code and traces it again when it loads; of the nested inputs and outputs of an
exported graph only plain containers survive that, so the flat graph is pickled, and its calling convention
beside it.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from srfx.ir.clone import clone_graph
from srfx.ir.short_paths import shorten_paths
from srfx.record.keep_plan import KeepPlan
from srfx.record.record import Record, TensorSpec

KEY = "srfx"
_ALIVE: WeakSet[fx.GraphModule] = WeakSet()


def attach(gm: fx.GraphModule, record: Record) -> None:
    """Store the record as ``gm.meta["srfx"]``, to survive deepcopy and pickle from now on."""
    gm.meta[KEY] = record
    _keep(gm)


def record_of(model: nn.Module) -> Record | None:
    """The record of a minimized model, None when there is none."""
    found = getattr(model, "meta", {}).get(KEY)
    return found if isinstance(found, Record) else None


def remembered_inputs(model: nn.Module, gm: fx.GraphModule) -> list[Any] | None:
    """The input shapes of the last run: a minimized model that was pickled or saved has no other metadata."""
    record = record_of(model)
    if record is None or len(record.inputs) != len(gm.graph.find_nodes(op="placeholder")):
        return None
    with FakeTensorMode():
        return [pytree.tree_map_only(TensorSpec, _empty, value) for value in record.inputs]


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)


def model_of(plan: KeepPlan) -> fx.GraphModule | None:
    """A minimized model in this process that the plan belongs to, None when there is none (any more)."""
    models = [gm for gm in _ALIVE if record_of(gm) is not None]
    plans = [(gm, gm.meta[KEY].plan) for gm in models]
    same = [gm for gm, other in plans if other is plan] or [gm for gm, other in plans if other == plan]
    return same[0] if same else None


def _keep(gm: fx.GraphModule) -> None:
    _ALIVE.add(gm)
    type(gm).__reduce__ = _reduce  # type: ignore[assignment, method-assign]
    if _keep not in gm._deepcopy_hooks:
        gm._register_deepcopy_hook(_keep)


def _reduce(gm: fx.GraphModule) -> tuple[Any, ...]:
    codegen = gm.graph._codegen
    flat = _flat(gm) if isinstance(codegen, _PyTreeCodeGen) else gm
    restore, (state, *rest) = fx.GraphModule.__reduce__(flat)
    state = {key: value for key, value in state.items() if key != "_deepcopy_hooks"}
    state["_graphmodule_cls_name"] = type(gm).__name__  # read by fx when it loads
    return _restore, (restore, state, rest, codegen if flat is not gm else None, gm.meta[KEY])


def _flat(gm: fx.GraphModule) -> fx.GraphModule:
    """The same modules and nodes; takes the placeholders in order and returns what the output node holds."""
    graph = clone_graph(gm.graph)
    graph._codegen = CodeGen()
    flat = fx.GraphModule(gm, graph, type(gm).__name__)
    flat.training = gm.training
    return flat


def _restore(
    restore: Any, state: dict[str, Any], rest: list[Any], codegen: CodeGen | None, record: Record
) -> fx.GraphModule:
    gm = restore(state, *rest)
    assert isinstance(gm, fx.GraphModule)
    if codegen is not None:
        gm.graph._codegen = codegen
        gm.recompile()
    shorten_paths(gm)
    attach(gm, record)
    return gm
