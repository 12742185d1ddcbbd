"""The user's own module takes over what minimize kept, or stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import srfx
from srfx.errors import ApplyError, PlanError
from srfx.nn import CompensatedLayerNorm
from tests.helpers import count, kill, masked, randomized, relative_error, trace
from tests.snapshots import assert_unchanged, snapshot

IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.depth = nn.Conv2d(n_out, n_out, 3, 1, 1, groups=n_out)
        self.down = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(self.depth(y))) + self.down(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GELU())
        self.body = nn.Sequential(Block(12, 12, 1), Block(12, 24, 2))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Mixer(nn.Module):
    """Attention written by hand, with numbers of its own, and a stream with layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = 4, 6, 24
        self.scale = self.head_dim**-0.5
        self.embed = nn.Linear(5, 16)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 24, bias=False) for _ in range(3))
        self.out = nn.Linear(24, 16)
        self.last = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        n = y.shape[0]
        q, k, v = (
            p(y).view(n, -1, self.num_heads, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        a = torch.softmax(q @ k.transpose(-1, -2) * self.scale, -1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(n, -1, self.embed_dim))
        return self.head(self.last(x))


TOKENS = torch.randn(2, 7, 5)


def pruned_mixer() -> Mixer:
    net = randomized(Mixer())
    for layer in (net.embed, net.out):
        kill(layer, rows=[0, 4, 8, 12])
    for layer in (net.q, net.k, net.v):
        kill(layer, rows=range(6, 12))  # head 1
    assert isinstance(net, Mixer)
    return net


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_a_convolutional_network(route: str) -> None:
    net = masked(randomized(ResNet()))
    net.head = randomized(nn.Linear(24, 5))  # whose outputs all vary
    small = srfx.minimize(trace(net, (IMAGES,), route), IMAGES)
    parameters = dict(net.named_parameters())
    assert srfx.apply_(net, small) is net
    assert count(net) == count(small) < 0.6 * count(ResNet())
    for batch in (IMAGES, torch.randn(3, 3, 12, 10)):
        assert relative_error(small(batch), net(batch)) < 1e-5
    assert all(p is parameters[n] for n, p in net.named_parameters() if n in parameters)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    net.train()
    net(IMAGES).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert srfx.verify(small, small, IMAGES).ok  # nothing is shared with the small model


def test_norms_are_swapped_and_heads_are_counted() -> None:
    net = pruned_mixer()
    small = srfx.minimize(trace(net, (TOKENS,), "export"))
    wanted = net(TOKENS)
    srfx.apply_(net, small)
    assert relative_error(wanted, net(TOKENS)) < 1e-5
    assert isinstance(net.norm, CompensatedLayerNorm)
    assert (net.num_heads, net.head_dim, net.embed_dim) == (3, 6, 18)
    assert net.q.weight.shape[0] == net.q.out_features == 18
    assert count(net) == count(small)
    assert [n for n, _ in net.named_children()] == [n for n, _ in Mixer().named_children()]


def test_a_fresh_instance_and_a_file(tmp_path: Path) -> None:
    """What was trained elsewhere goes into a new module of the class."""
    net = pruned_mixer()
    small = srfx.minimize(trace(net, (TOKENS,), "export"))
    srfx.save(small, tmp_path / "x.srfx")
    fresh = srfx.apply_(Mixer().eval(), srfx.load(tmp_path / "x.srfx"))
    assert relative_error(small(TOKENS), fresh(TOKENS)) < 1e-5


def test_the_plan_resizes_too(tmp_path: Path) -> None:
    net = pruned_mixer()
    small = srfx.minimize(trace(net, (TOKENS,), "export"))
    wanted, plan = net(TOKENS), srfx.plan(small)
    srfx.save(small, tmp_path / "x.srfx")
    again = type(plan).from_json(plan.to_json())  # on another machine, say
    fresh = again.apply_(Mixer().eval(), srfx.load(tmp_path / "x.srfx"))
    assert relative_error(wanted, fresh(TOKENS)) < 1e-5
    other = srfx.plan(srfx.minimize(randomized(Mixer()), TOKENS))
    state = snapshot(net)
    with pytest.raises(PlanError, match="made by another plan"):
        other.apply_(net, small)
    with pytest.raises(PlanError, match="carries no record"):
        plan.apply_(net, Mixer())
    assert_unchanged(net, state)
    assert plan.apply_(net, small, inputs=TOKENS) is net
    assert count(net) == count(small)
    assert relative_error(wanted, net(TOKENS)) < 1e-5
    assert (
        relative_error(wanted, plan.apply_(Mixer().eval())(TOKENS)) < 1e-5
    )  # the small model is still there


class Classifier(nn.Module):
    """The conventions of model libraries: a width that code for new heads reads, and a norm over axis 1 of pictures."""

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.num_features = 12
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), self.Norm(12)
        self.mix, self.body = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.reset_classifier(n_classes)

    def reset_classifier(self, n_classes: int) -> None:
        self.fc = nn.Linear(self.num_features, n_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.mix(self.norm(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_heads_of_model_libraries(route: str) -> None:
    net = randomized(Classifier())
    kill(net.stem, rows=[1, 2, 5])
    kill(net.body, rows=[0, 3])
    small = srfx.minimize(trace(net, (IMAGES,), route), IMAGES)
    wanted = net(IMAGES)
    srfx.apply_(net, small)
    assert net.stem.out_channels == net.norm.weight.numel() == 9
    assert relative_error(wanted, net(IMAGES)) < 1e-5
    assert net.num_features == 10
    net.reset_classifier(7)
    assert net(torch.randn(3, 3, 6, 10)).shape == (3, 7)
    assert net.forward_features(IMAGES).shape == (2, 10, 8, 8)


def test_training_goes_on_while_the_last_loss_is_still_there() -> None:
    """Torch keeps the shape of a parameter's gradient with any graph that is alive."""
    net = masked(randomized(ResNet())).train()
    loss = net(IMAGES).square().mean()
    small = srfx.minimize(net.eval(), IMAGES)
    srfx.apply_(net, small)
    optimizer = torch.optim.SGD(net.train().parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        after = net(IMAGES).square().mean()
        after.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    assert loss.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mixer_s32_224"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 64, 64)
    options = {"img_size": 64} if name.startswith("mixer") else {}
    net = masked(randomized(timm.create_model(name, num_classes=10, **options)))
    small = srfx.minimize(net, x)
    wanted = net(x)
    srfx.apply_(net, small)
    assert relative_error(wanted, net(x)) < 1e-5
    net.reset_classifier(7)
    assert net(x).shape == (2, 7)
    net.train()(x).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_constant_outputs_get_their_rows_back(bias: bool) -> None:
    net = randomized(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5, bias=bias)))
    kill(net[0], rows=[0, 1])
    kill(net[2], rows=[1, 3])
    x = torch.randn(3, 4)
    wanted = net(x)
    small = srfx.minimize(net, x)
    assert small.get_parameter("2.weight").shape == (3, 6)
    srfx.apply_(net, small)
    assert (net[0].out_features, net[2].in_features, net[2].out_features) == (6, 6, 5)
    assert relative_error(wanted, net(x)) < 1e-6


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(x.shape[0], 3, 4).flatten(1))


class Mean(nn.Module):
    """Runs at any width, but computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.b(y) * y.mean(-1, keepdim=True)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "hard-coded": (HardCoded, (0, 4, 8), "cannot run resized"),
    "mean": (Mean, (0, 1), "computes something else resized"),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_refusals_leave_the_module_alone(name: str) -> None:
    make, rows, message = REFUSALS[name]
    net = randomized(make())
    kill(net.a, rows=rows)
    x = torch.randn(2, 4)
    net(x).sum().backward()
    small = srfx.minimize(net, x)
    assert count(small) < count(net)
    before = snapshot(net)
    gradients = {n: p.grad for n, p in net.named_parameters()}
    with pytest.raises(ApplyError, match=message):
        srfx.apply_(net, small)
    assert_unchanged(net, before)
    assert {n: p.grad for n, p in net.named_parameters()} == gradients
    assert (net.a.out_features, net.a.weight.shape[0]) == (12, 12)


def test_what_was_taken_apart_is_refused() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attend(x, x, x, need_weights=False)[0])

    net = randomized(Fused())
    kill(net.attend.out_proj, columns=range(4))  # a head that nobody reads
    small = srfx.minimize(net, torch.randn(2, 3, 8))
    before = snapshot(net)
    with pytest.raises(ApplyError, match="cannot run resized"):
        srfx.apply_(net, small)
    assert_unchanged(net, before)
    with pytest.raises(ApplyError, match=r"the plan was made for"):
        srfx.apply_(nn.ModuleDict({"attend": nn.Identity(), "out": nn.Linear(9, 2)}), small)
    with pytest.raises(PlanError, match="no record"):
        srfx.apply_(net, torch.fx.symbolic_trace(net))


def hugging_face(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    if kind == "bert":
        net: nn.Module = hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=40,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
            )
        )
    elif kind == "gpt2":
        net = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        net = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=40,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                **sizes,
            )
        )
    net = randomized(net)
    with torch.no_grad():
        for name, layer in net.named_modules():
            last = name.rpartition(".")[2]
            if last == "c_fc":
                layer.weight[:, ::2] = 0
            elif last in ("gate_proj", "up_proj"):
                layer.weight[: 8 if ".0." in name else 16] = 0
            elif last in ("q_proj", "query") and ".1." in name:
                layer.weight[:16] = 0  # two heads, for Llama those of one key head
            if last in ("o_proj", "dense") and ".1." in name and layer.weight.shape == (32, 32):
                layer.weight[:, :16] = 0
            if last in ("o_proj", "down_proj"):
                layer.weight[24:] = 0
            if last in ("embed_tokens",):
                layer.weight[:, 24:] = 0
    kwargs: dict[str, Any] = {"input_ids": torch.randint(1, 40, (2, 9))}
    return net, kwargs if kind == "bert" else {**kwargs, "use_cache": False}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_hugging_face_models(kind: str) -> None:
    net, kwargs = hugging_face(kind)
    with torch.no_grad():
        wanted = net(**kwargs).logits
        small = srfx.minimize(net, example_kwargs=kwargs)
        n_before = count(net)
        told = (
            None
            if kind == "bert"
            else net.generate(kwargs["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
        )
        srfx.apply_(net, small)
        table = 2 * 32 if kind == "bert" else 0  # of token types: a constant in the small graph
        assert count(net) - table == count(small) < 0.95 * n_before
        assert relative_error(wanted, net(**kwargs).logits) < 1e-4
        if told is not None:
            again = net.generate(kwargs["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert torch.equal(told, again)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_a_bag_of_embeddings(route: str) -> None:
    """Its columns of zeros go; whatever the route, its attributes follow."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.back = nn.EmbeddingBag(7, 6), nn.Linear(6, 2)

        def forward(self, words: Tensor) -> Tensor:
            return self.back(self.bag(words))

    model = randomized(Bag()).double()
    with torch.no_grad():
        model.bag.weight[:, [1, 4]] = 0
    words = torch.randint(0, 7, (3, 5))
    wanted = model(words)
    srfx.apply_(model, srfx.minimize(trace(model, (words,), route), (words,)), inputs=(words,))
    assert (model.bag.num_embeddings, model.bag.embedding_dim, model.back.in_features) == (7, 4, 4)
    assert relative_error(wanted, model(words)) < 1e-9
