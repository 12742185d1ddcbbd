"""raise-softmax: the guard of a decomposed attention goes where every query sees a key, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import srfx
from srfx.ir.capture import capture
from srfx.passes import get_pass
from tests.helpers import relative_error

aten = torch.ops.aten
X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SEEN = torch.ones(5, 5, dtype=torch.bool).tril()
BLIND = SEEN.clone()
BLIND[3] = False


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("seen", (BLIND if kind == "blind" else SEEN).clone())
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], 5, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        masks = {"input": mask, "stored": self.seen, "blind": self.seen}
        y = F.scaled_dot_product_attention(q, k, v, masks.get(self.kind), is_causal=self.kind == "causal")
        return self.out(y.transpose(1, 2).reshape(x.shape[0], 5, 8))


def decomposed(model: nn.Module, mask: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (X, mask)).run_decompositions()


@pytest.mark.parametrize(
    ("kind", "is_raised"),
    [("plain", True), ("causal", True), ("stored", True), ("blind", False), ("input", False)],
)
def test_what_is_known_of_the_mask_decides(kind: str, is_raised: bool) -> None:
    torch.manual_seed(1)
    model = Attention(kind).double().eval()
    with torch.no_grad():
        model.v.weight[[1, 5]] = (
            0  # constant values: they come out as they went in where every query sees a key
        )
        model.k.weight[[2, 6]] = 0  # constant keys: one shift of all scores
    program = decomposed(model, SEEN)
    gm = capture(program.module()).graph_module
    for name in ("functionalize", "fold-parameter-math", "drop-noops"):
        get_pass(name)(gm)
    n_guards = sum(n.target is aten.eq.Scalar for n in gm.graph.nodes)
    assert n_guards == 1
    result = get_pass("raise-softmax")(gm)
    assert len(result.edits) == int(is_raised)
    assert sum(n.target is aten.eq.Scalar for n in gm.graph.nodes) == int(not is_raised)
    assert not get_pass("raise-softmax")(gm).modified

    small = srfx.minimize(program)
    for mask in (SEEN, BLIND):
        assert relative_error(model(X, mask), small(X, mask)) < 1e-12
    width = 6 if is_raised else 8
    assert small.get_parameter("v.weight").shape == (width, 8)
    assert small.get_parameter("k.weight").shape == (width, 8)


def test_a_comparison_that_is_read_elsewhere_stays() -> None:
    class Tells(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = x @ x.transpose(-1, -2)
            masked = torch.ops.aten.eq.Scalar(scores, -torch.inf)
            return torch.softmax(scores, -1), masked

    program = torch.export.export(Tells(), (X,)).run_decompositions()
    small = srfx.minimize(program)
    for got, wanted in zip(small(X), Tells()(X), strict=True):
        torch.testing.assert_close(got, wanted)
