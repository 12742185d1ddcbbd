"""How far ragged minimization is from what no exact rewrite of single weights can beat, by a computation of its own.

    python -m benchmarks.ragged_bound                  all models; writes benchmarks/results/ragged_bound.json
    python -m benchmarks.ragged_bound gpt2 resnet18    some
    python -m benchmarks.ragged_bound --resume         go on behind the models that the file has already

The bound shares nothing with srfx: it runs the network.  It knows where zeros stand, not what the other numbers are:
under random inputs, and several draws of values and signs of the nonzero parameters, a channel *varies* if its values
do, and is *read* if the output's gradient there is not zero.  A weight needs its row r if y[r] varies and is read, and
its column c if x[c] varies and some needed row has a nonzero there.  Every weight is taken by itself: blocks, ties,
statistics of norms and border carriers cost nothing.

Columns: parameters of the original, then in percent of it: aligned, ragged without and with its indices (4 bytes
are one parameter), the bound, and ragged with indices relative to the bound.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import srfx
from benchmarks import ragged_models as zoo
from benchmarks.cycle.history import machine
from tests.helpers import recalibrated

TOLERANCE = 1e-9
N_DRAWS = 3


class SplitAttention(nn.Module):
    """nn.MultiheadAttention (batch first, self attention) with a projection for each of q, k and v."""

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        assert old.in_proj_weight is not None
        self.n_heads, width = old.num_heads, old.embed_dim
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        for p, w, b in zip(
            self.projections, old.in_proj_weight.chunk(3), old.in_proj_bias.chunk(3), strict=True
        ):
            p.weight, p.bias = nn.Parameter(w.detach().clone()), nn.Parameter(b.detach().clone())
        self.out = nn.Linear(width, width)
        self.out.weight, self.out.bias = nn.Parameter(old.out_proj.weight), nn.Parameter(old.out_proj.bias)

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """As nn.MultiheadAttention; no weights are returned."""
        q, k, v = (p(query).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for p in self.projections)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y), None


def split_attention(model: nn.Module) -> None:
    """Replace every nn.MultiheadAttention, in place."""
    for path, m in list(model.named_modules()):
        if isinstance(m, nn.MultiheadAttention):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, SplitAttention(m))


def channel_axis(m: nn.Module, rank: int) -> int:
    """The axis of the channels in operands and results of a module."""
    spatial = isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)) or type(m).__name__ == "LayerNorm2d"
    return 1 if spatial and rank > 1 else rank - 1


class Probe:
    """What was seen at one module: which channels of its operand and result vary, and which of its result are read."""

    def __init__(self, m: nn.Module) -> None:
        self.module = m
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.varies: dict[str, Tensor] = {}
        self.is_read: Tensor | None = None
        self.gradients: list[Tensor] = []

    def see(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Look at one call."""
        given = args[0] if args else next(iter(kwargs.values()))
        if given.is_floating_point():
            self._range("in", given.detach())
        self._range("out", out.detach())
        if out.requires_grad:
            out.register_hook(self._gradient)

    def _range(self, side: str, t: Tensor) -> None:
        flat = t.movedim(channel_axis(self.module, t.dim()), -1).flatten(0, -2)
        low, high = flat.amin(0), flat.amax(0)
        self.low[side] = torch.minimum(low, self.low[side]) if side in self.low else low
        self.high[side] = torch.maximum(high, self.high[side]) if side in self.high else high

    def _gradient(self, g: Tensor) -> None:
        self.gradients.append(g.movedim(channel_axis(self.module, g.dim()), -1).flatten(0, -2).abs().amax(0))

    def settle(self) -> None:
        """The end of a draw of weights: what is seen adds up over draws."""
        for side, low in self.low.items():
            high = self.high[side]
            size = torch.maximum(low.abs(), high.abs()).clamp(min=1e-300)
            found = (high - low) > TOLERANCE * size
            self.varies[side] = self.varies[side] | found if side in self.varies else found
        if self.gradients:
            size = torch.stack(self.gradients).amax(0)
            found = size > TOLERANCE * size.max()
            self.is_read = found if self.is_read is None else self.is_read | found
        self.forget()

    def forget(self) -> None:
        """Drop what was seen since the last `settle`."""
        self.low, self.high, self.gradients = {}, {}, []

    def rows(self) -> Tensor:
        """Channels of the result that have to be computed."""
        varies = self.varies["out"]
        return varies & self.is_read if self.is_read is not None else torch.zeros_like(varies)


def bound(model: nn.Module, make: Callable[[int], tuple[Tensor, ...]]) -> int:
    """Parameters that the weights need, each by itself."""
    model = copy.deepcopy(model).double().eval()
    split_attention(model)
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    probes = {
        path: Probe(m)
        for path, m in model.named_modules()
        if isinstance(m, kinds) or type(m).__name__ in ("Conv1D", "LlamaRMSNorm", "LayerNorm2d")
    }
    for probe in probes.values():
        probe.module.register_forward_hook(probe.see, with_kwargs=True)
    loose = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in probes}
    seen = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in loose.items()}
    original = copy.deepcopy(model.state_dict())
    for draw in range(N_DRAWS):
        g = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in dict.fromkeys(model.parameters()):
                sign = torch.randint(0, 2, p.shape, generator=g) * 2 - 1
                p.mul_(sign * (0.75 + 0.5 * torch.rand(p.shape, generator=g, dtype=p.dtype)))
        recalibrated(model, _double(make(draw + 100)), draw)
        for probe in probes.values():
            probe.forget()
        for seed in range(2):
            outputs = [
                t
                for t in pytree.tree_leaves(model(*_double(make(10 * draw + seed))))
                if isinstance(t, Tensor) and t.requires_grad
            ]
            model.zero_grad()
            loss = sum((y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum() for y in outputs)
            assert isinstance(loss, Tensor)
            loss.backward()
            for n, p in loose.items():
                if p.grad is not None:
                    seen[n] |= p.grad.abs() > TOLERANCE * p.grad.abs().max()
        for probe in probes.values():
            probe.settle()
        model.load_state_dict(original)
    total = _matrices(probes)
    for found in seen.values():
        axis = max(range(found.dim()), key=lambda a: found.shape[a])
        kept = (
            int(found.movedim(axis, -1).flatten(0, -2).any(0).sum()) if found.dim() > 1 else int(found.sum())
        )
        total += kept * found.numel() // found.shape[axis]
    return total


def _double(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in args)


def _matrices(probes: dict[str, Probe]) -> int:
    """Sum over distinct weights; a tied one needs what any of its sites does."""
    needed: dict[int, tuple[Tensor, Tensor, int]] = {}  # rows, columns, elements of one entry
    total = 0
    for probe in probes.values():
        m = probe.module
        if "out" not in probe.varies:
            continue
        rows = probe.rows()
        weight = getattr(m, "weight", None)
        bias = getattr(m, "bias", None)
        total += int(rows.sum()) if isinstance(bias, Tensor) else 0
        if not isinstance(weight, Tensor):
            continue
        if weight.dim() == 1:
            total += int(rows.sum())
            continue
        if isinstance(m, nn.Embedding):
            rows, columns, taps = torch.ones(weight.shape[0], dtype=torch.bool), rows, 1
        elif getattr(m, "groups", 1) > 1:
            total += int(rows.sum()) * weight[0].numel()
            continue
        else:
            w = weight.t() if type(m).__name__ == "Conv1D" else weight
            reads = (w.detach() != 0).flatten(2).any(2) if w.dim() > 2 else w.detach() != 0
            columns = probe.varies["in"] & (reads & rows.unsqueeze(1)).any(0)
            rows = rows & (reads & columns).any(1)
            taps = w[0, 0].numel()
        before = needed.get(id(weight))
        if before is not None:
            rows, columns = rows | before[0], columns | before[1]
        needed[id(weight)] = (rows, columns, taps)
    return total + sum(int(r.sum()) * int(c.sum()) * taps for r, c, taps in needed.values())


def sizes(model: nn.Module) -> tuple[int, float]:
    """Parameters, and parameters with the indices and constants that minimize has stored, in units of 4 bytes."""
    n = sum(p.numel() for p in model.parameters())
    created = set(srfx.report(model).created)
    stored = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name in created)
    return n, n + stored / 4


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    model, args = zoo.build(name), zoo.inputs(name, 2)
    before = sum(p.numel() for p in model.parameters())
    gm = zoo.traced(name, model, args)
    aligned = sizes(srfx.minimize(gm, args))[0]
    ragged, with_indices = sizes(srfx.minimize(gm, args, ragged=True))
    least = bound(model, lambda seed: zoo.inputs(name, 8, seed))
    return {"model": name, "before": before, "aligned": aligned, "ragged": ragged, "indices": round(with_indices - ragged),
            "bound": least, "over_bound": with_indices / least - 1}  # fmt: skip


def text(row: dict[str, Any]) -> str:
    """One line."""
    share = {k: f"{row[k] / row['before']:7.2%}" for k in ("aligned", "ragged", "bound")}
    share["with"] = f"{(row['ragged'] + row['indices']) / row['before']:7.2%}"
    return (
        f"{row['model']:14s} {row['before']:>10d} aligned {share['aligned']} ragged {share['ragged']} "
        f"with indices {share['with']} bound {share['bound']} over it {row['over_bound']:+.2%}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(zoo.NAMES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file that was begun")
    given = parser.parse_args()
    path = given.json
    if path is None and given.names == list(zoo.NAMES):
        path = Path(__file__).parent / "results" / "ragged_bound.json"
    rows = json.loads(path.read_text())["rows"] if given.resume and path is not None and path.exists() else []
    for name in given.names:
        if any(row["model"] == name for row in rows):
            continue
        rows.append(measure(name))
        print(text(rows[-1]), flush=True)
        if path is not None:
            found = {"machine": machine("torchvision", "transformers"), "rows": rows}
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
