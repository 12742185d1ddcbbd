"""nn.MultiheadAttention and nn.Transformer layers through minimize, by both routes: heads and head widths shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srfx.minimize import minimize
from tests.helpers import check, kill, randomized, relative_error

E, H, D, T, S = 12, 3, 4, 5, 7
WIDTH = 2 * (D - 1)
"""Two of three heads stay, each with three of four lanes."""


def prune(mha: nn.MultiheadAttention) -> None:
    """Nothing reads head 1; lane 2 of the values is not read, lane 3 of the queries is 0."""
    lanes = torch.arange(E).view(H, D)
    kill(mha.out_proj, columns=[*lanes[1].tolist(), *lanes[:, 2].tolist()])
    with torch.no_grad():
        q = mha.in_proj_weight[:E] if mha.in_proj_weight is not None else mha.q_proj_weight
        q[lanes[:, 3]] = 0
        if mha.in_proj_bias is not None:
            mha.in_proj_bias[:E][lanes[:, 3]] = 0


class Caller(nn.Module):
    """Attention of one input to another, with masks as inputs."""

    def __init__(self, options: dict[str, Any], call: dict[str, Any], mask: str = "none") -> None:
        super().__init__()
        self.inner = randomized(nn.MultiheadAttention(E, H, **options)).eval()
        self.call, self.mask = call, mask
        self.register_buffer("scores", torch.randn(T, S))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        masks = {"key_padding_mask": mask} if self.mask == "key_padding_mask" else {}
        if self.mask == "attn_mask":
            masks = {"attn_mask": self.scores}
        found = self.inner(q, k, v, **self.call, **masks)
        return (found[0], found[1]) if self.call["need_weights"] else found[0]


def inputs(options: dict[str, Any], mask: str) -> tuple[Tensor, ...]:
    found = []
    for length, width in ((T, E), (S, options.get("kdim", E)), (S, options.get("vdim", E))):
        x = torch.randn(2, length, width)
        found.append(x if options.get("batch_first") else x.transpose(0, 1).contiguous())
    if mask == "key_padding_mask":
        padded = torch.zeros(2, S, dtype=torch.bool)
        padded[0, -2:] = True
        found.append(padded)
    return tuple(found)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 8, "vdim": 10},
    "kdim, no bias": {"kdim": 8, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 8},
}


def matrices(model: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for p in model.parameters() if p.dim() == 2)


@pytest.mark.parametrize(
    ("batch_first", "mask"),
    [(True, "none"), (False, "none"), (True, "attn_mask"), (True, "key_padding_mask")],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_heads_and_head_widths_shrink(name: str, batch_first: bool, mask: str) -> None:
    options = OPTIONS[name] | {"batch_first": batch_first}
    model = Caller(options, {"need_weights": False}, mask)
    prune(model.inner)
    # exported, the zeros are made for batch and heads in one axis, which keeps the heads
    routes = ["symbolic"] if "add_zero_attn" in options else ["symbolic", "export"]
    found = check(model, inputs(options, mask), routes=routes)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    for outcome in found.values():
        assert matrices(outcome.small) == sorted([(E, WIDTH), *((WIDTH, w) for w in widths)])


@pytest.mark.parametrize("average", [True, False])
def test_weights_that_are_an_output_keep_all_heads(average: bool) -> None:
    """Queries and keys of every head are read then; lanes go all the same."""
    options = {"batch_first": True}
    model = Caller(options, {"need_weights": True, "average_attn_weights": average})
    prune(model.inner)
    for outcome in check(model, inputs(options, "none")).values():
        lanes = H * (D - 1)
        assert matrices(outcome.small) == sorted([(E, lanes), (lanes, E), (lanes, E), (lanes, E)])


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = randomized(nn.MultiheadAttention(E, H, batch_first=True)).eval()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        out: Tensor = self.inner(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return out


def test_causal() -> None:
    model = Causal()
    prune(model.inner)
    for outcome in check(model, (torch.randn(2, T, E),)).values():
        assert matrices(outcome.small) == sorted([(E, WIDTH), *[(WIDTH, E)] * 3])


FORMS = [{"norm_first": n, "batch_first": b} for n in (True, False) for b in (True, False)]


class One(nn.Module):
    """A model around a layer, which is a leaf of a symbolic trace then."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Padded(One):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.inner(x, src_key_padding_mask=mask)
        return y


class Two(One):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.inner(x, memory)
        return y


def _pruned(model: nn.Module) -> nn.Module:
    randomized(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            prune(module)
        if isinstance(module, nn.Linear) and module.out_features == 20:
            kill(module, range(6), bias=True)
    return model.eval()


def _lost(model: nn.Module, n_attentions: int, n_layers: int) -> None:
    found = matrices(model)
    assert found.count((E, WIDTH)) == n_attentions
    assert found.count((WIDTH, E)) == 3 * n_attentions
    assert found.count((14, E)) == found.count((E, 14)) == n_layers


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_encoder(form: dict[str, bool], padded: bool) -> None:
    """Two layers; with a padding mask the fast path nests tensors, which a trace does not show."""
    layer = nn.TransformerEncoderLayer(E, H, dim_feedforward=20, **form)
    model = _pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    if padded and not form["batch_first"]:
        pytest.skip("the mask and the tokens have their batch along different axes")
    x = torch.randn(2, T, E) if form["batch_first"] else torch.randn(T, 2, E)
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, -1] = True
    found = check(Padded(model).eval(), (x, mask)) if padded else check(One(model).eval(), (x,))
    for outcome in found.values():
        _lost(outcome.small, 2, 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_decoder(form: dict[str, bool]) -> None:
    layer = nn.TransformerDecoderLayer(E, H, dim_feedforward=20, **form)
    model = _pruned(nn.TransformerDecoder(layer, 1))
    x, memory = torch.randn(2, T, E), torch.randn(2, S, E)
    if not form["batch_first"]:
        x, memory = x.transpose(0, 1).contiguous(), memory.transpose(0, 1).contiguous()
    for outcome in check(Two(model).eval(), (x, memory)).values():
        _lost(outcome.small, 2, 1)


def test_transformer() -> None:
    model = _pruned(nn.Transformer(E, H, 1, 1, 20, batch_first=True, norm_first=True))
    found = check(Two(model).eval(), (torch.randn(2, S, E), torch.randn(2, T, E)))
    for outcome in found.values():
        _lost(outcome.small, 3, 2)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_zero_key_beside_heads_and_batch_in_one_axis(batch_first: bool) -> None:
    """Exported at one batch size, keys stand as [N H, T, D] beside zeros [N H, 1, D]: their lanes differ from head to head."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(12, 12)
            self.attention = nn.MultiheadAttention(12, 4, add_zero_attn=True, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.front(x), x, x, need_weights=False)[0]

    model, x = randomized(Words()).double(), torch.randn(7, 2, 12, dtype=torch.float64)
    with torch.no_grad():
        model.attention.out_proj.weight[:, 3:6] = 0  # nobody reads the second head
    small = minimize(torch.export.export(model, (x,)))
    assert relative_error(model(x), small(x)) < 1e-12
    assert small.get_parameter("attention.k_proj.weight").shape == (9, 12)
    assert small.get_parameter("attention.v_proj.weight").shape == (9, 12)
