"""Minimize a small transformer of every common kind, with masks of every kind; write the table of docs/models.md.

    python -m benchmarks.models                     all, and write docs/models.md and benchmarks/results/models.json
    python -m benchmarks.models llama gemma         those whose name contains one of these; nothing is written
    python -m benchmarks.models --json out/m.json   write the numbers elsewhere
    python -m benchmarks.models --resume            go on where a run of this version was stopped
    python -m benchmarks.models --no-probe          leave the completeness probe out (most of the time)

Each model is exported in a process of its own (dynamic batch, under no_grad), float64 throughout: the float32 that
transformers casts to in norms and rotary angles is replaced in the graph, so that the error of the rewrite is not
hidden behind rounding.  Columns: parameters before and after, largest error of any output relative to its largest
entry (at another batch size too), refusals by reason, ops without a rule by count.  The completeness probe
(`srfx.testing.probe`) draws the weights anew and tells which classes of channels could go; how many of them do is counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import srfx
import srfx.testing
from benchmarks.hf_models import KINDS, Inputs, build, example, mask

ROOT = Path(__file__).parent.parent
EXACT = 1e-9
ENOUGH = 0.8
N_DRAWS = 2


def double_throughout(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every float32 in the arguments, and every float32 tensor, by float64; in place."""
    for node in [n for n in gm.graph.nodes if _is_made_float(n)]:
        node.kwargs = {**node.kwargs, "dtype": torch.float64}
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
            continue
        node.args, node.kwargs = pytree.tree_map(_wide, (node.args, node.kwargs))
        node.meta.pop("tensor_meta", None)
        recorded = node.meta.get("val")
        if isinstance(recorded, Tensor) and recorded.dtype == torch.float32:
            node.meta["val"] = recorded.to(torch.float64)  # a fake tensor: which sizes are fixed stays known
    for module in gm.modules():
        for name, tensor in list(vars(module).items()):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                setattr(module, name, tensor.double())
    gm.double()
    gm.recompile()
    return gm


def _is_made_float(node: fx.Node) -> bool:
    """Whether a call makes a float tensor from nothing in the default dtype."""
    made, schema = node.meta.get("val"), getattr(node.target, "_schema", None)
    if not isinstance(made, Tensor) or not made.is_floating_point() or schema is None:
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return (
        not tensors and any(a.name == "dtype" for a in schema.arguments) and node.kwargs.get("dtype") is None
    )


def _wide(raw: Any) -> Any:
    return torch.float64 if isinstance(raw, torch.dtype) and raw == torch.float32 else raw


def traced(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The exported graph with dynamic batch, all in float64."""
    batch = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            model, (), kwargs=inputs, strict=False, dynamic_shapes={k: {0: batch} for k in inputs}
        )
    return double_throughout(program.module(check_guards=False))


def error(before: nn.Module, after: nn.Module, inputs: Inputs) -> float:
    """Largest difference of any float output, relative to its largest entry; inf where shapes differ or nan came."""
    with torch.no_grad():
        wanted, found = (pytree.tree_leaves(m(**inputs)) for m in (before, after))
    worst = 0.0
    if len(wanted) != len(found):
        return float("inf")
    for a, b in zip(wanted, found, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.is_floating_point() and a.numel():
            here = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
            worst = max(worst, here if here == here else float("inf"))
    return worst


def parameters(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def measure(name: str, with_probe: bool = True) -> dict[str, Any]:
    """One row of the table."""
    kind = KINDS[name]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"name": name, "status": "no export"}
    try:
        model = build(kind)
        mask(kind, model)
        before = traced(model, example(kind))
    except Exception as e:  # noqa: BLE001 - whatever stops transformers or export is the row's result
        return row | {"message": f"{type(e).__name__}: {str(e)[:200]}"}
    row |= {"status": "crash", "before": parameters(before)}
    try:
        start = time.perf_counter()
        small = srfx.minimize(before, example_kwargs=example(kind))
        row["seconds"] = time.perf_counter() - start
        row["after"] = parameters(small)
        again = error(before, small, example(kind, batch=5, seed=1))
        row["error"] = max(error(before, small, example(kind)), again)
        row["magnitude"] = magnitude(before, example(kind))
    except Exception as e:  # noqa: BLE001 - a crash is the row's result
        return row | {"message": f"{type(e).__name__}: {str(e)[:300]}", "trace": traceback.format_exc()}
    found = srfx.report(small)
    reasons: Counter[str] = Counter()
    for note in found.refusals:
        reasons[note.reason] += 1
    row["refusals"] = dict(reasons.most_common())
    row["sites"] = [f"{n.node}: {n.reason} {n.detail} {n.n_channels}" for n in found.refusals]
    row["revived"] = found.revived
    row["unknown"] = dict(sorted(found.unknown_ops.items(), key=lambda item: -item[1]))
    if with_probe:
        row |= completeness(before, example(kind))
    return row | {"status": "exact" if row["error"] <= EXACT else "WRONG"}


def completeness(model: fx.GraphModule, inputs: Inputs) -> dict[str, Any]:
    """How many classes of channels could go, and how many do; why the others stay, by reason."""
    try:
        seen = srfx.testing.probe(model, example_kwargs=inputs, n_draws=N_DRAWS, max_draws=N_DRAWS)
    except Exception as e:  # noqa: BLE001 - a model that cannot be run on other weights is the row's result
        return {"probe_message": f"{type(e).__name__}: {str(e)[:200]}"}
    return {
        "removable": seen.n_removable,
        "gone": seen.n_gone,
        "held": seen.n_held,
        "stay": seen.reasons,
    }


def magnitude(model: nn.Module, inputs: Inputs) -> float:
    """Largest entry of any float output: that the comparison compares something."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**inputs))
    return max(float(t.abs().max()) for t in leaves if isinstance(t, Tensor) and t.is_floating_point())


def _work(name: str, pipe: Connection, with_probe: bool) -> None:
    pipe.send(measure(name, with_probe))


def in_child(name: str, limit_s: float, with_probe: bool) -> dict[str, Any]:
    """`measure` in a forked process with a time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_work, args=(name, theirs, with_probe))
    child.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv() if ours.poll(limit_s) else {"name": name, "status": "time"}
    except EOFError:
        row = {"name": name, "status": "crash", "message": "the process died"}
    child.kill()
    child.join()
    return row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "error" not in row:
        return f"{row['name']:16} {row['status']:9} {row.get('message', '')[:150]}"
    share = 100 * row["after"] / row["before"]
    return (
        f"{row['name']:16} {row['status']:6} {row['before']:8,} -> {row['after']:8,} {share:5.1f} % "
        f"{row['error']:.0e} {row['seconds']:5.1f} s  {_went(row)}  {_counts(row['refusals'])}  {_counts(row['unknown'])}"
    )


def _went(row: dict[str, Any]) -> str:
    """Of the classes that could go, those that do."""
    if "removable" not in row:
        return ""
    share = 100 * row["gone"] / row["removable"] if row["removable"] else 100.0
    return f"{row['gone']} of {row['removable']} ({share:.0f} %)"


def _counts(found: dict[str, int], n: int = 3) -> str:
    return ", ".join(f"{k} {v}" for k, v in list(found.items())[:n])


def page(rows: list[dict[str, Any]]) -> str:
    """docs/models.md."""
    done = [r for r in rows if "error" in r]
    exact = [r for r in done if r["status"] == "exact"]
    probed = [r for r in done if "removable" in r]
    complete = [r for r in probed if r["gone"] >= ENOUGH * r["removable"]]
    strictly = [r for r in probed if r["gone"] >= ENOUGH * (r["removable"] + r["held"])]
    head = f"""# Transformer models

Written by `python -m benchmarks.models` (torch {torch.__version__}, transformers {_version()}).

{len(rows)} models of the transformers library, built small with random weights, each with dead rows (biases left),
dead columns, random zeros, one dead head and, where the model has one residual stream, a fifth of its channels dead.
Exported with a dynamic batch, run in float64 at two batch sizes. {len(exact)} of {len(done)} that export are exact
(largest error of an output, relative to its largest entry, at most {EXACT:g}).

*Left* is the share of the parameters that stays. *Went* counts classes of tied channels: of those that the
completeness probe (`srfx.testing.probe`, {N_DRAWS} draws of other weights with the same zeros) calls removable, so many
go. {len(complete)} of {len(probed)} models lose at least {ENOUGH:.0%}. *Held* are classes that are not needed either, but that
heads, groups and copies which keep equally many channels hold ([testing.md](testing.md)); were they to count as removable,
{len(strictly)} models would lose at least {ENOUGH:.0%}. *Stay* says why the others do not go, by the reasons listed there: WHOLE, a few
columns that a norm would take longer to leave out than its readers save; READ, a constant that a norm, or a query that may see
no key, makes something else of. *Refused* counts sites by reason (`srfx.report` names each);
*no rule* counts calls of ops that are barriers.

| model | parameters | after | left | error | went | held | stay | refused | no rule |
|---|---:|---:|---:|---:|---:|---:|---|---|---|
"""
    lines = []
    for r in rows:
        if "error" in r:
            share = f"{100 * r['after'] / r['before']:.1f} %"
            wrong = "" if r["status"] == "exact" else " **wrong**"
            lines.append(
                f"| {r['name']} | {r['before']:,} | {r['after']:,} | {share} | {r['error']:.0e}{wrong} | "
                f"{_went(r)} | {r.get('held', '')} | {_counts(r.get('stay', {}))} | {_counts(r['refusals'])} | "
                f"{_counts(r['unknown'])} |"
            )
        else:
            what = r.get("message", "").splitlines() or [""]
            lines.append(f"| {r['name']} | | | | {r['status']} | | | | {what[0][:80]} | |")
    return head + "\n".join(lines) + "\n"


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit-s", type=float, default=180.0)
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has already")
    parser.add_argument("--verbose", action="store_true", help="every refusal, and where a crash came from")
    args = parser.parse_args()
    names = [n for n in KINDS if not args.names or any(part in n for part in args.names)]
    path = args.json or (None if args.names else ROOT / "benchmarks" / "results" / "models.json")
    done = {}
    if args.resume and path is not None and path.exists():
        done = {row["name"]: row for row in json.loads(path.read_text())}
    rows = []
    for name in names:
        rows.append(done[name] if name in done else in_child(name, args.limit_s, not args.no_probe))
        print(line(rows[-1]), flush=True)
        if args.verbose:
            print(rows[-1].get("trace", ""), *rows[-1].get("sites", []), sep="\n    ")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    if not args.names:
        (ROOT / "docs" / "models.md").write_text(page(rows))


if __name__ == "__main__":
    main()
