"""What every test of a rewrite uses: masks, equivalence of two models, and the whole check of `minimize`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

import srfx
from srfx.ir.capture import capture
from srfx.ir.plan import Edit, Reason, Refusal
from srfx.ir.shapes import SharedHints, survey
from srfx.minimize import canonicalise, minimize
from srfx.passes.compact_channels import CompactChannels
from srfx.passes.restore_in_place import RestoreInPlacePass
from tests.snapshots import assert_unchanged, snapshot, trace

ROUTES = ("symbolic", "export")
Inputs = tuple[Any, ...]


# ---------------------------------------------------------------------- two models
def assert_equivalent(
    before: nn.Module, after: nn.Module, inputs: Inputs, *, rtol: float = 1e-10, float32: float | None = 2.0
) -> None:
    """Both compute the same: structure, shapes, dtypes, values and input gradients in float64; then float32.

    Args:
        before: the model as it was.
        after: the rewritten one; when it is a GraphModule, its graph is linted and nothing in it may be unused.
        inputs: positional arguments.
        rtol: largest error of an output, and of an input's gradient, relative to its largest entry.
        float32: how many times further from the float64 truth the rewritten model may be than the original
            in single precision; None leaves that comparison out.
    """
    if isinstance(after, fx.GraphModule):
        assert_no_dead_weight(after)
    exact, ours = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    doubled = _cast(inputs, torch.float64)
    wanted, wanted_gradients = _run(exact, doubled)
    found, found_gradients = _run(ours, doubled)
    _compare(wanted, found, rtol, "output")
    _compare(wanted_gradients, found_gradients, rtol * 100, "gradient")
    if float32 is not None:
        single = _cast(inputs, torch.float32)
        reference = _relative_error(wanted, _run(copy.deepcopy(before).float(), single)[0])
        error = _relative_error(wanted, _run(copy.deepcopy(after).float(), single)[0])
        assert error <= float32 * reference + 1e-6, (
            f"float32: {error:.2e} from the truth, {reference:.2e} before"
        )


def assert_no_dead_weight(gm: fx.GraphModule) -> None:
    """The graph is sound, every node is read, and every tensor is used by some node."""
    gm.graph.lint()
    idle = [
        n.name for n in gm.graph.nodes if not n.users and n.op in ("get_attr", "call_module", "call_method")
    ]
    assert not idle, f"nodes nobody reads: {idle}"
    used: set[int] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            used.add(id(_attribute(gm, str(node.target))))
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            used.update(id(t) for t in (*module.parameters(), *module.buffers()))
    every = dict([*gm.named_parameters(), *gm.named_buffers()])
    unused = [name for name, tensor in every.items() if id(tensor) not in used]
    assert not unused, f"tensors nobody uses: {unused}"


def _attribute(gm: nn.Module, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast: Inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return cast


def _run(model: nn.Module, inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """The outputs, and the gradient of their sum (with fixed random weights) for each floating-point input."""
    leaves = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.is_floating_point()]
    fresh = {id(t): t.detach().clone().requires_grad_() for t in leaves}
    given = tree_map_only(Tensor, lambda t: fresh.get(id(t), t), inputs)
    output = model(*given)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for part in tree_flatten(output)[0]:
        if isinstance(part, Tensor) and part.is_floating_point() and part.requires_grad:
            total = total + (part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum()
    wanted = list(fresh.values())
    if not total.requires_grad:
        return output, [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return output, [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _compare(wanted: Any, found: Any, rtol: float, what: str) -> None:
    (a_leaves, a_spec), (b_leaves, b_spec) = tree_flatten(wanted), tree_flatten(found)
    assert a_spec == b_spec, f"{what}: the structure was {a_spec}, now {b_spec}"
    for i, (a, b) in enumerate(zip(a_leaves, b_leaves, strict=True)):
        if not isinstance(a, Tensor):
            assert a == b, f"{what} {i}: was {a}, now {b}"
            continue
        assert a.shape == b.shape, f"{what} {i}: the shape was {list(a.shape)}, now {list(b.shape)}"
        assert a.dtype == b.dtype, f"{what} {i}: the dtype was {a.dtype}, now {b.dtype}"
        error = relative_error(a, b)
        assert error <= rtol, f"{what} {i}: relative error {error:.2e}, allowed {rtol:.0e}"


def relative_error(wanted: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest entry; inf when nan, inf or integers do not agree."""
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, found.to(wanted.dtype)) else math.inf
    if wanted.numel() == 0:
        return 0.0
    wanted, found = wanted.detach().double(), found.detach().double()
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    if not torch.equal(wanted[~finite].nan_to_num(), found[~finite].nan_to_num()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = wanted[finite].abs().max().clamp(min=1e-30)
    return float((wanted - found)[finite].abs().max() / scale)


def _relative_error(wanted: Any, found: Any) -> float:
    pairs = zip(tree_flatten(wanted)[0], tree_flatten(found)[0], strict=True)
    return max((relative_error(a, b) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


# ---------------------------------------------------------------------- masks
def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model in eval mode with every parameter and statistic away from its default; nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = max(1, p[0].numel()) if p.dim() > 1 else 1
            scale = 1.0 / math.sqrt(fan)
            p.copy_((torch.rand(p.shape, generator=g) + 0.2) * _signs(p.shape, g) * scale)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=g))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.weight is not None:
                m.weight.copy_(0.75 + 0.5 * torch.rand(m.weight.shape, generator=g))
    return model.eval()


def _signs(shape: Sequence[int], g: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=g) * 2 - 1


def masked(
    model: nn.Module,
    seed: int = 0,
    *,
    rows: float = 0.4,
    columns: float = 0.2,
    zeros: float = 0.3,
    scales: float = 0.2,
    layers: float = 0.0,
    whole: Iterable[str] = (),
) -> nn.Module:
    """Install zeros as a pruner leaves them, in place; biases and shifts stay.  Some of the zeros are -0.0.

    Args:
        model: its convolution, linear and batch norm modules are masked.
        seed: of everything random here.
        rows: share of output rows that die, with their bias left as it is.
        columns: share of input columns that die (not in grouped convolutions).
        zeros: share of single weights that die besides.
        scales: share of batch norm scales that become zero, with the shift left.
        layers: share of layers that die altogether.
        whole: names of layers that die altogether.
    """
    g = torch.Generator().manual_seed(seed + 7919)
    lost, seen = set(whole), set()
    with torch.no_grad():
        for name, m in model.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None:
                m.weight[_some(m.weight.shape[0], scales, g)] = 0
            if not isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) or id(m.weight) in seen:
                continue
            seen.add(id(m.weight))
            transposed = isinstance(m, nn.modules.conv._ConvTransposeNd)
            w = m.weight.transpose(0, 1) if transposed else m.weight
            minus = torch.where(torch.rand(w.shape, generator=g) < 0.5, -0.0, 0.0).to(w)
            w.copy_(torch.where(torch.rand(w.shape, generator=g) < zeros, minus, w))
            w[_some(w.shape[0], rows, g)] = 0
            if getattr(m, "groups", 1) == 1:
                w[:, _some(w.shape[1], columns, g)] = -0.0
            if name in lost or float(torch.rand((), generator=g)) < layers:
                w.zero_()
    return model


def _some(n: int, share: float, g: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=g)[: round(share * n)]


def recalibrated(model: nn.Module, inputs: Inputs, seed: int = 0) -> nn.Module:
    """Set the statistics of every batch norm near those of a batch, so that a masked network carries signal."""
    g = torch.Generator().manual_seed(seed)

    def hook(m: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].detach()
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = x.mean(dims), x.var(dims, unbiased=False) + 0.02
        noise = torch.randn(mean.shape, generator=g).to(mean)
        m.running_mean.copy_(mean + 0.2 * var.sqrt() * noise)
        m.running_var.copy_(var * (0.75 + 0.5 * torch.rand(mean.shape, generator=g).to(mean)))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [m.register_forward_pre_hook(hook) for m in norms if m.running_mean is not None]
    with torch.no_grad():
        model.eval()(*inputs)
    for handle in hooks:
        handle.remove()
    return model


def kill(
    module: nn.Module, rows: Iterable[int] = (), columns: Iterable[int] = (), bias: bool = False
) -> nn.Module:
    """Zero these rows and columns of a layer's weight in place (``bias``: the rows' bias too)."""
    w = module.weight
    assert isinstance(w, Tensor)
    with torch.no_grad():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            w[:, list(rows)] = 0
            w[list(columns)] = 0
        else:
            w[list(rows)] = 0
            if w.dim() > 1:
                w[:, list(columns)] = 0
        if bias and isinstance(module.bias, Tensor):
            module.bias[list(rows)] = 0
    return module


# ---------------------------------------------------------------------- the whole check
@dataclass
class Outcome:
    """What one route gave: the result, the edits that cut, the refusals, and the edits of the passes before."""

    small: fx.GraphModule
    edits: list[Edit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    prepared: list[tuple[str, Edit]] = field(default_factory=list)

    @property
    def reasons(self) -> set[Reason]:
        return {r.reason for r in self.refusals}


def count(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter shapes by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def plan_of(model: nn.Module, inputs: Inputs) -> Outcome:
    """Run the pipeline step by step, each pass once; edits and refusals are those of the last, which cuts.

    A write that is made functional and in place again afterwards is no step.
    """
    captured = capture(model, inputs)
    gm = captured.graph_module
    hints = SharedHints(
        survey(gm, captured.inputs)
    )  # as minimize: shapes are found once for passes that change nothing
    prepared = canonicalise(gm, hints).edits
    done = CompactChannels(hints)(gm)
    restored = {edit.node for edit in RestoreInPlacePass()(gm).edits}
    prepared = [(name, e) for name, e in prepared if name != "functionalize" or e.node not in restored]
    return Outcome(gm, list(done.edits), list(done.refusals), prepared)


def check(
    model: nn.Module,
    inputs: Inputs,
    *,
    others: Sequence[Inputs] = (),
    kept: Mapping[str, tuple[int, ...]] | None = None,
    parameters: int | None = None,
    reasons: Iterable[Reason] = (),
    routes: Sequence[str] = ROUTES,
    rtol: float = 1e-9,
    idempotent: bool = True,
    ragged: bool = False,
) -> dict[str, Outcome]:
    """Minimize a model by every route and hold the result against all that is promised.

    Args:
        model: made double and traced here; must be in the mode it is meant for.
        inputs: arguments to trace with, batch at least 2.
        others: further arguments, of other batch and picture sizes; a doubled batch is always tried.
        kept: exact shapes of parameters that have to come out; a name that is to vanish maps to ().
        parameters: exact number of parameters that has to come out.
        reasons: each has to be among the refusals.
        routes: ways of tracing.
        rtol: largest error relative to an output's largest entry, in float64.
        idempotent: whether minimizing again must plan nothing.
        ragged: give each reader and writer channels of its own.
    """
    model, inputs = copy.deepcopy(model).double(), _cast(inputs, torch.float64)
    tries = [inputs, _more(inputs, 3), *(_cast(o, torch.float64) for o in others)]
    found: dict[str, Outcome] = {}
    for route in routes:
        traced = trace(model, inputs, route)
        before = snapshot(traced)
        small = minimize(traced, inputs, ragged=ragged)
        assert_unchanged(traced, before)
        notes = srfx.plan(small).refusals
        outcome = Outcome(small, [], [Refusal(n.node, Reason[n.reason], n.detail) for n in notes])
        assert_no_dead_weight(small)
        with torch.no_grad():
            for i, given in enumerate(tries):
                if route == "export" and i > 1:
                    continue  # exported with a dynamic batch only
                _compare(model(*given), small(*given), rtol, f"{route}, input {i}: output")
        assert count(small) <= count(model), f"{route}: {count(small)} parameters, {count(model)} before"
        _check_sizes(small, kept, parameters, route)
        missing = set(reasons) - outcome.reasons
        assert not missing, f"{route}: no refusal says {missing}; there are {outcome.refusals}"
        if idempotent:
            again = plan_of(small, inputs)
            assert count(again.small) == count(small), f"{route}: {count(small)}, then {count(again.small)}"
            assert not again.prepared, f"{route}: a second run prepares {again.prepared[:3]}"
            assert not again.edits, f"{route}: a second run plans {again.edits[:3]}"
            if ragged:
                more = minimize(small, inputs, ragged=True)
                assert size_bytes(more) == size_bytes(small), (
                    f"{route}: {size_bytes(small)} bytes, then {size_bytes(more)}"
                )
        found[route] = outcome
    return found


def _more(inputs: Inputs, times: int) -> Inputs:
    """Other values, and a batch ``times`` as long."""

    def repeat(t: Tensor) -> Tensor:
        if not t.dim():
            return t
        longer = torch.cat([t] * times)
        return longer.flip(-1) * 1.5 - 0.25 if t.is_floating_point() else longer.flip(0)

    more: Inputs = tree_map_only(Tensor, repeat, inputs)
    return more


def _check_sizes(
    small: nn.Module, kept: Mapping[str, tuple[int, ...]] | None, parameters: int | None, route: str
) -> None:
    found = shapes(small)
    for name, shape in (kept or {}).items():
        assert found.get(name, ()) == shape, (
            f"{route}: {name} is {found.get(name, ())}, should be {shape}; all: {found}"
        )
    if parameters is not None:
        assert count(small) == parameters, (
            f"{route}: {count(small)} parameters, should be {parameters}: {found}"
        )


class Sandwich(nn.Module):
    """front -> op -> back, the smallest place to see what an op lets through.

    Example: ``Sandwich(conv(3, 8), lambda x: F.pad(x, (1, 1)), conv(8, 4))``.
    """

    def __init__(self, front: nn.Module, op: Callable[[Any], Any], back: nn.Module) -> None:
        super().__init__()
        self.front, self.back = front, back
        if isinstance(op, nn.Module):
            self.op: Any = op
        else:
            object.__setattr__(self, "op", op)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.back(self.op(self.front(x)))
        return result
