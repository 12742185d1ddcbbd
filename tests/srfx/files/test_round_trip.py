"""A saved model comes back as it was: the same bits out, the same weights, names, ties, report and plan."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import srfx
from srfx.errors import MissingArchitectureError
from srfx.record import record_of
from tests.helpers import masked, randomized, trace

ROOT = Path(__file__).parents[3]
Pair = namedtuple("Pair", "first second")


def there_and_back(small: fx.GraphModule, tmp_path: Path, **options: Any) -> fx.GraphModule:
    srfx.save(small, tmp_path / "net.srfx")
    return srfx.load(tmp_path / "net.srfx", **options)


def assert_same(small: fx.GraphModule, back: fx.GraphModule, *batches: tuple[Any, ...]) -> None:
    """Everything about the two agrees."""
    assert back is not small
    assert [str(n) for n in back.graph.nodes] == [str(n) for n in small.graph.nodes]
    assert list(back.state_dict()) == list(small.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(back, kind)(remove_duplicate=False))
        theirs = dict(getattr(small, kind)(remove_duplicate=False))
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            same_bits(tensor, ours[name], name)
            twins = [other for other, t in theirs.items() if t is tensor]
            assert [other for other, t in ours.items() if t is ours[name]] == twins
            assert ours[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    modules, others = dict(back.named_modules()), dict(small.named_modules())
    assert {name: type(m).__name__ for name, m in modules.items()} == {
        name: type(m).__name__ for name, m in others.items()
    }
    for name, module in modules.items():
        assert module.training == others[name].training, name
        assert module.extra_repr() == others[name].extra_repr(), name
        assert module._non_persistent_buffers_set == others[name]._non_persistent_buffers_set
    if record_of(small) is not None:
        assert back.code == small.code
        assert srfx.plan(back) == srfx.plan(small)
        assert srfx.plan(back).digest() == srfx.plan(small).digest()
        assert srfx.report(back).to_json() == srfx.report(small).to_json()
        assert record_of(back) == record_of(small)
    for batch in batches:
        wanted, found = small(*copy.deepcopy(batch)), back(*copy.deepcopy(batch))
        a, a_spec = pytree.tree_flatten(wanted)
        b, b_spec = pytree.tree_flatten(found)
        assert a_spec == b_spec
        assert type(found) is type(wanted)
        for x, y in zip(a, b, strict=True):
            same_bits(x, y, "output") if isinstance(x, Tensor) else None
            assert isinstance(x, Tensor) or x == y


def same_bits(a: Tensor, b: Tensor, name: str) -> None:
    assert type(a) is type(b), name
    assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (
        b.shape,
        b.dtype,
        b.stride(),
        b.requires_grad,
    ), name
    assert torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)
    ), name


def assert_minimizes_alike(small: fx.GraphModule, back: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    first, second = srfx.minimize(small, inputs), srfx.minimize(back, inputs)
    assert first.code == second.code
    assert srfx.plan(first).digest() == srfx.plan(second).digest()
    assert [n for n, _ in second.named_parameters()] == [n for n, _ in small.named_parameters()]


class Residual(nn.Module):
    """A convolutional network with what they have: skips, groups, norms, pools, functional calls, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(16, 16, 3, padding=1, groups=2),
                act=nn.SiLU(),
                up=nn.Upsample(scale_factor=2),
                pool=nn.AvgPool2d(2),
            )
        )
        self.group = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.group(x + self.deep(x))
        n, c = x.shape[:2]
        x = F.max_pool2d(x, 2).view(n, c, -1).mean(dim=-1)
        return self.head(F.dropout(x, 0.5, self.training))


class Mixer(nn.Module):
    """LayerNorm streams and nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16))
        self.rms = nn.RMSNorm(16)
        self.out = nn.Linear(16, 3)
        self.register_buffer("places", torch.randn(7, 16), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places
        y = self.norms[0](x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norms[1](x))
        return self.out(self.rms(x))


IMAGES = torch.randn(2, 3, 8, 8)
IDS = torch.randint(0, 11, (2, 7))
NETS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "conv": (Residual, (IMAGES,)),
    "mixer": (Mixer, (IDS,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_both_routes(name: str, route: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, inputs = NETS[name]
    net = masked(randomized(make())).to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    small = srfx.minimize(trace(net, inputs, route), inputs)
    back = there_and_back(small, tmp_path)
    larger = tuple(torch.cat([t, t.flip(-1), t]) for t in inputs)
    assert_same(small, back, inputs, larger)
    assert_minimizes_alike(small, back, inputs)


def test_the_result_trains_and_saves_again(tmp_path: Path) -> None:
    small = srfx.minimize(fx.symbolic_trace(masked(randomized(Residual()))), IMAGES)
    back = there_and_back(small, tmp_path)
    for net in (small, back):
        net.train()
        torch.manual_seed(1)
        step = torch.optim.SGD(net.parameters(), 0.1)
        net(IMAGES).square().sum().backward()
        step.step()
    assert_same(small.eval(), back.eval(), (IMAGES,))
    assert_same(back, there_and_back(back, tmp_path), (IMAGES,))


def test_channels_last_and_frozen_stay(tmp_path: Path) -> None:
    net = masked(randomized(Residual())).to(memory_format=torch.channels_last)
    net.stem.weight.requires_grad_(False)
    small = srfx.minimize(fx.symbolic_trace(net), IMAGES)
    assert not small.get_parameter("stem.weight").is_contiguous()
    assert_same(
        small, there_and_back(small, tmp_path), (IMAGES.contiguous(memory_format=torch.channels_last),)
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.twice = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.twice(F.relu(self.twice(self.embed(ids)))))


def test_ties_and_a_module_called_twice(tmp_path: Path) -> None:
    small = srfx.minimize(fx.symbolic_trace(randomized(Tied())), IDS % 9)
    back = there_and_back(small, tmp_path)
    assert back.get_parameter("head.weight") is back.get_parameter("embed.weight")
    assert_same(small, back, (IDS % 9,))
    with safe_open(tmp_path / "net.srfx", "pt") as file:
        assert sorted(file.keys()) == ["__srfx__", "embed.weight", "twice.bias", "twice.weight"]


def test_shared_memory_odd_strides_and_dtypes(tmp_path: Path) -> None:
    root = nn.Module()
    whole = torch.randn(6, 4)
    root.first, root.second = nn.Parameter(whole[:3]), nn.Parameter(whole[2:].t())
    root.register_buffer("wide", torch.randn(1, 4).expand(5, 4))
    root.register_buffer("turns", torch.randn(3, dtype=torch.complex64))
    root.register_buffer("small", torch.randn(3).to(torch.float8_e4m3fn))
    root.register_buffer("flag", torch.tensor(True), persistent=False)
    root.register_buffer("none", torch.zeros(0, 3))
    root.register_buffer("gaps", torch.randn(4, 6)[:, ::2])
    graph = fx.Graph()
    names = ("first", "second", "wide", "turns", "small", "flag", "none", "gaps")
    graph.output(tuple(graph.get_attr(name) for name in names))
    gm = fx.GraphModule(root, graph)
    gm._non_persistent_buffers_set.add("flag")
    back = there_and_back(gm, tmp_path)
    with torch.no_grad():
        for a, b in zip(gm(), back(), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(
                a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
            )
        assert back.wide.stride() == (0, 1)
        assert back.second.stride() == gm.second.stride()
        back.first[2] = 7  # also the first column of the other
        assert back.second[:, 0].tolist() == [7.0] * 4
    assert back._non_persistent_buffers_set == {"flag"}
    assert (tmp_path / "net.srfx").stat().st_size < 16_000


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: dict[str, Tensor], *, scale: Tensor, pair: Pair) -> dict[str, Any]:
        y = self.b(F.relu(self.a(x["x"]))) * scale + pair.first
        return OrderedDict(both=(y, [y + pair.second]), one=Pair(y, None))


def test_nested_inputs_and_outputs_of_an_export(tmp_path: Path) -> None:
    net = masked(randomized(Nested()))
    batch = torch.export.Dim("batch")
    x, scale, pair = torch.randn(2, 4), torch.tensor(2.0), Pair(torch.randn(3), torch.randn(3))
    program = torch.export.export(
        net,
        ({"x": x},),
        {"scale": scale, "pair": pair},
        dynamic_shapes={"x": {"x": {0: batch}}, "scale": None, "pair": Pair(None, None)},
    )
    small = srfx.minimize(program)
    back = there_and_back(small, tmp_path)
    assert_same(small, back)
    for n in (2, 5):
        x = torch.randn(n, 4)
        wanted, found = (m({"x": x}, scale=scale, pair=pair) for m in (small, back))
        assert isinstance(found, OrderedDict)
        assert isinstance(found["one"], Pair)
        assert torch.equal(found["both"][1][0], wanted["both"][1][0])
        assert torch.equal(found["one"].first, wanted["one"].first)
    again = srfx.minimize(back)  # the shapes are in the record: no example inputs are needed
    assert srfx.plan(again).digest() == srfx.plan(srfx.minimize(small)).digest()


def test_a_graph_without_record(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(randomized(Residual()))
    back = there_and_back(gm, tmp_path)
    assert_same(gm, back, (IMAGES,))
    assert record_of(back) is None


def test_every_layer_of_torch_nn(tmp_path: Path) -> None:
    layers: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "lstm": (nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), (torch.randn(2, 3, 4),)),
        "gru": (nn.GRU(4, 5), (torch.randn(3, 2, 4),)),
        "transformer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(2, 3, 8),)),
        "mha": (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
            tuple(torch.randn(3, 2, n) for n in (8, 4, 6)),
        ),
        "transposed": (
            nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding_mode="zeros"),
            (torch.randn(2, 4, 5, 5),),
        ),
        "reflect": (nn.Conv1d(4, 4, 3, padding="same", padding_mode="reflect"), (torch.randn(2, 4, 9),)),
        "prelu": (nn.PReLU(4), (torch.randn(2, 4),)),
        "bilinear": (nn.Bilinear(4, 3, 2), (torch.randn(2, 4), torch.randn(2, 3))),
        "bag": (nn.EmbeddingBag(9, 4, mode="mean"), (torch.tensor([[1, 2], [3, 4]]),)),
        "norm": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (torch.randn(2, 3, 4, 4),)),
        "local": (nn.LocalResponseNorm(2), (torch.randn(2, 3, 4, 4),)),
        "loss": (
            nn.CrossEntropyLoss(weight=torch.rand(3), label_smoothing=0.1),
            (torch.randn(2, 3), torch.tensor([0, 2])),
        ),
        "pool": (nn.AdaptiveAvgPool2d((None, 2)), (torch.randn(2, 3, 5, 5),)),
        "unflatten": (nn.Unflatten(1, (2, -1)), (torch.randn(2, 6),)),
    }
    for name, (layer, inputs) in layers.items():
        graph = fx.Graph()
        nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
        graph.output(graph.call_module("layer", tuple(nodes)))
        gm = fx.GraphModule({"layer": layer.eval()}, graph)
        back = there_and_back(gm, tmp_path)
        found, wanted = pytree.tree_leaves(back(*inputs)), pytree.tree_leaves(gm(*inputs))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), name
        assert repr(back.layer) == repr(layer)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


def test_recurrent_and_ragged(tmp_path: Path) -> None:
    net = randomized(Recurrent())
    with torch.no_grad():
        net.head.weight[:, :3] = 0
    x = torch.randn(2, 5, 4)
    small = srfx.minimize(net, x)
    assert_same(small, there_and_back(small, tmp_path), (x,))
    net = masked(randomized(Residual()))
    small = srfx.minimize(fx.symbolic_trace(net), IMAGES, ragged=True)
    back = there_and_back(small, tmp_path)
    assert_same(small, back, (IMAGES,))


@pytest.mark.slow
def test_hugging_face_with_dynamic_sizes(tmp_path: Path) -> None:
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    net = masked(
        randomized(hf.BertForSequenceClassification(hf.BertConfig(vocab_size=40, **sizes))), rows=0.2
    )
    given = {"input_ids": torch.randint(1, 40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=512)
    with torch.no_grad():
        program = torch.export.export(
            net, (), given, dynamic_shapes={name: {0: batch, 1: tokens} for name in given}, strict=False
        )
    small = srfx.minimize(program)
    back = there_and_back(small, tmp_path)
    assert_same(small, back)
    with torch.no_grad():
        for shape in ((2, 9), (3, 5)):
            again = {
                "input_ids": torch.randint(1, 40, shape),
                "attention_mask": torch.ones(shape, dtype=torch.long),
            }
            wanted, found = small(**again), back(**again)
            assert type(found) is type(wanted) is type(net(**again))
            same_bits(wanted.logits, found.logits, "logits")
    assert srfx.plan(srfx.minimize(back)).digest() == srfx.plan(srfx.minimize(small)).digest()
    code = "import sys, srfx; srfx.load(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "net.srfx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "import transformers.modeling_outputs first" in done.stderr


@pytest.mark.slow
def test_torchvision_with_functions_of_its_own(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    make = torchvision.models.swin_t
    net = masked(randomized(make()), rows=0.2)
    images = torch.randn(2, 3, 64, 64)
    small = srfx.minimize(fx.symbolic_trace(net), images)
    srfx.save(small, tmp_path / "net.srfx")
    with pytest.raises(MissingArchitectureError, match=r"torchvision\.models\.swin"):
        srfx.load(tmp_path / "net.srfx")
    back = srfx.load(tmp_path / "net.srfx", make)
    assert torch.equal(small(images), back(images))
