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

from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen

from srfx.ir.clone import clone_graph
from srfx.record.keep_plan import KeepPlan
from srfx.record.record import Record

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
    attach(gm, record)
    return gm
