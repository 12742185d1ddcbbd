"""What minimize promises, each promise on models drawn at random (`srfx.testing.programs`)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from torch import nn

import srfx
from srfx.testing.check import (
    Case,
    Skip,
    assert_varies,
    complete,
    count,
    difference,
    idempotent,
    never_more,
    run,
    same_function,
    shapes,
    trace,
)
from srfx.testing.programs import Program, of_seed
from srfx.testing.strategies import programs
from srfx.testing.variants import hooked, interrupted, renamed, reordered
from tests.snapshots import assert_unchanged, snapshot

# A failing example is reported as it was drawn: to make it smaller takes minutes, more than a test may.  With
# HYPOTHESIS_PROFILE=deep it is made smaller, as `make fuzz ARGS="--shrink 200"` does.
IS_DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
PHASES = tuple(p for p in Phase if IS_DEEP or p not in (Phase.shrink, Phase.explain))
FEW, SOME = settings(max_examples=1, phases=PHASES), settings(max_examples=3, phases=PHASES)


def case_of(program: Program, route: str = "symbolic") -> Case:
    """Minimize a program; one that torch cannot run or trace is no example."""
    try:
        model, inputs = program.build()
        run(model, inputs(2))
    except (RuntimeError, ValueError, TypeError, IndexError):
        assume(False)
        raise
    try:
        return Case(model, inputs, route)
    except Skip:
        assume(False)
        raise


def holds(check, case: Case) -> None:  # type: ignore[no-untyped-def]
    try:
        check(case)
    except Skip:
        assume(False)


@given(programs())
@SOME
def test_same_function_and_never_more(program: Program) -> None:
    case = case_of(program)
    holds(same_function, case)
    never_more(case)


@pytest.mark.parametrize("route", ["export", "decomposed"])
@given(programs())
@FEW
def test_same_function_exported(route: str, program: Program) -> None:
    case = case_of(program, route)
    holds(same_function, case)
    never_more(case)


@given(programs())
@SOME
def test_idempotent(program: Program) -> None:
    holds(idempotent, case_of(program))


@given(programs())
@SOME
def test_complete(program: Program) -> None:
    """What the probe calls removable goes, except for documented reasons."""
    holds(complete, case_of(program))


@given(programs())
@SOME
def test_gradients(program: Program) -> None:
    """Of the inputs, and of what is left of every tensor that kept its numbers."""
    case = case_of(program)
    holds(same_function, case)
    given_inputs = case.inputs(2)
    plan = srfx.plan(case.small)
    before, after = copy.deepcopy(case.traced), copy.deepcopy(case.small)
    try:
        wanted = gradients(before, given_inputs)
    except RuntimeError:  # a write in place into what the gradient needs
        assume(False)
        raise
    found = gradients(after, given_inputs)
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert difference(a, b) < 1e-8, f"input {i}"
    new = dict(after.named_parameters())
    for name, old in before.named_parameters():
        if name not in new or old.dim() < 2 or old.grad is None:
            continue
        tensor = plan.tensor(name)
        if tensor.aliases or any(len(cut.layout) > 1 for cut in tensor.cuts):
            continue
        value, gradient = old.detach(), old.grad
        for axis in range(old.dim()):
            kept = plan.kept(name, axis)
            value, gradient = value.index_select(axis, kept), gradient.index_select(axis, kept)
        if torch.equal(value, new[name]) and new[name].grad is not None:
            rows = value.flatten(1).abs().sum(1) > 0
            assert difference(gradient[rows], new[name].grad[rows]) < 1e-8, name


def gradients(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Gradients of the inputs; those of the parameters stay in the model."""
    given_inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.utils._pytree.tree_leaves(model(*given_inputs)):
        if isinstance(part, torch.Tensor) and part.is_floating_point() and part.requires_grad:
            weight = torch.randn(part.shape, generator=torch.Generator().manual_seed(1), dtype=part.dtype)
            total = total + (part * weight).sum()
    if total.requires_grad:
        total.backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in given_inputs if x.is_floating_point()]


@given(programs())
@SOME
def test_input_untouched(program: Program) -> None:
    case = case_of(program)
    before = snapshot(case.traced)
    srfx.minimize(case.traced, case.inputs(2))
    assert_unchanged(case.traced, before)


@given(programs())
@SOME
def test_route_of_tracing_does_not_matter(program: Program) -> None:
    """Traced by torch.fx or exported, the same sizes stay.

    Dropout between layers lives on in a traced model, where it lets nothing but zeros pass (theory: E5, A2), and is
    gone from one that was exported in eval mode; so there is none here.  Nor is there an op that torch.fx does not look
    into, but torch.export does.
    """
    assume("library.odd" not in program.source)
    case = case_of(program)
    holds(assert_varies, case)
    for module in case.model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    try:
        found = [shapes(Case(case.model, case.inputs, route).small) for route in ("symbolic", "export")]
    except Skip:
        assume(False)
        raise
    assert found[0] == found[1]


@given(programs())
@SOME
def test_names_do_not_matter(program: Program) -> None:
    assert shapes(case_of(program).small) == shapes(case_of(renamed(program)).small)


@given(programs())
@SOME
def test_order_of_nodes_does_not_matter(program: Program) -> None:
    case = case_of(program)
    other = reordered(case.traced, len(program.choices))
    assert shapes(srfx.minimize(other, case.inputs(2))) == shapes(case.small)


@given(programs())
@SOME
def test_masks_as_hooks_or_baked(program: Program) -> None:
    case = case_of(program)
    model = hooked(program.build()[0])
    assert shapes(srfx.minimize(model, case.inputs(2))) == shapes(case.small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(programs())
@FEW
def test_commutes_with_double(dtype: torch.dtype, program: Program) -> None:
    """The zeros decide, not the dtype: the same channels stay in float32 and in half precision."""
    case = case_of(program)
    assume("float64" not in program.source)
    single = copy.deepcopy(case.model).to(dtype)
    given_inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs(2))
    try:
        run(single, given_inputs)
    except RuntimeError:  # an op that has no half precision
        assume(False)
        raise
    try:
        small = srfx.minimize(trace(single, given_inputs, "symbolic"), given_inputs)
    except Skip:
        assume(False)
        raise
    assert shapes(small.double()) == shapes(case.small)


@given(programs())
@SOME
def test_unknown_ops_anywhere(program: Program) -> None:
    case = case_of(program)
    holds(same_function, case)
    gm = interrupted(case.traced, case.inputs(2), len(program.choices))
    holds(same_function, Case(gm, case.inputs))


SCRIPT = """
import hashlib, torch, srfx
from srfx.testing.check import Case, Skip
from srfx.testing.programs import of_seed
torch.set_num_threads(1)
digest = hashlib.sha256()
for seed in range(6):
    try:
        case = Case(*of_seed(seed).build())
    except Skip:
        continue
    digest.update(srfx.plan(case.small).to_json().encode())
    digest.update(case.small.code.encode())
    for name, tensor in case.small.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_deterministic_across_processes_and_hash_seeds() -> None:
    root = Path(__file__).parents[2]
    found = set()
    for hash_seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_programs_repeat_themselves_and_shrink() -> None:
    program = of_seed(5)
    from srfx.testing.programs import replay, shrink

    assert replay(program.choices) == program
    small = shrink(program.choices, lambda c: "nn.Linear" in replay(c).source)
    assert len(replay(small).source) < len(program.source)
    assert "nn.Linear" in replay(small).source
    assert count(replay(small).build()[0]) > 0
