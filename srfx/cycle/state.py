"""Nested states (optimizers, schedulers, random generators) as JSON and named tensors, and back.  No pickle.

Only plain data goes through: dict, list, tuple, Counter, numbers, strings, None and tensors.  Everything else is refused
with the place where it stands.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srfx.errors import CycleError


def pack(value: Any, tensors: dict[str, Tensor], where: str = "state") -> Any:
    """A JSON-able description of ``value``; its tensors are added to ``tensors`` by the name of their place.

    Raises:
        CycleError: something that is no plain data.

    Example:
        >>> held = {}
        >>> data = pack({"a": (1, torch.ones(2))}, held)
        >>> sorted(held), unpack(data, held)["a"][0]
        (['state.a.1'], 1)
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        if not all(k is None or isinstance(k, (bool, int, float, str)) for k in value):
            raise CycleError(f"{where} has keys that are no plain data; it cannot go into a checkpoint")
        return {kind: [[k, pack(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    raise CycleError(f"{where} is a {type(value).__name__}; a checkpoint holds plain data and tensors only")


def unpack(data: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` described."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        found = {k: unpack(v, tensors) for k, v in content}
        return Counter(found) if kind == "counter" else found
    items = [unpack(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)


def random_states() -> dict[str, Any]:
    """States of the generators of Python, NumPy (if it was imported) and torch, of every CUDA device in use."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (name, keys.tolist(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_random_states(found: dict[str, Any]) -> None:
    """Put the generators where they were."""
    random.setstate(found["python"])
    torch.set_rng_state(found["torch"])
    if "numpy" in found:
        import numpy  # only when it was in use

        numpy.random.set_state(found["numpy"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(found["cuda"])


def group_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each group.

    Raises:
        CycleError: one that is not the model's.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    found = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    if any("" in group for group in found):
        raise CycleError(
            "the optimizer holds parameters that are not the model's: a checkpoint cannot keep them"
        )
    return found


def rebind(optimizer: Optimizer, names: list[list[str]], model: nn.Module) -> None:
    """Make an optimizer hold the parameters of these names, those that there are, without state."""
    if len(names) != len(optimizer.param_groups):
        raise CycleError(f"the optimizer has {len(optimizer.param_groups)} groups, expected {len(names)}")
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[n] for n in members if n in parameters]
        if "param_names" in group:
            group["param_names"] = [n for n in members if n in parameters]


def state_of(value: Any) -> Any:
    """State of a torch.Generator, or of an object with ``state_dict``."""
    return value.get_state() if isinstance(value, torch.Generator) else value.state_dict()


def load_state(value: Any, state: Any) -> None:
    """Put it back."""
    if isinstance(value, torch.Generator):
        value.set_state(state)
    else:
        value.load_state_dict(state)


def seed_all(seed: int) -> None:
    """Seed the generators of Python and torch."""
    random.seed(seed)
    torch.manual_seed(seed)
