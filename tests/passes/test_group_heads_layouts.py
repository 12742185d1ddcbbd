"""Groups of heads where keys serve several queries, and where queries, keys and values lie side by side in each head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import check, randomized, shapes
from tests.passes.test_group_heads import (
    HALF,
    D,
    Heads,
    T,
    calls_are_free,  # noqa: F401  # a fixture
    narrowed,
    products,
    rows_of,
    tokens,
)

pytestmark = pytest.mark.usefixtures("calls_are_free")


class SharedKeys(Heads):
    """The attention call itself repeats keys and values."""

    def repeated(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("kind", ["masked", "rotary"])
def test_keys_that_the_call_repeats(kind: str) -> None:
    """Four heads of keys, two of them narrow, each read by two heads of queries; each group has its own four and eight."""
    model = narrowed(SharedKeys(8, 4, kind), [(16, 16), (4, 6), (16, 16), (4, 6)]).double()
    found = check(model, tokens(), others=[tokens(n=3)], ragged=True)
    for outcome in found.values():
        small = outcome.small
        assert len(products(small)) == 2
        assert sorted(rows_of(small, "q")) == [4 * 4, 4 * 16]
        assert sorted(rows_of(small, "k")) == [2 * 4, 2 * 16]
        assert sorted(rows_of(small, "v")) == [2 * 6, 2 * 16]


class HeadByHead(Heads):
    """One projection whose rows are, head by head, those of q, k and v; slopes are added to the scores."""

    def __init__(self) -> None:
        super().__init__(kind="slopes")
        self.qkv = nn.Linear(24, 3 * self.n_heads * D)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).view(x.shape[0], T, self.n_heads, 3, D)
        q, k, v = (fused[..., i, :].transpose(1, 2) for i in range(3))
        y = self.attend(q, k, v).transpose(1, 2).reshape(x.shape[0], T, -1)
        z: Tensor = self.head(torch.tanh(x + self.o(y)))
        return z


def test_projections_that_are_fused_head_by_head() -> None:
    model, g = randomized(HeadByHead()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for h, (n_qk, n_v) in enumerate(HALF):
            both, own = torch.randperm(D, generator=g)[n_qk:], torch.randperm(D, generator=g)[n_v:]
            for i, lanes in enumerate((both, both, own)):
                model.qkv.weight[(3 * h + i) * D + lanes] = 0
                model.qkv.bias[(3 * h + i) * D + lanes] = 0
    found = check(model.double(), tokens(), others=[tokens(n=3)], ragged=True)
    for outcome in found.values():
        small = outcome.small
        assert len(products(small)) == 2
        assert [sorted(rows_of(small, f"qkv_{part}")) for part in "qkv"] == [[12, 48], [12, 48], [18, 48]]
        assert shapes(small)["o.weight"][1] == 48 + 18
