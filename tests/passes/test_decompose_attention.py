from __future__ import annotations

import contextlib
import copy
import itertools
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.capture import capture
from srfx.ir.plan import Reason
from srfx.ir.program import Program
from srfx.minimize import canonicalise
from srfx.nn import DropoutAttention
from srfx.passes import get_pass
from srfx.passes.decompose_attention import _edit, _Refused
from tests.helpers import assert_equivalent, assert_no_dead_weight
from tests.snapshots import assert_unchanged, snapshot

NAME = "decompose-attention"
E, H, T, S, N = 12, 3, 5, 7, 4
KINDS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder)


def describe(options: dict[str, Any]) -> str:
    """A test id without addresses, so that every worker collects the same tests."""
    return "-".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "plain"


class Caller(nn.Module):
    """Calls one module with some of the inputs by name and some literals."""

    def __init__(self, inner: nn.Module, names: list[str], only_first: bool = False, **literals: Any) -> None:
        super().__init__()
        self.inner = inner
        self.names, self.only_first, self.literals = names, only_first, literals

    def forward(self, *inputs):
        result = self.inner(**dict(zip(self.names, inputs, strict=True)), **self.literals)
        return result[0] if self.only_first else result


def traced(model: Caller) -> fx.GraphModule:
    """What symbolic_trace gives for a forward with these inputs."""
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in model.names}
    result = graph.call_module("inner", (), {**given, **model.literals})
    graph.output(graph.call_function(operator.getitem, (result, 0)) if model.only_first else result)
    return fx.GraphModule(model, graph)


def run(model: Caller, inputs: tuple[Tensor, ...]):
    gm = capture(traced(model), inputs).graph_module
    return gm, get_pass(NAME, hints=list(inputs))(gm)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))
    )


def away_from_default(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double().eval()


def check(model: Caller, inputs: tuple[Tensor, ...], deepcopies: bool = True) -> fx.GraphModule:
    """Written out, equal with gradients, and settled."""
    before = snapshot(model)
    gm, result = run(model, inputs)
    assert len(result.edits) == 1, result.refusals
    assert not any(isinstance(m, KINDS) for m in gm.modules())
    assert_no_dead_weight(gm)
    n_before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in gm.parameters()) == n_before
    assert_same(model, gm, inputs)
    if deepcopies:
        assert_equivalent(_Slow(model), gm, inputs, float32=None)
    assert not get_pass(NAME, hints=list(inputs))(gm).modified
    assert_unchanged(model, before)
    return gm


class _Slow(nn.Module):
    """The model without torch's fast paths."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        with slow_path():
            return self.model(*inputs)


@contextlib.contextmanager
def slow_path():
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def assert_same(model, gm, inputs):
    with torch.no_grad(), slow_path():
        want, got = model(*inputs), gm(*inputs)
    pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


def sequences(batch_first: bool, is_batched: bool = True, kdim: int = E, vdim: int = E) -> tuple[Tensor, ...]:
    shapes = [(T, E), (S, kdim), (S, vdim)]
    if not is_batched:
        return tuple(random(*s, seed=i) for i, s in enumerate(shapes))
    return tuple(
        random(*((N, n, c) if batch_first else (n, N, c)), seed=i) for i, (n, c) in enumerate(shapes)
    )


# ---------------------------------------------------------------------- nn.MultiheadAttention
OPTIONS = [
    {},
    {"bias": False},
    {"kdim": 6},
    {"kdim": 6, "vdim": 9, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "vdim": 5},
    {"dropout": 0.3},
]


@pytest.mark.parametrize("need", ["weights", "per head", "first", "none"])
@pytest.mark.parametrize(
    ("batch_first", "is_batched"), [(True, True), (False, True), (False, False), (True, False)]
)
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_every_option(options, batch_first, is_batched, need):
    mha = away_from_default(nn.MultiheadAttention(E, H, batch_first=batch_first, **options))
    literals = {
        "weights": {"need_weights": True},
        "per head": {"average_attn_weights": False},
        "first": {},
        "none": {"need_weights": False},
    }[need]
    model = Caller(mha, ["query", "key", "value"], need == "first", **literals).eval()
    inputs = sequences(batch_first, is_batched, options.get("kdim", E), options.get("vdim", E))
    gm = check(model, inputs)
    calls = [
        n for n in gm.graph.nodes if "scaled_dot" in str(n.target) or str(n.target).endswith(".attention")
    ]
    assert len(calls) == (need in ("first", "none"))
    assert {"inner.q_proj", "inner.k_proj", "inner.v_proj", "inner.out_proj"} <= {
        n for n, _ in gm.named_modules()
    }
    if is_batched:
        assert_same(model, gm, tuple(torch.cat([x, x], 0 if batch_first else 1) for x in inputs))


def causal_mask() -> Tensor:
    """Boolean: of an additive mask that is causal torch takes no gradient, and here there is one."""
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def masks(kind: str, is_batched: bool) -> dict[str, Tensor]:
    drop = torch.rand(T, S, generator=torch.Generator().manual_seed(1)) < 0.4
    drop[:, 0] = False
    shape = (N * H if is_batched else H, T, S)
    three = drop.expand(shape) ^ (torch.arange(shape[0]) % 2 == 1).view(-1, 1, 1)
    three = three.clone()
    three[..., 0] = False
    pad = torch.zeros(N, S, dtype=torch.bool) if is_batched else torch.zeros(S, dtype=torch.bool)
    pad[..., -2:] = True
    return {
        "attn bool": {"attn_mask": drop},
        "attn float": {"attn_mask": random(T, S)},
        "attn 3d bool": {"attn_mask": three},
        "attn 3d float": {"attn_mask": random(*shape)},
        "padding": {"key_padding_mask": pad},
        "padding float": {"key_padding_mask": random(*pad.shape)},
        "both": {"attn_mask": drop, "key_padding_mask": pad},
        "both 3d": {"attn_mask": random(*shape), "key_padding_mask": random(*pad.shape)},
    }[kind]


MASKS = [
    "attn bool",
    "attn float",
    "attn 3d bool",
    "attn 3d float",
    "padding",
    "padding float",
    "both",
    "both 3d",
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.1}], ids=str
)
@pytest.mark.parametrize(("batch_first", "is_batched"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind, batch_first, is_batched, options, need_weights):
    mha = away_from_default(nn.MultiheadAttention(E, H, batch_first=batch_first, **options))
    given = masks(kind, is_batched)
    model = Caller(mha, ["query", "key", "value", *given], need_weights=need_weights).eval()
    inputs = (*sequences(batch_first, is_batched), *given.values())
    gm, result = run(model, inputs)
    assert len(result.edits) == 1, result.refusals
    assert_same(model, gm, inputs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_causal_hint(need_weights):
    mha = away_from_default(nn.MultiheadAttention(E, H, batch_first=True))
    model = Caller(
        mha, ["query", "key", "value", "attn_mask"], need_weights=need_weights, is_causal=True
    ).eval()
    x = random(N, T, E)
    causal = causal_mask()
    gm, result = run(model, (x, x, x, causal))
    assert len(result.edits) == 1
    assert_same(model, gm, (x, x, x, causal))
    attention = [n for n in gm.graph.nodes if "scaled_dot" in str(n.target)]
    assert [n.kwargs["is_causal"] for n in attention] == [True] * (not need_weights)


def test_weights_are_the_same_numbers_and_zeros_stay():
    mha = nn.MultiheadAttention(E, H)
    with torch.no_grad():
        mha.in_proj_weight[torch.rand(3 * E, E) < 0.5] = 0
    mha.in_proj_bias.requires_grad_(False)
    gm, _ = run(Caller(mha.double(), ["query", "key", "value"]), sequences(False))
    for i, name in enumerate("qkv"):
        part = gm.get_submodule(f"inner.{name}_proj")
        assert torch.equal(part.weight, mha.in_proj_weight[i * E : (i + 1) * E])
        assert part.weight.requires_grad
        assert not part.bias.requires_grad


def test_called_twice_keeps_one_set_of_weights():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.attn(x, x, x, need_weights=False)[0]
            return self.attn(y, x, x)[0]

    model, x = away_from_default(Twice()), random(N, T, E)
    gm = capture(fx.symbolic_trace(model), (x,)).graph_module
    assert len(get_pass(NAME, hints=[x])(gm).edits) == 2
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in model.parameters())
    assert_equivalent(model, gm, (x,), float32=None)


# ---------------------------------------------------------------------- nn.Transformer and its layers
def layer_options():
    for norm_first, batch_first, activation in itertools.product(
        (True, False), (True, False), ("relu", "gelu", nn.Tanh(), torch.sigmoid)
    ):
        yield {"norm_first": norm_first, "batch_first": batch_first, "activation": activation}


@pytest.mark.parametrize("options", list(layer_options()), ids=describe)
@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer(options, bias):
    layer = away_from_default(nn.TransformerEncoderLayer(E, H, 16, 0.1, bias=bias, **options))
    x = sequences(options["batch_first"])[0]
    check(Caller(layer, ["src"]).eval(), (x,))


@pytest.mark.parametrize("options", list(layer_options()), ids=describe)
def test_decoder_layer(options):
    layer = away_from_default(nn.TransformerDecoderLayer(E, H, 16, 0.0, **options))
    x, memory, _ = sequences(options["batch_first"])
    is_function = not isinstance(
        layer.activation, nn.Module
    )  # torch's __setstate__ would replace a module by relu
    check(Caller(layer, ["tgt", "memory"]).eval(), (x, memory), deepcopies=is_function)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_encoder(batch_first, norm, mask):
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=batch_first)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E) if norm else None, enable_nested_tensor=False)
    given: dict[str, Tensor] = {}
    if mask in ("causal", "both"):
        given["mask"] = causal_mask()
    if mask in ("padding", "both"):
        given["src_key_padding_mask"] = torch.arange(T).expand(N, T) > 3
    x = sequences(batch_first)[0]
    check(Caller(away_from_default(stack), ["src", *given]).eval(), (x, *given.values()))


def test_nested_tensors_only_differ_where_it_is_padded():
    layer = nn.TransformerEncoderLayer(E, 4, 16, batch_first=True)
    model = Caller(away_from_default(nn.TransformerEncoder(layer, 2)), ["src", "src_key_padding_mask"]).eval()
    x, padded = random(N, T, E), torch.arange(T).expand(N, T) > 3
    gm, result = run(model, (x, padded))
    assert len(result.edits) == 1, result.refusals
    with torch.no_grad():
        packed, plain = model(x, padded), gm(x, padded)
    torch.testing.assert_close(plain[~padded], packed[~padded], rtol=1e-10, atol=1e-10)
    assert not packed[padded].any()


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder(batch_first, with_masks):
    layer = nn.TransformerDecoderLayer(E, H, 16, batch_first=batch_first, norm_first=True)
    stack = away_from_default(nn.TransformerDecoder(layer, 2, nn.LayerNorm(E)))
    given: dict[str, Tensor] = {}
    if with_masks:
        given["tgt_mask"] = causal_mask()
        given["memory_key_padding_mask"] = torch.arange(S).expand(N, S) > 4
        given["memory_mask"] = random(T, S)
    x, memory, _ = sequences(batch_first)
    check(Caller(stack, ["tgt", "memory", *given]).eval(), (x, memory, *given.values()))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_batched", [True, False])
def test_transformer(batch_first, is_batched):
    model = nn.Transformer(E, H, 2, 1, 16, batch_first=batch_first, dropout=0.2)
    x, memory, _ = sequences(batch_first, is_batched)
    mask = causal_mask()
    check(Caller(away_from_default(model), ["src", "tgt", "tgt_mask"]).eval(), (memory, x, mask))


# ---------------------------------------------------------------------- training
def test_dropout_lives_in_training():
    layer = away_from_default(nn.TransformerEncoderLayer(E, H, 16, 0.5, batch_first=True))
    x = random(N, T, E)
    gm, _ = run(Caller(layer, ["src"]).eval(), (x,))
    assert torch.equal(gm(x), gm(x))
    gm.train()
    assert not torch.equal(gm(x), gm(x))
    attention = [m for m in gm.modules() if isinstance(m, DropoutAttention)]
    assert [m.dropout_p for m in attention] == [0.5]
    assert attention[0].training
    gm.eval()
    assert torch.equal(gm(x), gm(x))


def test_dropout_of_weights_that_are_read():
    mha = away_from_default(nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True))
    x = random(N, T, E)
    gm, _ = run(Caller(mha, ["query", "key", "value"]).train(), (x, x, x))
    torch.manual_seed(0)
    weights = gm(x, x, x)[1]
    assert (weights == 0).any() or not torch.allclose(weights.sum(-1), torch.ones(()).double())
    gm.eval()
    assert torch.allclose(gm(x, x, x)[1].sum(-1), torch.ones(()).double())


def test_a_training_step_is_the_same():
    model = Caller(away_from_default(nn.TransformerEncoderLayer(E, H, 16, 0.0)), ["src"]).train()
    x = sequences(False)[0]
    gm, _ = run(model, (x,))
    other = copy.deepcopy(model)
    for net in (other, gm):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(gm(x), other(x), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- what stays
def refused(model: Caller, inputs: tuple[Tensor, ...]) -> list[Reason]:
    gm, result = run(model, inputs)
    assert not result.edits
    assert_same(model, gm, inputs)
    return [r.reason for r in result.refusals]


def test_own_classes_are_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value, **kwargs):
            return super().forward(query * 2, key, value, **kwargs)

    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    layer.self_attn = Own(E, H, batch_first=True)
    x = random(N, T, E)
    assert refused(Caller(away_from_default(layer), ["src"]).eval(), (x,)) == [Reason.UNRECOGNISED_CALL]


def test_hooks_are_refused():
    layer = away_from_default(nn.TransformerEncoderLayer(E, H, 16, batch_first=True))
    layer.self_attn.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    assert refused(Caller(layer, ["src"]).eval(), (random(N, T, E),)) == [Reason.OPAQUE_HOOK]


@pytest.mark.parametrize(
    ("literals", "names", "shapes", "detail"),
    [
        ({}, ["query", "key", "value", "attn_mask"], [(N, T, E)] * 3 + [(T,)], "attn_mask has 1 axes"),
        ({}, ["query", "key", "value", "key_padding_mask"], [(N, T, E)] * 3 + [(T,)], "key_padding_mask has 1 axes"),
        ({"is_causal": True}, ["query", "key", "value"], [(N, T, E)] * 3, "is_causal without a mask"),
        ({"unheard": 1}, ["query", "key", "value"], [(N, T, E)] * 3, "unheard"),
        ({"need_weights": 2.5}, ["query", "key", "value"], [(N, T, E)] * 3, "need_weights is 2.5"),
    ],
)  # fmt: skip
def test_calls_that_are_not_understood_are_refused(literals, names, shapes, detail):
    """The call itself would fail or is of no known form: nothing is written, and the reason is given."""
    model = Caller(nn.MultiheadAttention(E, H, batch_first=True).eval(), names, **literals)
    gm = traced(model)
    values: list[Any] = [random(*shape) for shape in shapes]
    program = Program(gm, dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True)))
    (node,) = gm.graph.find_nodes(op="call_module", target="inner")
    with pytest.raises(_Refused) as caught:
        _edit(program, node)
    assert caught.value.reason is Reason.UNRECOGNISED_CALL
    assert detail in str(caught.value.detail)


def test_untraceable_activation_is_refused():
    layer = nn.TransformerEncoderLayer(E, H, 16, activation=lambda x: x if x.sum() > 0 else -x)
    assert refused(Caller(away_from_default(layer), ["src"]).eval(), (random(T, N, E),)) == [
        Reason.UNRECOGNISED_CALL
    ]


def test_traceable_activation_is_written():
    layer = nn.TransformerEncoderLayer(E, H, 16, activation=lambda x: F.gelu(x, approximate="tanh") * x)
    check(Caller(away_from_default(layer), ["src"]).eval(), (random(T, N, E),))


def test_an_optional_mask_is_refused():
    """A placeholder that may be None when called and a tensor another time."""

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(E, H)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.attn(x, x, x, attn_mask=mask)[0]

    x = sequences(False)[0]
    gm = capture(fx.symbolic_trace(Optional().double()), (x,)).graph_module
    result = get_pass(NAME, hints=[x, None])(gm)
    assert [r.reason for r in result.refusals] == [Reason.UNRECOGNISED_CALL]


def test_a_shared_projection_is_refused():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0] + F.linear(x, self.attn.in_proj_weight[:E])

    model, x = away_from_default(Tied()), random(N, T, E)
    gm = capture(fx.symbolic_trace(model), (x,)).graph_module
    result = get_pass(NAME, hints=[x])(gm)
    assert not result.edits
    assert [r.reason for r in result.refusals] == [Reason.SHARED_WEIGHT]


def test_two_modules_with_one_projection_stay_tied():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.MultiheadAttention(E, H, batch_first=True) for _ in range(2))
            self.b.in_proj_weight = self.a.in_proj_weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x, x, x)[0] + self.b(x, x, x)[0]

    model, x = away_from_default(Two()), random(N, T, E)
    gm = capture(fx.symbolic_trace(model), (x,)).graph_module
    assert len(get_pass(NAME, hints=[x])(gm).edits) == 2
    assert gm.get_submodule("a.q_proj").weight is gm.get_submodule("b.q_proj").weight
    assert gm.get_submodule("a.q_proj").bias is not gm.get_submodule("b.q_proj").bias
    assert_equivalent(model, gm, (x,), float32=None)


def test_a_parametrized_projection_is_refused():
    mha = away_from_default(nn.MultiheadAttention(E, H, batch_first=True))
    nn.utils.parametrize.register_parametrization(mha, "in_proj_weight", nn.Identity())
    x = random(N, T, E)
    _, result = run(Caller(mha, ["query", "key", "value"]), (x, x, x))
    assert not result.edits
    assert [r.reason for r in result.refusals] == [Reason.COMPUTED_WEIGHT]


def test_graphs_without_attention_need_no_shapes():
    gm = capture(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))).graph_module
    assert not get_pass(NAME)(gm).modified


def test_canonicalise_bakes_masks_first():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    model, x = away_from_default(Net()), random(N, T, E)
    nn.utils.prune.l1_unstructured(model.attn, "in_proj_weight", 0.5)
    wanted = model(x)
    gm = capture(fx.symbolic_trace(model), (x,)).graph_module
    canonicalise(gm, [x])
    assert (gm.get_submodule("attn.k_proj").weight == 0).float().mean() > 0.2
    torch.testing.assert_close(gm(x), wanted, rtol=1e-11, atol=1e-12)
