"""Models for the benchmarks of ragged minimization: nine architectures, with zeros in rows, columns and at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, fx, nn

from tests.helpers import recalibrated

VISION = ("resnet18", "resnet50", "mobilenet_v2", "convnext_tiny", "vit_b_16")
TEXT = ("bert", "gpt2", "llama")
NAMES = ("mlp", *VISION, *TEXT)
VOCABULARY = 2000
HEADS = ("4", "fc", "classifier.1", "classifier.2", "heads.head", "lm_head", "pooler.dense")


def build(name: str, seed: int = 0) -> nn.Module:
    """The model with random weights and biases, masked, in eval mode and float32."""
    torch.manual_seed(seed)
    model = _plain(name).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if path.endswith("bias"):
                p.add_(0.1 * torch.randn(p.shape, generator=g))
            elif p.dim() > 1 and not bool(p.any()):  # a head that starts at zero
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
            elif "layer_scale" in path:
                p.copy_(0.1 + 0.2 * torch.rand(p.shape, generator=g))
    mask(model, g)
    if name in VISION:
        recalibrated(model, inputs(name, 8, seed + 1), seed)
    return model


def _plain(name: str) -> nn.Module:
    if name == "mlp":
        return nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    if name in VISION:
        import torchvision.models as zoo

        options = {"image_size": 64} if name == "vit_b_16" else {}
        found: nn.Module = zoo.get_model(name, weights=None, **options)
        return found
    import transformers as hf

    make: dict[str, Callable[[], Any]] = {
        "bert": lambda: hf.BertModel(hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=1024, max_position_embeddings=128)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=128, n_embd=256, n_layer=4, n_head=4, use_cache=False)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=128, use_cache=False)),
    }  # fmt: skip
    model: nn.Module = make[name]()
    return model


def inputs(name: str, batch: int, seed: int = 0, size: int = 64) -> tuple[Tensor, ...]:
    """Arguments of the model."""
    g = torch.Generator().manual_seed(1000 + seed)
    if name == "mlp":
        return (torch.randn(batch, 784, generator=g),)
    if name in TEXT:
        return (torch.randint(0, VOCABULARY, (batch, 32), generator=g),)
    return (torch.randn(batch, 3, size, size, generator=g),)


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    """Path, module, weight as [rows, columns, ..] and groups of every layer that a pruner masks; tied ones are left."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for path, m in model.named_modules():
        if isinstance(m, nn.MultiheadAttention):
            assert m.in_proj_weight is not None
            yield f"{path}.in_proj", m, m.in_proj_weight, 1
        weight = getattr(m, "weight", None)
        if not isinstance(weight, Tensor) or id(weight) in tied:
            continue
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            yield path, m, weight, getattr(m, "groups", 1)
        elif type(m).__name__ == "Conv1D":
            yield path, m, weight.t(), 1


@torch.no_grad()
def mask(model: nn.Module, g: torch.Generator) -> None:
    """40 % of the rows (their biases stay; not of the last layer), 20 % of the columns, half of the rest at random."""
    for path, _, weight, groups in weights(model):
        scale = weight.norm()
        rows, columns = weight.shape[0], weight.shape[1]
        weight.mul_((torch.rand(weight.shape, generator=g) > 0.5).to(weight))
        if path not in HEADS:
            weight[torch.randperm(rows, generator=g)[: rows * 2 // 5]] = 0
        if groups == 1:
            weight[:, torch.randperm(columns, generator=g)[: columns // 5]] = 0
        weight.mul_(scale / weight.norm().clamp(min=1e-12))


def traced(name: str, model: nn.Module, args: tuple[Tensor, ...]) -> fx.GraphModule:
    """By torch.fx where it can, else exported."""
    if name not in TEXT:
        return fx.symbolic_trace(model)
    batch = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(model, args, strict=False, dynamic_shapes=({0: batch},))
    found = program.module()
    assert isinstance(found, fx.GraphModule)
    return found


def tensor(output: Any) -> Tensor:
    """The one output that counts."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "last_hidden_state"):
        found = getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    raise TypeError(f"no tensor in {type(output).__name__}")
