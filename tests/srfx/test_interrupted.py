"""Threads and Ctrl-C: minimize leaves the model, and what torch keeps for the whole process, as they were."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import srfx
from tests.helpers import kill, randomized, shapes
from tests.snapshots import assert_unchanged, snapshot

POINTS = {"module": 10, "graph": 5, "exported": 3}


class Small(nn.Module):
    """A bit of everything: masks, attention, a norm, an in-place op."""

    def __init__(self, dead: int = 2) -> None:
        super().__init__()
        self.front, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mid, self.back = nn.Linear(8, 12), nn.Linear(12, 3)
        randomized(self)
        kill(self.mid, rows=list(range(dead)))
        prune.custom_from_mask(self.back, "weight", (torch.rand(3, 12) < 0.7).float())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.front(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.back(torch.relu_(self.mid(x)))


def _process_state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mha.get_fastpath_enabled(),
        nn.Module.__call__,
        nn.Module.__getattr__,
        torch.utils._python_dispatch._len_torch_dispatch_stack(),
        torch.overrides._len_torch_function_stack(),
    )


def _calls(run: Callable[[], Any], stop_at: int | None) -> int:
    """Run, counting calls of our own functions; Ctrl-C at one of them.

    Generators are left out: one that is thrown away is called once more to close, and what it raises then is ignored.
    """
    count = 0

    def watch(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        name = frame.f_globals.get("__name__", "")
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
        if event != "call" or is_generator or not name.startswith("srfx") or sys.is_finalizing():
            return
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("form", ["module", "graph", "exported"])
def test_interrupted_at_any_moment_nothing_has_changed(form: str) -> None:
    model: nn.Module = Small()
    x = torch.randn(2, 4, 6)
    given: Any = model
    if form == "graph":
        given = fx.symbolic_trace(model)
    elif form == "exported":
        given = torch.export.export(model, (x,), strict=False)
    watched = given if isinstance(given, nn.Module) else model
    before, state = snapshot(watched), _process_state()
    total = _calls(lambda: srfx.minimize(given, (x,)), None)
    wanted = shapes(srfx.minimize(given, (x,)))
    for i in range(POINTS[form]):
        with pytest.raises(KeyboardInterrupt):
            _calls(lambda: srfx.minimize(given, (x,)), 1 + i * (total - 1) // POINTS[form])
        assert_unchanged(watched, before)
        assert _process_state() == state
    assert shapes(srfx.minimize(given, (x,))) == wanted


def test_threads_do_not_disturb_each_other() -> None:
    models = [Small(dead) for dead in range(1, 5)]
    x = torch.randn(2, 4, 6)
    wanted = [shapes(srfx.minimize(model, (x,))) for model in models]
    state = _process_state()

    def work(model: nn.Module) -> dict[str, tuple[int, ...]]:
        with torch.no_grad():
            small = srfx.minimize(model, (x,))
        assert torch.is_grad_enabled()
        return shapes(small)

    try:
        torch.set_default_dtype(torch.float64)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, models)) == wanted
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert _process_state() == state
