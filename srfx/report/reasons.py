"""For each layer of a report: why its channels stayed."""

from __future__ import annotations

from torch import nn

from srfx.errors import UnknownChannelError
from srfx.explain import Explanation, Reasons

MAX_ODD = 4
"""How many channels that nothing reads are told one by one."""


def explained(small: nn.Module, tensors: dict[str, str]) -> dict[str, str]:
    """Text for each layer: one chain of reads, and the channels that are there for another reason.

    Args:
        small: a result of `srfx.minimize`.
        tensors: layer -> name of its weight.
    """
    reasons = Reasons(small)
    found: dict[str, str] = {}
    for layer, tensor in tensors.items():
        try:
            every = _of(reasons, tensor)
        except UnknownChannelError:
            continue  # a tensor that minimize made
        if not every:
            continue
        odd = [e for e in every if not e.steps and e.reason not in ("OUTPUT", "UNTRACKED_AXIS")]
        usual = next((e for e in every if e not in odd), None)
        lines = [] if usual is None else [str(usual)]
        lines += [str(e) for e in odd[:MAX_ODD]]
        if len(odd) > MAX_ODD:
            lines.append(f"and {len(odd) - MAX_ODD} more channels that nothing reads")
        found[layer] = "\n".join(lines)
    return found


def _of(reasons: Reasons, tensor: str) -> list[Explanation]:
    """One explanation for each kept channel that nothing reads, and for the first of the others."""
    kept = sorted(set(reasons.plan.kept(tensor, 0).flatten().tolist()))
    found: list[Explanation] = []
    has_usual = False
    for channel in kept:
        is_read = reasons.is_read(tensor, channel)
        if (not is_read and len(found) <= MAX_ODD) or (is_read and not has_usual):
            found.append(reasons.explain(tensor, channel))
            has_usual = has_usual or is_read
    return found
