"""Minimize every CNN of torchvision and one of each timm family, with random masks; print a table.

    python -m benchmarks.sweep                      all of both collections, both ways of tracing
    python -m benchmarks.sweep torchvision resnet   those whose name contains "resnet"
    python -m benchmarks.sweep timm -r export --json out/sweep.json

Columns: parameters before and after (millions), largest error of the output relative to its largest entry, in
float64, at the picture size of tracing and (by torch.fx) at another one, seconds for minimize(), refusals by
reason, ops without a rule by count.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import count, masked, plan_of, recalibrated, relative_error
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
LIMIT = 150_000_000


def torchvision_names() -> list[str]:
    """Every classification model of torchvision that is a convolutional network, quantized ones left out."""
    import torchvision.models as zoo

    return [n for n in zoo.list_models(module=zoo) if not n.startswith(NO_CNN)]


def timm_names() -> list[str]:
    """One small model of each convolutional family that this timm has."""
    import timm

    every = set(timm.list_models())
    return [n for n in TIMM if n in every]


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


def run(collection: str, name: str, routes: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row for each way of tracing."""
    size = SIZES.get(f"{collection}/{name}", SIZES.get(name, 64))
    g = torch.Generator().manual_seed(seed + 1)
    model = build(collection, name)
    before = count(model)
    if before > LIMIT:
        yield {"model": name, "skipped": f"{before / 1e6:.0f} M parameters"}
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


def text(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['model']:26s} {row.get('route', ''):8s}"
    if "skipped" in row:
        return f"{head} {row['skipped']}"
    if "failed" in row:
        return f"{head} FAILED {row['failed']}"
    share = 100 * row["after"] / row["before"]
    notes = " ".join(f"{k}:{v}" for k, v in {**row["refusals"], **row["unknown"]}.items())
    return (f"{head} {row['before'] / 1e6:8.2f} {row['after'] / 1e6:8.2f} {share:5.1f}% {row['error']:8.1e} "
            f"{row['seconds']:6.1f}s {notes}")  # fmt: skip


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection", nargs="?", choices=("torchvision", "timm"))
    parser.add_argument("contains", nargs="?", default="")
    parser.add_argument("-r", "--route", action="append", choices=("symbolic", "export"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for collection, names in (("torchvision", torchvision_names), ("timm", timm_names)):
        if options.collection not in (None, collection):
            continue
        for name in names():
            if options.contains not in name:
                continue
            try:
                for row in run(collection, name, options.route or ["symbolic", "export"], options.seed):
                    rows.append(row)
                    print(text(row), flush=True)
            except (
                ArithmeticError,
                AssertionError,
                AttributeError,
                LookupError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                rows.append({"model": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"})
                print(text(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
