"""How small does a transformer get on source code at the loss of the dense network?

A small GPT over bytes reads the sources of Python's own asyncio; the last tenth of each file is held out.  The dense
network is trained first.  Then, in cycles: clear what is missed least (heads, lanes of heads, hidden channels, channels
of the residual stream), `srfx.minimize`, train on.  The cycles stop at a size that is set beforehand.  Of the epochs of
each phase, the dense network's too, the one with the least held-out loss counts.

Run: python -m benchmarks.cycle_gpt [--work out/cycle_gpt] [--threads 1] [--seed 0] [--smaller 6]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, fx, nn
from torch.nn import functional as F

import srfx
from benchmarks.cycle.history import Step, as_data, count, machine, plot, table, write
from benchmarks.cycle.pruner import LeastMissed
from benchmarks.cycle.training import decayed

N_BYTES, N_TOKENS, BATCH = 256, 128, 32
DEPTH, WIDTH, N_HEADS, HIDDEN = 4, 192, 6, 768
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
    """The next byte from the bytes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(N_BYTES, WIDTH)
        self.places = nn.Parameter(torch.randn(N_TOKENS, WIDTH) * 0.02)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, N_BYTES)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * DEPTH) if "out" in name or "mlp.2" in name else 0.02
                )

    def forward(self, text: Tensor) -> Tensor:
        """[B, T] to [B, T, 256]."""
        y: Tensor = self.head(self.norm(self.blocks(self.dropout(self.bytes(text) + self.places))))
        return y


@dataclass(frozen=True)
class Phase:
    """How long and how fast to train."""

    epochs: int
    learning_rate: float
    last_rate: float = 0.0
    warmup_steps: int = 50


DENSE = Phase(15, 1e-3)
CYCLE = Phase(3, 1e-3, last_rate=0.3)
LAST = Phase(6, 1e-3)
SHARES = (*[0.25] * 7, 0.5)  # of the parameters, cleared in each cycle; the last one goes on
N_BATCHES = 12


def load_text() -> tuple[Tensor, Tensor]:
    """Sources of asyncio as bytes: what is trained on, and what is held out."""
    train, held = [], []
    for path in sorted(Path(asyncio.__file__).parent.glob("*.py")):
        text = path.read_bytes()
        cut = len(text) * 9 // 10
        train.append(text[:cut])
        held.append(text[cut:])
    return tuple(torch.tensor(list(b"".join(part))) for part in (train, held))  # type: ignore[return-value]


class Run:
    """Phases with numbers, each made once and kept."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.text, held = load_text()
        n = (len(held) - 1) // N_TOKENS
        self.held = held[: n * N_TOKENS].view(n, N_TOKENS), held[1 : n * N_TOKENS + 1].view(n, N_TOKENS)
        work.mkdir(parents=True, exist_ok=True)

    def generator(self, phase: int) -> Generator:
        """The random numbers of one phase, whatever was run before it."""
        return Generator().manual_seed(self.seed * 1000 + phase)

    def batches(self, generator: Generator) -> list[tuple[Tensor, Tensor]]:
        """One epoch: as many windows at random places as fill the text once."""
        n = len(self.text) // (N_TOKENS * BATCH)
        starts = torch.randint(len(self.text) - N_TOKENS, (n, BATCH, 1), generator=generator)
        windows = [self.text[start + torch.arange(N_TOKENS + 1)] for start in starts]
        return [(w[:, :-1], w[:, 1:]) for w in windows]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean held-out loss, in nats a byte, float32."""
        model.eval()
        total = sum(
            float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
            for x, y in zip(self.held[0].split(32), self.held[1].split(32), strict=True)
        )
        return total / self.held[0].numel()

    def train(self, model: nn.Module, how: Phase, phase: int) -> float:
        """Train in place; the least held-out loss after an epoch, with the weights of that epoch."""
        generator, started = self.generator(phase), time.monotonic()
        torch.manual_seed(self.seed * 1000 + phase)  # dropout takes no generator
        optimizer = torch.optim.AdamW(
            decayed(list(model.parameters()), 0.1), how.learning_rate, betas=(0.9, 0.99), fused=True
        )
        best, kept, step = math.inf, {}, 0
        total = how.epochs * (len(self.text) // (N_TOKENS * BATCH))
        for epoch in range(how.epochs):
            model.train()
            for x, y in self.batches(generator):
                falling = 0.5 * (1 + math.cos(math.pi * step / total)) * (1 - how.last_rate) + how.last_rate
                for group in optimizer.param_groups:
                    group["lr"] = how.learning_rate * min(1.0, (step + 1) / how.warmup_steps) * falling
                with torch.autocast("cpu", torch.bfloat16):
                    scores = model(x)
                loss = F.cross_entropy(scores.float().flatten(0, 1), y.flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
            held = self.loss(model)
            print(
                f"  phase {phase} epoch {epoch} loss {float(loss.detach()):.4f} held out {held:.4f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            if held < best:
                best, kept = held, {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict(kept)
        model.eval()
        return best

    def dense(self) -> fx.GraphModule:
        """The network that all is measured against."""
        torch.manual_seed(self.seed)
        model = GPT()
        kept = self.work / "dense.pt"
        if kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True))
        else:
            self.train(model, DENSE, 0)
            torch.save(model.state_dict(), kept)
        return fx.symbolic_trace(model.train())

    def smaller(
        self, model: fx.GraphModule, phase: int, how: Phase, share: float
    ) -> tuple[fx.GraphModule, Step]:
        """One cycle, or what is kept of it."""
        kept = self.work / f"{'phase' if share else 'last'}{phase}.pt"
        if kept.exists():
            small, step = torch.load(kept, weights_only=False)  # of our own making
            return small, step
        started, small, worst = time.monotonic(), model, 0.0
        if share:
            least = LeastMissed(srfx.channel_groups(model, EXAMPLE), model)
            for x, y in self.batches(self.generator(1000 + phase))[:N_BATCHES]:
                model.zero_grad()
                F.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten()).backward()
                least.add()
            model.zero_grad()
            least.clear(share)
            small = srfx.minimize(model, EXAMPLE)
            with torch.no_grad():
                scores = model(self.held[0][:8])
                worst = float((small.eval()(self.held[0][:8]) - scores).abs().max() / scores.abs().max())
        loss = self.train(small, how, phase)
        step = Step(phase, count(small), loss, time.monotonic() - started, worst)
        torch.save((small, step), kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
        return small, step


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
    parser.add_argument("--skip-last", action="store_true", help="stop behind the last cycle")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    run = Run(arguments.work, arguments.seed)
    model = run.dense()
    steps = [Step(0, count(model), run.loss(model), 0.0, 0.0)]
    print(steps[0], flush=True)
    while count(model) * arguments.smaller > steps[0].n_parameters:
        model, step = run.smaller(model, len(steps), CYCLE, SHARES[min(len(steps), len(SHARES)) - 1])
        steps.append(step)
        print(step, flush=True)
    if not arguments.skip_last:
        model, step = run.smaller(model, len(steps), LAST, 0.0)
        steps.append(step)
    runs = {"cycles": steps}
    print(table(runs, "loss"))
    write(
        "cycle_gpt",
        {
            "machine": machine(),
            "seed": arguments.seed,
            "smaller": arguments.smaller,
            "phases": {
                name: asdict(how) for name, how in (("dense", DENSE), ("cycle", CYCLE), ("last", LAST))
            },
            "shares": SHARES,
            "runs": as_data(runs),
            "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        },
    )
    plot(
        "cycle_gpt",
        runs,
        "GPT, 1.9 M parameters, bytes of source code",
        "held-out loss",
        steps[0].score * 1.01,
    )


if __name__ == "__main__":
    main()
