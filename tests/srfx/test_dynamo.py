"""torch.compile through srfx: what the inner backend is handed, and that nothing frozen is used out of date."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srfx.dynamo import backend
from srfx.errors import UnsupportedModelError


class Inner:
    """A backend that keeps every graph it is handed."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def n_weights(self) -> list[int]:
        return [sum(p.numel() for p in gm.parameters()) for gm in self.graphs]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network() -> nn.Sequential:
    """A third of the convolution's channels are zero in all that writes them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, 5),
    )
    with torch.no_grad():
        net[0].weight[6:] = 0
    return net.eval().double()


SMALL = 6 * 27 + 6 + 6 + 6 + 6 * 5 + 5  # convolution, batch norm, linear


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64)


def compiled(net: nn.Module, inner: Any, **options: Any) -> Any:
    return torch.compile(net, backend=backend, options={"backend": inner, **options})


def test_the_inner_backend_gets_the_small_graph() -> None:
    net, inner = network(), Inner()
    fast = compiled(net, inner)
    with torch.no_grad():
        x = images(2)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-12, atol=1e-12)
    assert inner.n_weights == [SMALL]
    assert len(inner.graphs[0].graph.find_nodes(op="placeholder")) == 1, "weights are frozen"


def test_a_second_batch_size_makes_a_dynamic_graph() -> None:
    net, inner = network(), Inner()
    fast = compiled(net, inner)
    with torch.no_grad():
        for n in (2, 4, 7, 3):
            x = images(n)
            torch.testing.assert_close(fast(x), net(x), rtol=1e-12, atol=1e-12)
    assert inner.n_weights == [SMALL, SMALL], "one static graph, one dynamic"


def test_options_reach_minimize() -> None:
    net, inner = network(), Inner()
    with torch.no_grad():
        compiled(net, inner, multiple_of=4)(images(2))
    assert inner.graphs[0](images(2))[0].shape == (2, 5)
    assert max(p.shape[0] for p in inner.graphs[0].parameters()) == 8


def test_an_unknown_option_is_named() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="smallest"):
        compiled(network(), Inner(), smallest=True)(images(2))


def test_a_weight_written_later_is_noticed() -> None:
    net = network()
    fast = compiled(net, Inner())
    with torch.no_grad():
        fast(images(2))
        net[5].weight.mul_(2)
        net[0].weight[6:] = 1  # not even zero any more
        x = images(2)
        with pytest.warns(UserWarning, match="weights changed"):
            found = fast(x)
        torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(x)  # said once


def test_after_a_reset_the_new_weights_are_minimized() -> None:
    net, inner = network(), Inner()
    fast = compiled(net, inner)
    with torch.no_grad():
        fast(images(2))
        net[0].weight[3:] = 0
        torch.compiler.reset()
        x = images(2)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-12, atol=1e-12)
    assert inner.n_weights == [SMALL, 3 * 27 + 3 + 3 + 3 + 3 * 5 + 5]


def test_with_gradients_the_graph_goes_on_as_it_is_and_trains() -> None:
    net, inner = network(), Inner()
    fast = compiled(net, inner)
    with pytest.warns(UserWarning, match="freezes weights"):
        fast(images(2)).sum().backward()
    assert net[0].weight.grad is not None
    assert inner.n_weights == [0], "parameters are still inputs"


def test_what_the_graph_writes_is_not_frozen() -> None:
    net = network().train()
    twin = copy.deepcopy(net)
    fast = compiled(net, Inner())
    with torch.no_grad():
        for _ in range(2):
            x = images(4)
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(net[1].running_var, twin[1].running_var)


class Counter(nn.Module):
    """Writes a buffer through a view at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0].add_(1)
        return x + self.calls[0]


def test_a_buffer_written_through_a_view_is_not_frozen() -> None:
    net, twin = Counter(), Counter()
    fast = compiled(net, Inner())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(torch.ones(3)), twin(torch.ones(3)))
    torch.testing.assert_close(net.calls, twin.calls)


def test_what_minimize_refuses_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedModelError("weights of a kind nobody knows")

    monkeypatch.setattr("srfx.dynamo.minimize", refuse)
    net, inner = network(), Inner()
    x = images(2)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="a kind nobody knows"):
            found = compiled(net, inner)(x)
        torch.testing.assert_close(found, net(x))
    assert inner.n_weights == [0]


def test_a_mode_without_inductor_is_refused() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="setting of inductor"):
        backend(fx.symbolic_trace(nn.ReLU()), [images(1)], options={"backend": "eager"}, mode="max-autotune")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_inductor(mode: str) -> None:
    net = network().float()
    fast = torch.compile(net, backend=backend, mode=mode)
    with torch.no_grad():
        for n in (2, 4, 5):
            x = images(n).float()
            torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)
