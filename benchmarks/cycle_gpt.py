"""How small does a transformer get on source code at the loss of the dense network?

A small GPT over characters reads the sources of Python's own unittest; the last tenth of each file is held out.  The
dense network is trained first.  Then `srfx.SqueezeRelease` goes through its cycles: clear the channels that are missed
least (heads, lanes of heads, hidden channels, channels of the residual stream), train with them held at zero, minimize.
The cycles stop at a size that is set beforehand; the last training follows.  Labels and the dense network's scores
teach in equal parts.  Of the epochs of each phase, the dense network's too, the one with the least held-out loss counts.
Then the dense network is trained for as many epochs more as the small one's last training, to compare with, and in the
end teaches the small one in a second last training.

Run: python -m benchmarks.cycle_gpt [--work out/cycle_gpt] [--threads 1] [--seed 0] [--smaller 6]
A run that was killed goes on behind its last whole phase.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import unittest
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import srfx
from benchmarks.cycle.history import Step, as_data, count, machine, plot, ragged, table, write
from benchmarks.cycle.pruner import LeastMissed
from benchmarks.cycle.training import decayed

N_TOKENS, BATCH = 128, 32
DEPTH, WIDTH, N_HEADS, HIDDEN = 4, 128, 4, 512
EXAMPLE = torch.zeros(2, N_TOKENS, dtype=torch.long)


class Attention(nn.Module):
    """Causal attention with projections of its own for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k, v = (
            part(x).unflatten(-1, (N_HEADS, WIDTH // N_HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The next character from those before it."""

    def __init__(self, n_chars: int) -> None:
        super().__init__()
        self.chars = nn.Embedding(n_chars, WIDTH)
        self.places = nn.Parameter(torch.randn(N_TOKENS, WIDTH) * 0.02)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, n_chars)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * DEPTH) if "out" in name or "mlp.2" in name else 0.02
                )

    def forward(self, text: Tensor) -> Tensor:
        """[B, T] to [B, T, n_chars]."""
        y: Tensor = self.head(self.norm(self.blocks(self.dropout(self.chars(text) + self.places))))
        return y


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    epochs: int
    learning_rate: float
    last_rate: float = 0.0  # share of it at the end of the cosine
    warmup_steps: int = 10


DENSE = Training(24, 1.5e-3, warmup_steps=50)
CYCLE = Training(2, 1.5e-3, last_rate=0.3)
LAST = Training(30, 1.5e-3)
SHARE = 0.25  # of the parameters, cleared in each cycle
MOST_OF_AN_AXIS = 0.25  # of an axis at most: what goes too early from one layer is missed later
TAUGHT = 0.5  # share of the loss that the dense network's scores make
N_BATCHES = 12  # to see what is missed
MOST_CYCLES = 30


class Text:
    """The sources of unittest as numbers of characters."""

    def __init__(self) -> None:
        train, held = b"", b""
        for path in sorted(Path(unittest.__file__).parent.glob("*.py")):
            text = path.read_bytes()
            cut = len(text) * 9 // 10
            train, held = train + text[:cut], held + text[cut:]
        chars = sorted(set(train + held))
        numbers = torch.zeros(256, dtype=torch.long)
        numbers[torch.tensor(chars)] = torch.arange(len(chars))
        self.n_chars, self.train = len(chars), numbers[torch.tensor(list(train))]
        rest = numbers[torch.tensor(list(held))]
        n = (len(rest) - 1) // N_TOKENS * N_TOKENS
        self.held = rest[:n].view(-1, N_TOKENS), rest[1 : n + 1].view(-1, N_TOKENS)
        self.n_batches = len(self.train) // (N_TOKENS * BATCH)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: as many windows at random places as fill the text once."""
        for starts in torch.randint(len(self.train) - N_TOKENS, (self.n_batches, BATCH, 1)):
            windows = self.train[starts + torch.arange(N_TOKENS + 1)]
            yield windows[:, :-1], windows[:, 1:]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean held-out loss, in nats a character, float32."""
        model.eval()
        total = sum(
            float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
            for x, y in zip(self.held[0].split(32), self.held[1].split(32), strict=True)
        )
        return total / self.held[0].numel()


def train(text: Text, model: nn.Module, how: Training, name: str, teacher: nn.Module | None = None) -> float:
    """Train in place; the least held-out loss after an epoch, with the weights of that epoch."""
    started = time.monotonic()
    optimizer = torch.optim.AdamW(
        decayed(list(model.parameters()), 0.1), how.learning_rate, betas=(0.9, 0.99), fused=True
    )
    best, kept, step = math.inf, {}, 0
    for epoch in range(how.epochs):
        model.train()
        for x, y in text.batches():
            falling = 0.5 * (1 + math.cos(math.pi * step / (how.epochs * text.n_batches)))
            rate = how.learning_rate * (how.last_rate + (1 - how.last_rate) * falling)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / how.warmup_steps)
            optimizer.zero_grad()
            loss_of(model, x, y, teacher).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        held = text.loss(model)
        print(f"  {name} epoch {epoch} held out {held:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if held < best:
            best, kept = held, {key: t.clone() for key, t in model.state_dict().items()}
    model.load_state_dict(kept)
    model.eval()
    return best


def loss_of(model: nn.Module, x: Tensor, y: Tensor, teacher: nn.Module | None) -> Tensor:
    """Cross entropy with the text, and with the scores of a teacher."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
        with torch.no_grad():
            wanted = None if teacher is None else teacher(x)
    scores = scores.float().flatten(0, 1)
    loss = F.cross_entropy(scores, y.flatten())
    if wanted is None:
        return loss
    taught = F.kl_div(
        scores.log_softmax(1),
        wanted.float().flatten(0, 1).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - TAUGHT) * loss + TAUGHT * taught


def trained(
    text: Text, work: Path, name: str, model: nn.Module, how: Training, teacher: nn.Module | None = None
) -> nn.Module:
    """A network trained in one phase, or what is kept of it."""
    kept = work / f"{name}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        train(text, model, how, name, teacher)
        torch.save(model.state_dict(), kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return model.eval()


def cycle_of(text: Text, dense: nn.Module, work: Path, seed: int) -> srfx.SqueezeRelease:
    """The cycle of this benchmark; no loss is refused, the size alone ends it."""

    def clear(model: nn.Module, share: float) -> None:
        least = LeastMissed(srfx.channel_groups(model, EXAMPLE), model)
        for _, (x, y) in zip(range(N_BATCHES), text.batches(), strict=False):
            model.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            least.add()
        model.zero_grad()
        least.clear(share, MOST_OF_AN_AXIS)

    def teach(model: nn.Module, phase: srfx.cycle.Phase) -> None:
        if phase.name != "train":
            how = CYCLE if phase.name == "squeeze" else LAST
            train(text, model, how, f"{phase.name} {phase.cycle}", dense)

    return srfx.SqueezeRelease(
        dense,
        teach,
        text.loss,
        EXAMPLE,
        cycles=MOST_CYCLES,
        pruner=clear,
        amount=SHARE,
        prunable=lambda name: True,  # biases of cleared channels are held at zero too
        noise=None,  # whole groups go: there is nothing left to release
        tolerance=math.inf,
        mode="min",
        patience=MOST_CYCLES,
        seed=seed,
        checkpoint=work / "cycle",
        progress=False,
    )


def main() -> None:
    """Run, print the table, write the JSON and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("out/cycle_gpt"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smaller", type=float, default=6.0, help="how many times fewer parameters to stop at"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    text, work = Text(), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    dense = trained(text, work, "dense", GPT(text.n_chars), DENSE)
    steps = [Step(0, count(dense), text.loss(dense), 0.0)]
    cycle = cycle_of(text, dense, work, arguments.seed)
    stop_at(cycle, arguments.smaller)
    for record in cycle:
        stop_at(cycle, arguments.smaller)
        if record.score is not None:
            print(record, flush=True)
    for cycle_number in range(1, cycle.cycles + 1):
        records = [r for r in cycle.history if r.cycle == cycle_number and r.phase != "finetune"]
        score = records[-1].score
        assert score is not None
        steps.append(Step(cycle_number, records[-1].n_parameters, score, sum(r.seconds for r in records)))
    last = cycle.history[-1]
    assert last.score is not None
    steps.append(Step(last.cycle + 1, last.n_parameters, last.score, last.seconds))
    runs = {"cycles": steps}
    report(runs, arguments, dense, cycle)
    torch.manual_seed(arguments.seed)
    longer = trained(text, work, "longer", copy.deepcopy(dense), LAST)
    runs["dense, trained longer"] = [steps[0], Step(1, count(longer), text.loss(longer), 0.0)]
    report(runs, arguments, dense, cycle)
    assert cycle.best is not None
    small = trained(text, work, "taught again", copy.deepcopy(cycle.best), LAST, longer)
    steps.append(Step(steps[-1].phase + 1, count(small), text.loss(small), 0.0))
    report(runs, arguments, dense, cycle)


def stop_at(cycle: srfx.SqueezeRelease, smaller: float) -> None:
    """No further cycle once the network is small enough; the last training follows."""
    minimized = [r for r in cycle.history if r.phase == "minimize"]
    if minimized and minimized[-1].ratio >= smaller:
        cycle.cycles = minimized[-1].cycle


def report(
    runs: dict[str, list[Step]], arguments: argparse.Namespace, dense: nn.Module, cycle: srfx.SqueezeRelease
) -> None:
    """Print the table, write the JSON and the plot."""
    print(table(runs, "loss"), flush=True)
    assert cycle.best is not None
    write(
        "cycle_gpt",
        {
            "machine": machine(),
            "seed": arguments.seed,
            "smaller": arguments.smaller,
            "phases": {
                name: asdict(how) for name, how in (("dense", DENSE), ("cycle", CYCLE), ("last", LAST))
            },
            "share": SHARE,
            "most_of_an_axis": MOST_OF_AN_AXIS,
            "taught": TAUGHT,
            "runs": as_data(runs),
            "ragged": ragged(cycle.best, EXAMPLE),
            "shapes": {name: list(p.shape) for name, p in cycle.best.named_parameters()},
        },
    )
    dense_loss = runs["cycles"][0].score
    plot(
        "cycle_gpt",
        {"cycles": runs["cycles"]},
        f"GPT, {count(dense):,} parameters, characters of source code",
        "held-out loss",
        dense_loss * 1.01,
    )


if __name__ == "__main__":
    main()
