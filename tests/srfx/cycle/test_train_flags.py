"""Exported graphs train: dropout follows the flag, and a small language model goes through the cycle."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import srfx
from srfx.errors import CycleError
from tests.helpers import count


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.relu(self.up(x))))


def test_dropout_follows_the_flag_also_after_minimize() -> None:
    net, x = Net(), torch.randn(3, 4)
    with torch.no_grad():
        net.up.weight[4:] = 0
        net.up.bias[4:] = 0
    graph = srfx.live_dropout(torch.export.export(net.train(), (x,)))
    assert graph.get_parameter("up.weight") is net.up.weight
    small = srfx.minimize(copy.deepcopy(graph).eval(), x)
    assert small.get_parameter("up.weight").shape == (4, 4)
    for model in (graph, small):
        torch.testing.assert_close(model.eval()(x), net.eval()(x))
        assert not torch.equal(model.train()(x), model(x))
        assert model.training


def test_dropout_within_attention_is_refused() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    with pytest.raises(CycleError, match=r"drops out 0\.1"):
        srfx.live_dropout(torch.export.export(Attention(), (torch.randn(1, 2, 3, 4),)))


@pytest.mark.slow
def test_a_small_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    model.config.use_cache = False
    ids = (torch.arange(12) + torch.arange(16).unsqueeze(1)) % 16  # each token is its neighbour's successor

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).logits

    graph = srfx.live_dropout(torch.export.export(Logits(), (ids,)))

    def loss(net: nn.Module) -> torch.Tensor:
        return F.cross_entropy(net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def train(net: nn.Module) -> None:
        optimizer = torch.optim.AdamW(net.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()

    train(graph)
    run = srfx.SqueezeRelease(
        graph, train, lambda net: loss(net).item(), ids, cycles=2, pruner="groups", penalty=3e-4,
        mode="min", tolerance=0.5, patience=2, progress=False,
    )  # fmt: skip
    best = run.run()
    assert run.history[0].score < 0.5
    assert count(best) * 2 < run.history[0].n_parameters
    assert {"model.transformer.h.0.mlp.c_fc.weight"} <= {n for n, _ in best.named_parameters()}
