"""Watch every value of a graph while it runs: what varies, what is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from srfx.errors import RUN_FAILURES
from srfx.ir.attrs import get_attr
from srfx.ir.double import float64_default, float64_mode, to_double, writes_dtypes
from srfx.ir.generate import Spec, generate
from srfx.lattice.movement import Shape
from srfx.testing.resample import Resampler

TOLERANCE = 1e-9
"""Relative difference in float64 below which two numbers count as one."""

_MAX_TRIALS = 300
_WIDTHS = (1.0, 4.0, 0.3)


class Observer:
    """Draws weights and inputs, and remembers of each watched element whether it ever varied and was ever read.

    Args:
        gm: the graph; not changed.
        layouts: sizes of the layout tensors of the values to watch, by node name.
        hints: one value for each placeholder; tensors with values are used, others stand for their shape.
        seed: of weights and inputs.
        is_aliased: whether values of the graph are written in place: then everything counts as read.
        inner: names of weights whose columns a layer multiplies by states of its own (W_hh of a recurrent layer):
            ``columns`` says which of them ever mattered.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        layouts: Mapping[str, Shape],
        hints: Sequence[Any],
        seed: int = 0,
        is_aliased: bool = False,
        inner: Sequence[str] = (),
    ) -> None:
        self.layouts = layouts
        self.is_aliased = is_aliased
        self.varies = {n: torch.zeros(s, dtype=torch.bool) for n, s in layouts.items()}
        self.read = {n: torch.full(s, is_aliased, dtype=torch.bool) for n, s in layouts.items()}
        self.n_draws = 0
        self._resampler = Resampler(gm, seed)
        self._inner = {name: get_attr(self._resampler.copy, name).requires_grad_() for name in inner}
        self.columns = {n: torch.zeros(w.shape[1], dtype=torch.bool) for n, w in self._inner.items()}
        self._seed = seed
        self._mode = float64_mode if writes_dtypes(gm) else float64_default
        self._specs = [pytree.tree_map_only(Tensor, _spec, h) for h in hints]
        self._examples = list(hints) if _have_values(hints) else None
        self._good: list[int] = []
        self._trials = 0

    # ------------------------------------------------------------------ variation and gradients
    def draw(self, i: int) -> bool:
        """Run draw ``i`` on several inputs; False when its outputs are not finite, and nothing was learnt."""
        self._resampler.draw(i)
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        runs = 0
        for k, values in enumerate(self._inputs(i)):
            watcher = _Watcher(self._resampler.copy, self.layouts, None if self.is_aliased else gradients)
            outputs = self._run(watcher, values, k)
            if outputs is None or not all(bool(t.isfinite().all()) for t in outputs if not _is_int(t)):
                continue
            runs += 1
            for name, (least, most) in watcher.ranges.items():
                low[name] = torch.minimum(low[name], least) if name in low else least
                high[name] = torch.maximum(high[name], most) if name in high else most
            watcher.backward(outputs, self._generator(i, k))
            self._note_columns()
        if not runs:
            return False
        for name in low:
            size = torch.maximum(low[name].abs(), high[name].abs())
            still = high[name] - low[name] <= TOLERANCE * size
            self.varies[name] |= ~(still & size.isfinite())
        for name, g in gradients.items():
            scale = g.nan_to_num(0, 0, 0).max()
            self.read[name] |= ~(g <= 1e-10 * scale)  # nan counts as read
        self.n_draws += 1
        self._good.append(i)
        return True

    def _note_columns(self) -> None:
        """A column matters where an entry that is not 0 has a gradient; without gradients all may."""
        for name, weight in self._inner.items():
            if weight.grad is None:
                self.columns[name] |= self.is_aliased
                continue
            share = (weight.detach() * weight.grad).abs().amax(0)
            self.columns[name] |= share > 1e-10 * weight.grad.abs().max()
            weight.grad = None

    def _inputs(self, i: int) -> list[list[Any]]:
        found = [self._examples] if self._examples is not None else []
        for k, width in enumerate(_WIDTHS):
            values = generate(self._resampler.copy, self._specs, self._generator(i, k))
            found.append([_widened(value, width) for value in values])
        return [pytree.tree_map_only(Tensor, to_double, values) for values in found]

    def _generator(self, i: int, k: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed * 7919 + 100 * i + k)

    def _run(self, watcher: _Watcher, values: list[Any], seed: int) -> list[Tensor] | None:
        """Tensors of the output; None when the program refuses the input."""
        torch.manual_seed(seed)
        try:
            with self._mode(), torch.set_grad_enabled(watcher.gradients is not None):
                output = watcher.start(values)
        except RUN_FAILURES:
            return None
        return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]

    def is_related(self, node: str, lost: Tensor) -> bool:
        """Whether a value that never varied would, had the numbers it is made of nothing to do with each other.

        Args:
            node: its name; it is computed again with noise in place of all operands that vary.
            lost: elements of its layout that never varied.
        """
        self._resampler.draw(self._good[0])
        for values in self._inputs(self._good[0]):
            watcher = _Apart(self._resampler.copy, node, self.varies, self.layouts[node])
            if self._run(watcher, values, 0) is not None and watcher.range is not None:
                least, most = watcher.range
                size = torch.maximum(least.abs(), most.abs())
                return bool((lost & (most - least > TOLERANCE * size)).any())
        return False

    # ------------------------------------------------------------------ noise
    def confirm(self) -> None:
        """Replace what varies and had no gradient by noise, all at once; what changes an output is read after all."""
        found = [(n, v & ~self.read[n]) for n, v in self.varies.items()]
        found = [(n, mask) for n, mask in found if bool(mask.any())]
        for i in self._good[:3] if found else ():
            self._resampler.draw(i)
            runs = [
                (values, self._run(_Watcher(self._resampler.copy, {}, None), values, 0))
                for values in self._inputs(i)
            ]
            for values, outputs in runs:
                if outputs is not None and all(bool(t.isfinite().all()) for t in outputs if not _is_int(t)):
                    found = self._unread(found, values, outputs)
        unread = dict(found)
        for name, mask in self.varies.items():
            self.read[name] |= mask & ~unread[name] if name in unread else mask

    def _unread(
        self, found: list[tuple[str, Tensor]], values: list[Any], wanted: list[Tensor]
    ) -> list[tuple[str, Tensor]]:
        """The part of ``found`` that noise may replace together."""
        if not found or self._is_same(found, values, wanted):
            return found
        halves = _halves(found)
        if halves is None or self._trials > _MAX_TRIALS:
            return []
        parts = [self._unread(half, values, wanted) for half in halves]
        joint = _union(parts[0], parts[1])
        return joint if not joint or self._is_same(joint, values, wanted) else parts[0]

    def _is_same(self, noisy: list[tuple[str, Tensor]], values: list[Any], wanted: list[Tensor]) -> bool:
        self._trials += 1
        watcher = _Watcher(self._resampler.copy, {}, None, dict(noisy))
        got = self._run(watcher, values, 0)
        return got is not None and all(_is_close(a, b) for a, b in zip(wanted, got, strict=True))


class _Watcher(fx.Interpreter):
    """Runs a graph node by node: ranges, gradients and noise of watched values.

    Args:
        gm: the graph.
        layouts: values to watch.
        gradients: largest gradient of each element so far, updated by `backward`; None: no gradients.
        noise: elements to replace, by node name.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        layouts: Mapping[str, Shape],
        gradients: dict[str, Tensor] | None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(gm)
        self.layouts, self.gradients, self.noise = layouts, gradients, noise or {}
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self._generator = torch.Generator().manual_seed(1)

    def start(self, values: list[Any]) -> Any:
        """Run with one value for each placeholder."""
        self._values = iter(values)
        return self.run(*values, enable_io_processing=False)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The next value, whatever its calling convention."""
        return next(self._values)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and look at its value."""
        value = super().run_node(n)
        if not isinstance(value, Tensor):
            return value
        if n.name in self.noise:
            return self._noisy(value, self.noise[n.name])
        layout = self.layouts.get(n.name)
        if layout is None or n.op == "get_attr" or value.dim() != len(layout) or value.numel() == 0:
            return value
        self.ranges[n.name] = _range(value.detach(), layout)
        if self.gradients is not None and (value.is_floating_point() or value.is_complex()):
            value = value if value.requires_grad else value.detach().requires_grad_()
            value.register_hook(self._collector(n.name, layout, self.gradients))
        return value

    def _collector(self, name: str, layout: Shape, gradients: dict[str, Tensor]) -> Callable[[Tensor], None]:
        def collect(gradient: Tensor | None) -> None:
            if gradient is None:  # nothing that has a gradient reads it
                return
            found = _reduced(gradient.detach().abs(), layout, torch.Tensor.amax)
            gradients[name] = torch.maximum(gradients[name], found) if name in gradients else found

        return collect

    def backward(self, outputs: list[Tensor], generator: torch.Generator) -> None:
        """Collect the gradients of a random combination of the outputs."""
        if self.gradients is None:
            return
        total = torch.zeros((), dtype=torch.float64)
        for t in outputs:
            if t.requires_grad:
                weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
                total = total + (t * weight).sum().abs()
        if total.requires_grad:
            try:
                total.backward()
            except RuntimeError:  # an op whose gradient torch cannot compute: noise will tell
                self.gradients.clear()

    def _noisy(self, value: Tensor, mask: Tensor) -> Tensor:
        if value.dtype == torch.bool:
            noise = torch.rand(value.shape, generator=self._generator) < 0.5
        elif value.is_floating_point() or value.is_complex():
            usual = value.detach().abs().nan_to_num(0, 0, 0)
            size = float(usual.max()) + 1.0 if value.numel() else 1.0
            noise = torch.randn(value.shape, generator=self._generator, dtype=torch.float64) * size
        else:
            raise ValueError("a position may not be replaced by noise")
        return torch.where(mask, noise.to(value.dtype), value)


class _Apart(_Watcher):
    """Computes one node with operands that have nothing to do with each other, and notes the range of its result."""

    def __init__(self, gm: fx.GraphModule, node: str, varies: Mapping[str, Tensor], layout: Shape) -> None:
        super().__init__(gm, {}, None)
        self._node, self._varies, self._layout = node, varies, layout
        self.range: tuple[Tensor, Tensor] | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; the one in question several times."""
        if n.name == self._node:
            given = dict(self.env)
            for _ in range(3):
                for x in n.all_input_nodes:
                    if x.name in self._varies:
                        self.env[x] = self._noisy(given[x], self._varies[x.name])
                low, high = _range(super().run_node(n), self._layout)
                before = self.range or (low, high)
                self.range = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            self.env.update(given)
        return super().run_node(n)


def _range(value: Tensor, layout: Shape) -> tuple[Tensor, Tensor]:
    """Least and largest entry of each element; those of a complex value are of its absolute value and angle."""
    if value.is_complex():
        value = torch.view_as_real(value).sum(-1) + value.abs()
    value = value.double()
    return _reduced(value, layout, torch.Tensor.amin), _reduced(value, layout, torch.Tensor.amax)


def _reduced(value: Tensor, layout: Shape, how: Callable[..., Tensor]) -> Tensor:
    axes = [a for a, n in enumerate(layout) if n == 1]
    return how(value, axes, keepdim=True) if axes else value


def _is_close(wanted: Tensor, got: Tensor) -> bool:
    if wanted.shape != got.shape:
        return False
    if _is_int(wanted):
        return torch.equal(wanted, got)
    if wanted.numel() == 0:
        return True
    size = wanted.abs().amax(0, keepdim=True) if wanted.dim() > 1 else wanted.abs()
    return bool(((wanted - got).abs() <= TOLERANCE * (size + 1e-12)).all())


def _is_int(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


def _widened(value: Any, width: float) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t if _is_int(t) else t * width, value)


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype, "cpu")


def _have_values(hints: Sequence[Any]) -> bool:
    tensors = [t for t in pytree.tree_leaves(list(hints)) if isinstance(t, Tensor)]
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def _halves(
    found: list[tuple[str, Tensor]],
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] | None:
    if len(found) > 1:
        middle = len(found) // 2
        return found[:middle], found[middle:]
    name, mask = found[0]
    marked = mask.flatten().nonzero().flatten()
    if marked.numel() < 2:
        return None
    parts = []
    for chosen in marked.tensor_split(2):
        part = torch.zeros(mask.numel(), dtype=torch.bool)
        part[chosen] = True
        parts.append([(name, part.view(mask.shape))])
    return parts[0], parts[1]


def _union(a: list[tuple[str, Tensor]], b: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    found = dict(a)
    for name, mask in b:
        found[name] = found[name] | mask if name in found else mask
    return list(found.items())
