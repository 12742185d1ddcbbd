"""Ways to break the rewrite, one line each, with the tests that have to notice (see `mutants.py`)."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """In ``path``, the one occurrence of ``old`` becomes ``new``; ``tests`` are tried in this order."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]


OPS = "tests/srfx/ops/test_"
CONTRACTION = (OPS + "contraction.py", OPS + "conv.py", "tests/test_holes.py", "tests/srfx/test_minimize.py")
NORM = (
    OPS + "norm.py",
    OPS + "norm_outputs.py",
    OPS + "norm_streams.py",
    "tests/property/test_norm_stacks.py",
)
NORM_FORMS = (
    "tests/srfx/nn/test_layer_norm_forms.py",
    "tests/srfx/nn/test_functional.py",
    OPS + "norm_outputs.py",
)
ELEMENTWISE = (OPS + "elementwise.py", OPS + "pointwise.py", "tests/test_holes.py")
ATTENTION = (OPS + "attention.py", "tests/test_holes.py")
HEADS = ("tests/passes/test_group_heads.py",)
TEMPLATES = ("tests/passes/test_move_templates.py",)
IN_PLACE = ("tests/passes/test_restore_in_place.py",)
RECURRENT = (OPS + "recurrent.py",)
MOVEMENT = (OPS + "movement.py", OPS + "views.py", OPS + "indexing.py")
LATTICE = (
    "tests/property/test_lattice_laws.py",
    OPS + "attention.py",
    *MOVEMENT,
    "tests/test_holes.py",
)
SPATIAL = ("tests/srfx/test_reasons.py", OPS + "spatial.py", OPS + "reduction.py", "tests/test_holes.py")
GENERAL = ("tests/srfx/test_minimize.py", "tests/test_holes.py", OPS + "contraction.py", OPS + "conv.py")

MUTATIONS = (
    # contractions
    Mutation("srfx/ops/contraction.py", "            shift = shift + self._fold_value(call, absorbed)\n",
             "            pass\n", CONTRACTION),
    Mutation("srfx/ops/contraction.py", "old.double().cpu() + shift.flatten()", "old.double().cpu() - shift.flatten()",
             CONTRACTION),
    Mutation("srfx/ops/contraction.py", "ratio = (absorbed[columns] / value[carrier])",
             "ratio = (value[carrier] / absorbed[columns])", CONTRACTION),
    Mutation("srfx/ops/contraction.py", "new = new + self._carry(", "new = new - self._carry(", CONTRACTION),
    Mutation("srfx/ops/contraction.py", "rows.unsqueeze(2) & wanted.unsqueeze(1)", "rows.unsqueeze(2) | wanted.unsqueeze(1)",
             CONTRACTION),
    Mutation("srfx/ops/contraction_facts.py", "disturbing = varies | (value != 0) if self.has_border(call) else varies",
             "disturbing = varies", CONTRACTION),
    Mutation("srfx/ops/contraction_facts.py", "wanted = read & varies if gone is None else", "wanted = varies if gone is None else",
             CONTRACTION),
    Mutation("srfx/ops/contraction_facts.py", "wanted = read & (varies | (value != 0) | kept)", "wanted = read & varies",
             CONTRACTION),
    Mutation("srfx/ops/contraction_call.py", "any(isinstance(t, Param) and t.n_sites > 1 for t in tensors)", "False", CONTRACTION),
    Mutation("srfx/ops/matrix_form.py", "part.abs().sum(-1) if m.shape[-1] > 1", "part.sum(-1) if m.shape[-1] > 1",
             CONTRACTION),
    Mutation("srfx/ops/contraction_facts.py", "if bool((constants & ~kept).any()) else constants", "if True else constants",
             (OPS + "contraction.py",)),
    Mutation("srfx/ops/contraction_call.py", "if not call.program.is_finite(value):", "if False:", CONTRACTION),
    # elementwise
    Mutation("srfx/ops/elementwise.py", "return live | facts.kept_channels(call.node)", "return live", ELEMENTWISE),
    Mutation("srfx/ops/elementwise.py", "return live & (zero[first] | ~zero[second])", "return live & ~zero[second]",
             ELEMENTWISE),
    Mutation("srfx/ops/elementwise.py", "if bool((value == 1).all()) else None", "if bool((value >= 0).all()) else None",
             ELEMENTWISE),
    Mutation("srfx/ops/elementwise.py", "(self.subtracts and call[\"input\"] is operand)", "False", ELEMENTWISE),
    Mutation("srfx/ops/elementwise.py", "if bool((facts.constancy(value).varies.cpu() & wanted).any()):",
             "if bool(facts.constancy(value).varies.cpu().all()):", ELEMENTWISE),
    # reductions, spatial ops, lookups
    Mutation("srfx/ops/reduction.py", "scale = facts.count(fields, axis) / shape[axis] if self.divides else 1.0", "scale = 1.0",
             (OPS + "reduction.py", OPS + "contraction.py", OPS + "conv.py")),
    Mutation("srfx/ops/reduction.py", "return live & (~absorbed.cpu() | facts.kept_channels(source))",
             "return live & ~absorbed.cpu()", (OPS + "reduction.py", "tests/test_holes.py")),
    Mutation("srfx/ops/reduction.py", "gone = ~facts.is_kept(fields[axis]) & ~c.varies", "gone = ~c.varies",
             (OPS + "reduction.py", "tests/test_holes.py")),
    Mutation("srfx/ops/reduction.py", "labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, [axis])", "pass",
             ("tests/srfx/test_reasons.py", OPS + "elementwise.py", OPS + "pointwise.py")),
    Mutation("srfx/ops/spatial.py", "return _zero(call.get(\"padding\", 0)) or not call.get(\"count_include_pad\", True)",
             "return True", SPATIAL),
    Mutation("srfx/ops/spatial.py", "        labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, spatial)\n", "", SPATIAL),
    Mutation("srfx/ops/embedding.py", "uniform = (rows == rows[:1]).all(0).cpu()", "uniform = (rows == rows[:1]).any(0).cpu()",
             (OPS + "embedding.py",)),
    Mutation("srfx/ops/embedding.py", "        labels.pin(weight, site, Reason.DATA_DEPENDENT, [0])\n", "", (OPS + "embedding.py",)),
    # norms
    Mutation("srfx/ops/norm_facts.py", "wanted = wanted | truly | (rows & ~self._absorbable(call, facts, c, axis))",
             "wanted = wanted | truly", NORM),
    Mutation("srfx/ops/norm_facts.py", "nonlinear_reader(call.node, axis, labels.program, n_emitted) is None\n", "True\n", NORM),
    Mutation("srfx/ops/norm_facts.py", "sources[self._plain(call, facts, facts.is_kept(own))]", "sources[:0]", NORM),
    Mutation("srfx/ops/norm_facts.py", "mask = ~varies & (gamma != 0)", "mask = ~varies", NORM),
    Mutation("srfx/ops/norm_facts.py", "facts.ranks[own[at]] = 1 + EMITS.index(name)", "facts.ranks[own[at]] = 0", NORM),
    Mutation("srfx/ops/spatial.py", "affine = replace(affine, bordered=True)", "affine = replace(affine)", (OPS + "norm_means.py",)),
    Mutation("srfx/ops/reduction.py", "affine.bordered or not self.divides", "affine.bordered", (OPS + "norm_means.py",)),
    Mutation("srfx/ops/norm.py", "value[~row], repeat", "value[row], repeat", NORM),
    Mutation("srfx/ops/contraction.py", "columns[2].sum(-1).unsqueeze(0) if to_bias", "columns[1].sum(-1).unsqueeze(0) if to_bias",
             NORM),
    Mutation("srfx/ops/rms_norm.py", "squares = self._squares(call) + removed.sum_squares", "squares = self._squares(call)", NORM),
    Mutation("srfx/ops/group_norm.py", "still = (~moving | self._is_lone(call))[groups]",
             "still = (~moving | ~moving.all())[groups]", NORM),
    # attention
    Mutation("srfx/ops/attention.py", "needed = head & ~idle_q & ~idle_k", "needed = head & ~idle_q & idle_k", ATTENTION),
    Mutation("srfx/ops/attention.py", "needed | head & kept_k & idle_k", "needed", ATTENTION),
    Mutation("srfx/ops/attention.py", "if self.drops(call) or not self.sees_a_key(call):", "if False:",
             ATTENTION),
    Mutation("srfx/ops/attention.py", "return [set_argument(call, \"scale\", 1.0 / math.sqrt(width))]", "pass", ATTENTION),
    Mutation("passes/compact_channels.py", "return edits + [e for s in computed for e in s.rule.loosen(s.call)] if edits else []",
             "return edits", (*ATTENTION, OPS + "views.py")),
    Mutation("srfx/ops/attention.py", "if is_shift_invariant(call.node, len(call.out_shape) - 1, call.program):", "if True:",
             ATTENTION),
    # recurrent layers
    Mutation("srfx/ops/gates.py", "moving = ~rest_h | (upset", "moving = (upset", RECURRENT),
    Mutation("srfx/ops/gates.py", "        steady_u, disturbed = steady_u & ~hit, disturbed | hit\n", "        pass\n", RECURRENT),
    Mutation("srfx/ops/gates.py", "        needed[0, known.apart] = False\n", "        needed[1, known.apart] = False\n", RECURRENT),
    Mutation("srfx/ops/gates.py", "            rows[3] = needed[3] & outs\n", "            rows[3] = False\n", RECURRENT),
    Mutation("srfx/ops/gates.py", "if kind.name == \"gru\" else kind.activation(total) != 0",
             "if False else kind.activation(total) != 0",
             RECURRENT),
    Mutation("srfx/ops/recurrent.py", "                edits += self._new_bias(call, o, side, shift, rows)\n", "                pass\n",
             RECURRENT),
    Mutation("srfx/ops/recurrent.py", "                reads_h = reads_h | found.states  # h' = (1 - z) n + z h\n",
             "                pass\n", RECURRENT),
    Mutation("srfx/ops/recurrent.py", "missing = n_states + 1 - int(units.sum())", "missing = 0", RECURRENT),
    Mutation("passes/decompose_recurrent.py", "            out = self._function(torch.flip, out, [self.time_axis])\n",
             "            pass\n", ("tests/passes/test_decompose_recurrent.py",)),
    Mutation("srfx/ops/norm_facts.py", "len(new) + makes_bias", "len(new)", (OPS + "norm_statistics.py",)),
    Mutation("srfx/nn/layer_norm_forms.py", "z.sub_(t, alpha=p.slope)", "z.add_(t, alpha=p.slope)", NORM_FORMS),
    Mutation("srfx/nn/layer_norm_forms.py", "value=-p.kept_share / p.lean", "value=p.kept_share / p.lean", NORM_FORMS),
    # lattices and the solver
    Mutation("srfx/lattice/constancy.py", "        varies = self.varies | other.varies | (self.value != other.value)\n",
             "        varies = self.varies | other.varies\n", LATTICE),
    Mutation("srfx/lattice/constancy.py", "                varies = varies | (value != first).any(axis, keepdim=True)\n",
             "                pass\n", (*LATTICE, *GENERAL)),
    Mutation("srfx/lattice/movement.py", "            table.imply(merged, fields[o])\n", "            pass\n", LATTICE),
    Mutation("srfx/lattice/classes.py", "            for block in self.blocks:\n", "            for block in ():\n", LATTICE),
    Mutation("srfx/lattice/classes.py", "        kept = seed | self.pinned\n", "        kept = seed.clone()\n", (*LATTICE, *GENERAL)),
    Mutation("srfx/analysis/solver.py", "        seed = live_labels(facts) | facts.kept\n", "        seed = live_labels(facts)\n",
             (*GENERAL, *NORM)),
    Mutation("srfx/analysis/liveness.py", "wanted = c.varies.cpu() | facts.kept_channels(node) | restored(facts, node)",
             "wanted = c.varies.cpu() & False", GENERAL),
    # passes
    Mutation("passes/pipeline.py", "            if not last.modified:\n", "            if True:\n", ("tests/passes/test_base.py",)),
    Mutation("passes/compact_channels.py", "        *_restore(facts),\n", "", GENERAL),
    Mutation("passes/compact_channels.py", "torch.where(varies, place, place[varies][:1]", "torch.where(kept, place, place[varies][:1]",
             GENERAL),
    Mutation("passes/compact_channels.py", "        *frozen,\n", "", (*MOVEMENT, *GENERAL)),
    Mutation("passes/decompose_attention.py", "causal = is_set(\"is_causal\") and not is_set(\"need_weights\")", "causal = False",
             ("tests/passes/test_decompose_attention.py",)),
    Mutation("passes/group_heads.py", "            found[start : start + self.n_channels] = False\n", "", HEADS),
    Mutation("passes/_head_costs.py", "if k < room and (", "if (", HEADS),
    Mutation("passes/move_templates.py", "if len(node.users) != 1 or not node.op", "if not node.op", TEMPLATES),
    Mutation("passes/move_templates.py", "found is None or taken & {e.node for e in found.edits}", "found is None", TEMPLATES),
    Mutation("srfx/ops/spatial.py", "not isinstance(bias, Param) or bias.n_sites > 1", "not isinstance(bias, Param)", TEMPLATES),
    Mutation("srfx/ops/elementwise.py", "found = (first,) if self.subtracts or", "found = (first,) if", TEMPLATES),
    Mutation("passes/restore_in_place.py", "if list(operand.users) != [node] or classes", "if classes", IN_PLACE),
    Mutation("passes/restore_in_place.py", "    if not rule_of(operand, modules).is_overwritable:\n", "    if False:\n", IN_PLACE),
    Mutation("srfx/ir/short_paths.py", "while name in taken or", "while", ("tests/srfx/ir/test_short_paths.py",)),
    Mutation("srfx/analysis/generic_inputs.py", "and any(i > 0 or len(now) == 1 for i in places)", "and places",
             ("tests/srfx/analysis/test_generic_inputs.py",)),
)  # fmt: skip
