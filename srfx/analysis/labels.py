"""Label analysis: number the channels of every value and record what holds them together (topological order)."""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from srfx.analysis.calls import Site
from srfx.ir.plan import Reason
from srfx.ir.program import Program
from srfx.lattice.movement import Fields
from srfx.ops.facts import Labeller


def label(program: Program, sites: list[Site]) -> Labeller:
    """Run every rule's `label` once; clause numbers of the constraints are in `srfx.lattice.labels`."""
    labels = Labeller(program)
    by_node = {site.node: site for site in sites}
    for node in program.nodes:
        site = by_node.get(node)
        if site is None:
            if node.op == "placeholder":
                labels.fields[node] = {}
            continue
        if site.is_unknown and (site.rule.barrier is not Reason.UNKNOWN_OP or _moves_floats(site, program)):
            labels.refuse(node, site.rule.barrier, _target_name(site))
        fields = site.rule.label(site.call, labels)
        labels.fields[node] = fields
        for one in fields if isinstance(fields, tuple) else (fields,):
            labels.settle(one, node.name)
    for param in program.params():
        found = labels.fields.get(param)
        if isinstance(found, dict):
            labels.settle(found, param.names[0] if param.names else "?")
    _outputs(program, labels)
    return labels


def _moves_floats(site: Site, program: Program) -> bool:
    """Whether a call has to do with float tensors at all; positions and masks carry no channels."""
    hints = [program.hints.get(n) for n in (site.node, *site.node.all_input_nodes)]
    tensors = [t for t in pytree.tree_leaves(hints) if isinstance(t, Tensor)]
    return (
        site.call.module is not None
        or not tensors
        or any(t.is_floating_point() or t.is_complex() for t in tensors)
    )


def _target_name(site: Site) -> str:
    module = site.call.module
    target = type(module) if module is not None else site.node.target
    return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)


def _outputs(program: Program, labels: Labeller) -> None:
    """An output regains its channels along one axis; one whose channels spread over several keeps them all."""
    for node in program.gm.graph.output_node().all_input_nodes:
        value = program.value(node)
        found = labels.fields.get(value)
        if isinstance(found, tuple):
            for fields in found:
                _pin(labels, fields, node.name)
        elif not program.is_tensor(node) or _spreads(labels.of(value)) or value is not node:
            labels.pin(value, node.name, Reason.OUTPUT_LAYOUT)


def _spreads(fields: Fields) -> bool:
    """Whether channels spread over several axes, or an axis repeats them: its size may differ from call to call."""
    return len(fields) > 1 or any(f.unique().numel() != f.shape[a] for a, f in fields.items())


def _pin(labels: Labeller, fields: Fields, site: str) -> None:
    for f in fields.values():
        labels.table.pin(f, site, Reason.OUTPUT_LAYOUT.name)
