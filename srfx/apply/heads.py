"""Numbers that a module of the user keeps about its layers: head counts, head sizes, widths.

Modules outside torch.nn hold such numbers as plain attributes.  They are told by their values: an attribute that equals
the old length of an axis of the module's tensors takes the new length, one that equals the number or the size of heads of
a layer whose rows were cut head by head takes the new ones.
"""

from __future__ import annotations

from torch import Tensor, nn

from srfx.record.keep_plan import KeepPlan, TensorPlan


def own_sizes(module: nn.Module, plans: dict[str, TensorPlan]) -> dict[str, int]:
    """New values of the int attributes of a module with tensors of its own.

    Args:
        module: a module outside torch.nn.
        plans: of its own tensors, by attribute.
    """
    lengths: dict[int, int] = {}
    for tensor in sorted(plans.values(), key=lambda t: -len(t.shape)):  # a bias says best what the output is
        for old, new in zip(tensor.shape, tensor.kept_shape or (), strict=False):
            lengths[old] = new
    return {k: lengths[v] for k, v in _ints(module).items() if v in lengths and lengths[v] != v}


def head_sizes(module: nn.Module, path: str, plan: KeepPlan) -> dict[str, int]:
    """New values of the int attributes of a module whose layers lost rows head by head."""
    found: dict[str, int] = {}
    known = _ints(module)
    for name in _layers(module, path):
        kept = _rows(plan, name)
        if kept is None:
            continue
        n_old, positions = kept
        for size_name, size in known.items():
            if "head" not in size_name or not 1 < size < n_old or n_old % size:
                continue
            n_lanes = (positions // size).bincount(minlength=n_old // size)
            left = n_lanes[n_lanes > 0]
            if (
                ("dim" not in size_name and "size" not in size_name)
                or left.numel() == 0
                or bool((left != left[0]).any())
            ):
                continue
            found[size_name] = int(left[0])
            for other, value in known.items():
                if "head" in other and value == n_old // size and other != size_name:
                    found[other] = left.numel()
                elif value == n_old and other != size_name:
                    found[other] = positions.numel()
    return {k: v for k, v in found.items() if known[k] != v}


def head_widths(root: nn.Module, plan: KeepPlan) -> list[tuple[nn.Module, str, int]]:
    """What the modules around the last layer keep about the width that it reads: code that makes a new head looks there.

    Returns: module, attribute, new value.
    """
    layers = [
        (path, layer)
        for path, layer in root.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    if not layers:
        return []
    path, layer = layers[-1]
    tensor = next((t for t in plan.tensors if f"{path}.weight" in (t.name, *t.aliases)), None)
    if tensor is None or tensor.shape[1] == layer.weight.shape[1]:
        return []
    parts = path.split(".")[:-1]
    around = [root.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
    own = [m for m in around if not type(m).__module__.startswith("torch.nn.")]
    new = int(layer.weight.shape[1])
    return [(m, k, new) for m in own for k, value in _ints(m).items() if value == tensor.shape[1]]


def _ints(module: nn.Module) -> dict[str, int]:
    return {k: v for k, v in vars(module).items() if type(v) is int and not k.startswith("_")}


def _layers(module: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}.weight" if path else f"{name}.weight" for name, _ in module.named_children()]


def _rows(plan: KeepPlan, name: str) -> tuple[int, Tensor] | None:
    tensor = next((t for t in plan.tensors if name in (t.name, *t.aliases)), None)
    if (
        tensor is None
        or tensor.kept_shape is None
        or len(tensor.shape) != 2
        or tensor.kept_shape == tensor.shape
    ):
        return None
    kept = plan.kept(tensor.name, 0)
    return (tensor.shape[0], kept) if kept.dim() == 1 else None
