"""The one way to write a pass: analyse, plan, apply.  ``plan`` reads, ``apply`` writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase

from srfx.errors import PlanError
from srfx.ir.plan import Edit, Plan, Refusal


class PassResult(NamedTuple):
    """What one run of a pass did.  The first two fields are what torch.fx's own PassManager reads."""

    graph_module: fx.GraphModule
    modified: bool
    edits: tuple[Edit, ...] = ()
    refusals: tuple[Refusal, ...] = ()


class Pass(PassBase):
    """Base of all passes.  A subclass states ``plan`` and ``apply``; checks and bookkeeping happen here.

    ``__call__`` runs requires(input), plan, apply for each edit, lint and recompile, ensures(output), in this
    order.  (torch's own ``PassBase.__call__`` hands ``ensures`` the input; this one hands it the result.)
    The graph module is changed in place, so it has to be one that the caller owns.

    Example:
        >>> from torch import fx, nn
        >>> from srfx.ir.plan import Plan
        >>> class Nothing(Pass):
        ...     def plan(self, gm): return Plan()
        ...     def apply(self, gm, edit): raise AssertionError
        >>> Nothing()(fx.symbolic_trace(nn.ReLU())).modified
        False
    """

    name: ClassVar[str] = ""
    recompiles: bool = True
    """A pipeline sets it to False and recompiles once at its end; ``ensures`` then has the graph only."""

    @abstractmethod
    def plan(self, gm: fx.GraphModule) -> Plan:
        """Find every site; read only.

        Returns:
            Edits and refusals, both in node order.  Edits of one plan are independent of each other: what
            conflicts waits for the next round.  On a fixpoint there are no edits.
        """

    @abstractmethod
    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Carry out one edit of a plan of this very graph module.  It cannot refuse."""

    def finish(self, gm: fx.GraphModule) -> None:
        """Clean up once after all edits of a plan; not called when there were none."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise when the input is not one this pass can read.  The default checks nothing."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise AssertionError when the result is wrong.  The default checks nothing."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:  # type: ignore[override]  # read by name
        """Plan and apply, without ``requires`` and ``ensures``."""
        plan = self.plan(graph_module)
        for edit in plan.edits:
            self.apply(graph_module, edit)
        if plan.edits:
            self.finish(graph_module)
            graph_module.graph.lint()
            if self.recompiles:
                graph_module.recompile()
        return PassResult(graph_module, bool(plan.edits), tuple(plan.edits), tuple(plan.refusals))

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:  # type: ignore[override]
        """Run the pass on a graph module that the caller owns; see the class.

        Raises:
            AssertionError: when the result is wrong (a bug of the pass).
        """
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result


class HintedPass(Pass):
    """Base of the passes that need shapes: ``srfx.ir.shapes.propagate(gm, self.hints)`` gives them.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
    """

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        self.hints = hints


PASSES: dict[str, type[Pass]] = {}
"""Every registered pass by its name, in the order of registration."""

_P = TypeVar("_P", bound=type[Pass])


def register_pass(name: str) -> Callable[[_P], _P]:
    """Enter a pass into ``PASSES`` under ``name`` (kebab case, verb first).

    Raises:
        AssertionError: when the name is taken by another class.
    """

    def enter(cls: _P) -> _P:
        taken = PASSES.get(name)
        if taken is not None:
            raise AssertionError(
                f"pass {name!r} is {taken.__qualname__}; {cls.__qualname__} needs another name"
            )
        cls.name = name
        PASSES[name] = cls
        return cls

    return enter


def get_pass(name: str, **options: Any) -> Pass:
    """A new instance of the pass registered as ``name``.

    Raises:
        PlanError: when there is no such pass.
    """
    if name not in PASSES:
        raise PlanError(f"no pass is named {name!r}; there are: {', '.join(PASSES)}")
    return PASSES[name](**options)
