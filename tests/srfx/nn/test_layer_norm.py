import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from srfx.nn import CompensatedLayerNorm, RemovedConstants, absorbed_columns, compensate_layer_norm


def example(**options: object) -> CompensatedLayerNorm:
    torch.manual_seed(0)
    norm = CompensatedLayerNorm(6, RemovedConstants.from_values([1.1, -0.3]), **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


@st.composite
def removals(draw: st.DrawFn) -> tuple[int, list[int], Tensor, int]:
    """A width, the kept channels, the constants of the others, and a seed for everything continuous."""
    width = draw(st.integers(2, 12))
    keep = sorted(draw(st.sets(st.integers(0, width - 1), min_size=1)))
    n_removed = width - len(keep)
    constants = draw(st.lists(st.floats(-100, 100), min_size=n_removed, max_size=n_removed))
    return width, keep, torch.tensor(constants, dtype=torch.float64), draw(st.integers(0, 2**16))


def randomised(norm: nn.LayerNorm) -> nn.LayerNorm:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


def full_input(width: int, keep: list[int], constants: Tensor, n_positions: int = 5) -> Tensor:
    x = torch.randn(n_positions, width, dtype=torch.float64) * 3 + 1
    x[:, [c for c in range(width) if c not in keep]] = constants
    return x


@given(removals(), st.booleans(), st.booleans())
def test_kept_channels_are_those_of_the_native_layer(
    removal: tuple[int, list[int], Tensor, int], affine: bool, has_bias: bool
) -> None:
    width, keep, constants, seed = removal
    torch.manual_seed(seed)
    norm = randomised(nn.LayerNorm(width, elementwise_affine=affine, bias=has_bias, dtype=torch.float64))
    x = full_input(width, keep, constants)
    small = compensate_layer_norm(norm, keep, constants)
    torch.testing.assert_close(small(x[:, keep]), norm(x)[:, keep], rtol=1e-10, atol=1e-10)


@given(removals(), st.sampled_from(["zero", "mean", "own"]))
def test_a_linear_reader_absorbs_the_removed_channels(
    removal: tuple[int, list[int], Tensor, int], shift_kind: str
) -> None:
    width, keep, constants, seed = removal
    torch.manual_seed(seed)
    gone = [c for c in range(width) if c not in keep]
    norm = randomised(nn.LayerNorm(width, dtype=torch.float64))
    reader = nn.Linear(width, 3, dtype=torch.float64)
    x = full_input(width, keep, constants)
    mean = RemovedConstants.from_values(constants).mean
    shift = {"zero": 0.0, "mean": mean, "own": 0.7}[shift_kind]
    small = compensate_layer_norm(norm, keep, constants, emits=("r", "mu_r", "one"), emit_shift=shift)
    found = absorbed_columns(reader.weight[:, gone], constants, norm.weight[gone], norm.bias[gone], shift)
    extra = [torch.zeros(3, 1, dtype=torch.float64) if c is None else c for c in (found.r, found.mu_r)]
    ones = torch.zeros(3, 1, dtype=torch.float64) if found.bias is None else found.bias[:, None]
    columns = torch.cat([reader.weight[:, keep], *extra, ones], dim=1)
    y = small(x[:, keep]) @ columns.T + reader.bias
    torch.testing.assert_close(y, reader(norm(x)), rtol=1e-10, atol=1e-9)


@given(removals(), removals())
def test_compensations_compose(
    first: tuple[int, list[int], Tensor, int], second: tuple[int, list[int], Tensor, int]
) -> None:
    width, keep, constants, seed = first
    torch.manual_seed(seed)
    later = sorted({c % len(keep) for c in second[1]})
    more = torch.randn(len(keep) - len(later), dtype=torch.float64)
    norm = randomised(nn.LayerNorm(width, dtype=torch.float64))
    x = full_input(width, keep, constants)
    x[:, [c for i, c in enumerate(keep) if i not in later]] = more
    kept = [keep[i] for i in later]
    small = compensate_layer_norm(compensate_layer_norm(norm, keep, constants), later, more)
    assert (small.n_kept, small.n_total) == (len(kept), width)
    torch.testing.assert_close(small(x[:, kept]), norm(x)[:, kept], rtol=1e-10, atol=1e-10)


def test_repr_says_what_was_compensated() -> None:
    norm = example(emits=("mu_r", "r"), emit_shift=0.5, bias=False)
    assert repr(norm) == (
        "CompensatedLayerNorm(6 of 8, removed sum=0.8, sum of squares=1.3, eps=1e-05, "
        "emits=('r', 'mu_r'), emit_shift=0.5, bias=False)"
    )
    assert "elementwise_affine=False" in repr(example(elementwise_affine=False))
    assert "[6, 2] of 13" in repr(CompensatedLayerNorm((6, 2), RemovedConstants.from_values([1.0])))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one channel"):
        CompensatedLayerNorm(0, RemovedConstants.from_values([1.0]))
    with pytest.raises(ValueError, match="one normalised axis"):
        CompensatedLayerNorm((2, 3), RemovedConstants(), emits=("r",))
    with pytest.raises(ValueError, match=r"must end in normalized_shape \[6\]"):
        example()(torch.zeros(2, 5))


class TestState:
    def test_state_dict_round_trip_carries_the_constants(self) -> None:
        norm = example(emits=("mu_r",), emit_shift=0.1)
        blank = CompensatedLayerNorm(6, RemovedConstants.from_values([0.0, 0.0]), emits=("mu_r",))
        stream = io.BytesIO()
        torch.save(norm.state_dict(), stream)
        stream.seek(0)
        blank.load_state_dict(torch.load(stream, weights_only=True))
        x = torch.randn(3, 6)
        assert blank.removed == norm.removed
        assert torch.equal(blank(x), norm(x))

    def test_a_cast_state_dict_keeps_the_constants_exact(self) -> None:
        norm = example()
        cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in norm.state_dict().items()}
        other = CompensatedLayerNorm(6, RemovedConstants.from_values([0.0, 0.0]), dtype=torch.bfloat16)
        other.load_state_dict(cast)
        assert other.removed == norm.removed

    def test_an_averaged_state_dict_is_refused(self) -> None:
        averaged = {k: (v + v) / 2 for k, v in example().state_dict().items()}
        with pytest.raises(ValueError, match="was the state dict averaged"):
            example().load_state_dict(averaged)

    def test_another_number_of_removed_channels_is_refused(self) -> None:
        other = CompensatedLayerNorm(6, RemovedConstants.from_values([1.0]))
        with pytest.raises(ValueError, match="2 removed channels"):
            other.load_state_dict(example().state_dict())

    def test_safetensors(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        norm = example()
        safetensors.save_model(norm, str(tmp_path / "norm.safetensors"))
        blank = CompensatedLayerNorm(6, RemovedConstants.from_values([0.0, 0.0]))
        safetensors.load_model(blank, str(tmp_path / "norm.safetensors"))
        assert blank.removed == norm.removed
        assert torch.equal(blank.weight, norm.weight)

    def test_deepcopy_and_pickle(self) -> None:
        norm = example(emits=("r",))
        x = torch.randn(3, 6)
        for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert repr(other) == repr(norm)
            assert torch.equal(other(x), norm(x))

    def test_moves(self) -> None:
        norm = example(emits=("r",))
        assert norm.to("meta")(torch.empty(2, 6, device="meta")).shape == (2, 7)
        cast = example().to(torch.bfloat16)
        assert cast.removed == example().removed
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            out = example(emits=("r",)).to(dtype)(torch.randn(2, 6, dtype=dtype))
            assert out.dtype == dtype
        assert example()(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_it_trains(self) -> None:
        norm = example(emits=("r",))
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.01)
        x, target = torch.randn(32, 6), torch.randn(32, 7)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (norm(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


class TestCompilers:
    @pytest.mark.parametrize("emits", [(), ("r", "mu_r", "one")])
    def test_torch_compile_forward_and_backward(self, emits: tuple[str, ...]) -> None:
        norm = example(emits=emits)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 6, requires_grad=True)
        twin = x.detach().clone().requires_grad_(True)
        out, expected = compiled(x), norm(twin)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)

    def test_inductor(self) -> None:
        norm = example(emits=("r", "mu_r"))
        compiled = torch.compile(norm, fullgraph=True, dynamic=True)
        for n_positions in (4, 5):
            x = torch.randn(n_positions, 6)
            torch.testing.assert_close(compiled(x), norm(x))
            half = x.bfloat16()
            torch.testing.assert_close(compiled(half), norm(half), rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("is_dynamic", [True, False])
    def test_torch_export(self, strict: bool, is_dynamic: bool) -> None:
        norm = example(emits=("r", "mu_r"))
        shapes = ({0: torch.export.Dim("n", min=2, max=64)},) if is_dynamic else None
        program = torch.export.export(norm, (torch.randn(4, 6),), dynamic_shapes=shapes, strict=strict)
        x = torch.randn(9 if is_dynamic else 4, 6)
        torch.testing.assert_close(program.module()(x), norm(x))
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        torch.testing.assert_close(torch.export.load(stream).module()(x), norm(x))

    def test_an_exported_layer_still_trains(self) -> None:
        norm = example(emits=("r",))
        module = torch.export.export(norm, (torch.randn(4, 6),)).module()
        x = torch.randn(4, 6, requires_grad=True)
        twin = x.detach().clone().requires_grad_(True)
        module(x).square().sum().backward()
        norm(twin).square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)

    def test_jit_trace(self) -> None:
        norm = example(emits=("r",))
        traced = torch.jit.trace(norm, (torch.randn(4, 6),))
        x = torch.randn(7, 6)
        torch.testing.assert_close(traced(x), norm(x))

    def test_onnx(self, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        norm = example(emits=("r", "mu_r"))
        x = torch.randn(4, 6)
        path = tmp_path / "norm.onnx"
        shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
        torch.onnx.export(norm, (x,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        x = torch.randn(9, 6)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), norm(x).detach(), rtol=1e-5, atol=1e-5)
