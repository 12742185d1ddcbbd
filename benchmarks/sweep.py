"""Minimize every CNN of torchvision and one of each timm family, with random masks; write docs/sweep.md.

    python -m benchmarks.sweep                      all of both collections, both ways of tracing; resumes
    python -m benchmarks.sweep torchvision resnet   those whose name contains "resnet"; nothing is written
    python -m benchmarks.sweep timm -r export --json out/sweep.json
    python -m benchmarks.sweep --fresh              measure again what benchmarks/results/sweep.json has

Each model runs in a process of its own. Columns: parameters before and after (millions), largest error of the output
relative to its largest entry, in float64, at the picture size of tracing and (by torch.fx) at another one, seconds for
minimize(), refusals by reason, ops without a rule by count.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import ROUTES, count, masked, plan_of, recalibrated, relative_error
from tests.snapshots import trace

SIZES = {
    "inception_v3": 96,
    "timm/inception_v4": 96,
    "timm/bat_resnext26ts": 256,
    "timm/botnet26t_256": 256,
    "timm/xcit_nano_12_p16_224": 224,
}
NO_CNN = ("vit_", "swin", "maxvit")
TIMM = (
    "bat_resnext26ts", "botnet26t_256", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "cspdarknet53",
    "cspresnet50", "darknet53", "densenet121", "dla34", "dm_nfnet_f0", "dpn48b", "eca_resnet33ts", "edgenext_xx_small",
    "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_t", "ese_vovnet19b_dw", "fasternet_t0", "fbnetc_100",
    "focalnet_tiny_srf", "gernet_s", "ghostnet_100", "ghostnetv2_100", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "hrnet_w18_small", "inception_next_tiny", "inception_v4", "lcnet_050", "legacy_senet154", "mixnet_s", "mnasnet_small",
    "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0",
    "nf_resnet50", "nfnet_l0", "poolformer_s12", "regnetx_002", "regnety_002", "regnetz_b16", "repghostnet_050", "repvgg_a0",
    "repvit_m0_9", "res2net50_26w_4s", "resnest14d", "resnet10t", "resnet26d", "resnetrs50", "resnetv2_50", "resnext26ts",
    "rexnet_100", "rdnet_tiny", "selecsls42", "semnasnet_075", "seresnet33ts", "sequencer2d_s", "skresnet18",
    "spnasnet_100", "starnet_s1", "test_byobnet", "test_efficientnet", "test_resnet", "tinynet_e", "tf_efficientnetv2_b0",
    "vargface", "vovnet39a", "wide_resnet50_2", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip
EXACT = 1e-9
ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "sweep.json"
PAGE = ROOT / "docs" / "sweep.md"


def torchvision_names() -> list[str]:
    """Every classification model of torchvision that is a convolutional network, quantized ones left out."""
    import torchvision.models as zoo

    return [n for n in zoo.list_models(module=zoo) if not n.startswith(NO_CNN)]


def timm_names() -> list[str]:
    """One small model of each convolutional family that this timm has."""
    import timm

    every = set(timm.list_models())
    return [n for n in TIMM if n in every]


COLLECTIONS = (("torchvision", torchvision_names), ("timm", timm_names))


def build(collection: str, name: str) -> nn.Module:
    """The untrained model in eval mode, float64, without auxiliary heads."""
    torch.manual_seed(0)
    if collection == "torchvision":
        import torchvision.models as zoo

        options: dict[str, Any] = {"weights": None}
        if name in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": False}
        model = zoo.get_model(name, **options)
    else:
        import timm

        model = timm.create_model(name, pretrained=False)
    return model.double().eval()  # type: ignore[no-any-return]


def prepared(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """Random masks, biases and batch norm statistics; the network still carries signal."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or p.dim() == 0 or (p.dim() == 1 and "gain" not in name):
                p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))
    return recalibrated(masked(model, seed, rows=0.3, columns=0.1, zeros=0.3, scales=0.1), (x,))


def largest(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    """Largest relative error; nan when the model itself gives nothing finite."""
    with torch.no_grad():
        wanted, found = model(x), small(x)
    return relative_error(wanted, found) if bool(torch.isfinite(wanted).all()) else float("nan")


def run(
    collection: str, name: str, routes: list[str], seed: int = 0, most: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """One row for each way of tracing; none when the model has more than ``most`` parameters."""
    size = SIZES.get(f"{collection}/{name}", SIZES.get(name, 64))
    g = torch.Generator().manual_seed(seed + 1)
    model = build(collection, name)
    before = count(model)
    if before > most:
        return
    x = torch.randn(2, 3, size, size, generator=g, dtype=torch.float64)
    other = torch.randn(3, 3, size + 32, size, generator=g, dtype=torch.float64)
    prepared(model, torch.randn(4, 3, size, size, generator=g, dtype=torch.float64), seed)
    for route in routes:
        row: dict[str, Any] = {"model": name, "route": route, "before": before}
        try:
            traced = trace(model, (x,), route)
        except (RuntimeError, TypeError, ValueError, torch.fx.proxy.TraceError) as error:
            yield {**row, "skipped": f"does not trace: {type(error).__name__}"}
            continue
        start = time.perf_counter()
        outcome = plan_of(traced, (x,))
        row["seconds"] = time.perf_counter() - start
        row["after"] = count(outcome.small)
        row["error"] = largest(model, outcome.small, x)
        if route == "symbolic":
            try:
                with torch.no_grad():
                    model(other)
            except (RuntimeError, AssertionError):
                pass  # the model itself wants one picture size
            else:
                row["error"] = max(row["error"], largest(model, outcome.small, other))
        row["refusals"] = dict(
            Counter(r.reason.name for r in outcome.refusals if r.reason is not Reason.UNKNOWN_OP)
        )
        row["unknown"] = dict(Counter(r.detail for r in outcome.refusals if r.reason is Reason.UNKNOWN_OP))
        yield row
        del traced, outcome
        gc.collect()


def family(collection: str, name: str) -> str:
    """The file of the collection that defines the model."""
    if collection == "torchvision":
        import torchvision.models as zoo

        return zoo.get_model_builder(name).__module__.rpartition(".")[2]
    import timm

    return timm.model_entrypoint(name).__module__.rpartition(".")[2]  # type: ignore[no-any-return]


def _work(pipe: Connection, *what: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(run(*what))
    except Exception as error:  # noqa: BLE001 - a crash is the row's result
        rows.append({"model": what[1], "failed": f"{type(error).__name__}: {str(error)[:200]}"})
    pipe.send(rows)


def in_child(
    collection: str, name: str, routes: list[str], seed: int, most: float, limit_s: float
) -> list[dict[str, Any]]:
    """`run` in a forked process with a time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_work, args=(theirs, collection, name, routes, seed, most))
    child.start()
    theirs.close()
    try:
        late = {"model": name, "failed": f"no end within {limit_s:.0f} s"}
        rows: list[dict[str, Any]] = ours.recv() if ours.poll(limit_s) else [late]
    except EOFError:
        rows = [{"model": name, "failed": "the process died"}]
    child.kill()
    child.join()
    return [{"collection": collection, "family": family(collection, name), **row} for row in rows]


def text(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    head = f"{row['model']:26s} {row.get('route', ''):8s}"
    if "skipped" in row:
        return f"{head} {row['skipped']}"
    if "failed" in row:
        return f"{head} FAILED {row['failed']}"
    share = 100 * row["after"] / row["before"]
    return (f"{head} {row['before'] / 1e6:8.2f} {row['after'] / 1e6:8.2f} {share:5.1f}% {row['error']:8.1e} "
            f"{row['seconds']:6.1f}s {_notes(row)}")  # fmt: skip


def _notes(row: dict[str, Any]) -> str:
    return " ".join(f"{k}:{v}" for k, v in {**row["refusals"], **row["unknown"]}.items())


def summary(rows: list[dict[str, Any]], collection: str) -> str:
    """A line of counts: what was run, and the largest error."""
    ours = [r for r in rows if r["collection"] == collection]
    cells = [collection, len({r["model"] for r in ours}), len({r["family"] for r in ours if "error" in r})]
    for route in ROUTES:
        cells.append(sum(r.get("route") == route and "error" in r for r in ours))
    cells.append(sum("skipped" in r for r in ours))
    cells.append(sum("failed" in r or not r.get("error", 0.0) <= EXACT for r in ours))
    worst = max((r["error"] for r in ours if "error" in r), default=float("nan"))
    return "| " + " | ".join(map(str, [*cells, f"{worst:.1e}"])) + " |"


def page(rows: list[dict[str, Any]]) -> str:
    """docs/sweep.md."""
    import timm
    import torchvision

    collections = list(dict.fromkeys(r["collection"] for r in rows))
    head = f"""# Convolutional networks

Written by `python -m benchmarks.sweep` (torch {torch.__version__}, torchvision {torchvision.__version__}, timm
{timm.__version__}).

Every classification network of torchvision that is convolutional, and one small network of each convolutional
family of timm: built with random weights, biases and statistics moved away from their defaults, masked (30 % dead
rows with their biases left, 10 % dead columns, 30 % zeros besides, 10 % of the batch norm scales zero), traced by
`torch.fx.symbolic_trace` and by `torch.export.export` with a dynamic batch, minimized. *Error* is the largest
difference of an output relative to its largest entry, in float64, at the picture size of tracing and (symbolic) at a
picture that is larger and not square. *Wrong* counts errors above {EXACT:g} and crashes.

| collection | models | families | symbolic | export | do not trace | wrong | largest error |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
    lines = [summary(rows, c) for c in collections]
    known = {(r["collection"], r["model"]) for r in rows}
    left = [f"{c} {n}" for c, names in COLLECTIONS for n in names() if (c, n) not in known]
    if left:
        lines += ["", f"Not measured yet, {len(left)} models: {', '.join(left)}."]
    lines += ["", "*Kept* is what stays because the op at that site cannot lose it: sites by reason "
              "(`srfx.report` names each), and calls of ops without a rule.", "",
              "| model | traced by | parameters | after | left | error | kept |", "|---|---|---:|---:|---:|---:|---|"]  # fmt: skip
    for r in rows:
        name = f"{r['collection']} {r['model']} | {r.get('route', '')}"
        if "error" not in r:
            lines.append(f"| {name} | | | | | {r.get('skipped', r.get('failed'))} |")
            continue
        share = 100 * r["after"] / r["before"]
        lines.append(
            f"| {name} | {r['before']:,} | {r['after']:,} | {share:.1f} % | {r['error']:.0e} | {_notes(r)} |"
        )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    """Run the sweep, print the table; a run over everything writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection", nargs="?", choices=("torchvision", "timm"))
    parser.add_argument("contains", nargs="?", default="")
    parser.add_argument("-r", "--route", action="append", choices=ROUTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fresh", action="store_true", help="forget the results of an earlier run")
    parser.add_argument(
        "--most", type=float, default=float("inf"), help="leave models with more parameters for later"
    )
    parser.add_argument("--limit-s", type=float, default=1800.0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    is_all = not options.collection and not options.contains and not options.route
    path = options.json or (RESULT if is_all else None)
    rows: list[dict[str, Any]] = []
    if path and path.exists() and not options.fresh:
        rows = json.loads(path.read_text())
    known = {(r["collection"], r["model"]) for r in rows}
    for collection, names in COLLECTIONS:
        if options.collection not in (None, collection):
            continue
        for name in names():
            if options.contains not in name or (collection, name) in known:
                continue
            routes = options.route or list(ROUTES)
            new = in_child(collection, name, routes, options.seed, options.most, options.limit_s)
            rows.extend(new)
            print(*map(text, new), sep="\n", flush=True)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rows, indent=1) + "\n")
    if is_all:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
