import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from srfx.nn import CompensatedGroupNorm, RemovedConstants, compensate_group_norm


@st.composite
def removals(draw: st.DrawFn) -> tuple[int, int, list[int], Tensor, tuple[int, ...], int]:
    n_groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    width = n_groups * size
    keep = sorted(draw(st.sets(st.integers(0, width - 1), min_size=1)))
    n_removed = width - len(keep)
    constants = draw(st.lists(st.floats(-50, 50), min_size=n_removed, max_size=n_removed))
    space = draw(st.sampled_from([(), (3,), (2, 3), (2, 2, 2)]))
    seed = draw(st.integers(0, 2**16))
    return n_groups, width, keep, torch.tensor(constants, dtype=torch.float64), space, seed


def full_input(width: int, keep: list[int], constants: Tensor, space: tuple[int, ...]) -> Tensor:
    x = torch.randn(2, width, *space, dtype=torch.float64)
    gone = [c for c in range(width) if c not in keep]
    x[:, gone] = constants.view(-1, *[1] * len(space)).expand(-1, *space)
    return x


def randomised(norm: nn.GroupNorm) -> nn.GroupNorm:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def example() -> CompensatedGroupNorm:
    """Three groups of three: one kept two, one kept all, one kept none."""
    torch.manual_seed(0)
    norm = randomised(nn.GroupNorm(3, 9))
    return compensate_group_norm(norm, [0, 2, 3, 4, 5], [1.5, -1.0, 2.0, 3.0])


@given(removals(), st.booleans())
def test_kept_channels_are_those_of_the_native_layer(
    removal: tuple[int, int, list[int], Tensor, tuple[int, ...], int], affine: bool
) -> None:
    n_groups, width, keep, constants, space, seed = removal
    torch.manual_seed(seed)
    norm = randomised(nn.GroupNorm(n_groups, width, affine=affine, dtype=torch.float64))
    x = full_input(width, keep, constants, space)
    if x[0, 0].numel() * width // n_groups == 1:
        return  # the native layer refuses a group of one value in training
    small = compensate_group_norm(norm, keep, constants)
    torch.testing.assert_close(small(x[:, keep]), norm(x)[:, keep], rtol=1e-10, atol=1e-10)


@given(removals(), st.sets(st.integers(0, 19), min_size=1))
def test_compensations_compose(
    removal: tuple[int, int, list[int], Tensor, tuple[int, ...], int], chosen: set[int]
) -> None:
    n_groups, width, keep, constants, _, seed = removal
    torch.manual_seed(seed)
    later = sorted({c % len(keep) for c in chosen})
    more = torch.randn(len(keep) - len(later), dtype=torch.float64)
    norm = randomised(nn.GroupNorm(n_groups, width, dtype=torch.float64))
    x = full_input(width, keep, constants, (3,))
    x[:, [c for i, c in enumerate(keep) if i not in later]] = more[:, None].expand(-1, 3)
    kept = [keep[i] for i in later]
    small = compensate_group_norm(compensate_group_norm(norm, keep, constants), later, more)
    assert (small.n_kept, small.n_total) == (len(kept), width)
    torch.testing.assert_close(small(x[:, kept]), norm(x)[:, kept], rtol=1e-10, atol=1e-10)


def test_channels_in_any_order() -> None:
    gone = [RemovedConstants.from_values([0.5]), RemovedConstants()]
    x = torch.randn(2, 3, 4)
    in_order = CompensatedGroupNorm([0, 1, 1], gone)(x)
    order = [2, 0, 1]
    shuffled = CompensatedGroupNorm([1, 0, 1], gone)(x[:, order])
    torch.testing.assert_close(shuffled, in_order[:, order])


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_the_native_layer(dtype: torch.dtype, offset: float) -> None:
    x = (offset + torch.randn(4, 24, 6, 6)).to(dtype)
    values = (offset + torch.randn(8, dtype=torch.float64)).to(dtype)
    full = torch.cat([x, values[None, :, None, None].expand(4, 8, 6, 6)], dim=1)
    keep = list(range(24))
    truth = F.group_norm(full.double(), 4)[:, keep]
    native = (F.group_norm(full, 4)[:, keep].double() - truth).abs()
    ours = (compensate_group_norm(nn.GroupNorm(4, 32), keep, values)(x).double() - truth).abs()
    floor = torch.finfo(dtype).eps * float(truth.abs().max())
    assert ours.max() <= 1.5 * native.max() + 0.5 * floor
    assert ours.mean() <= 1.5 * native.mean()


def test_gradients() -> None:
    norm = example().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_state_copies_moves_and_repr(tmp_path: Path) -> None:
    norm = example()
    assert repr(norm) == (
        "CompensatedGroupNorm(5 of 9, 3 groups keeping 0 to 3 of 3, removed sum=5.5, eps=1e-05)"
    )
    x = torch.randn(2, 5, 3)
    blank = CompensatedGroupNorm(
        norm.group_index, [RemovedConstants(gone.n_values) for gone in norm.removed], affine=True
    )
    torch.save(norm.state_dict(), tmp_path / "state")
    blank.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for other in (blank, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), norm(x))
    half = example().to(torch.bfloat16)
    assert half.removed == norm.removed
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert example().to("meta")(x.to("meta")).shape == x.shape
    other = CompensatedGroupNorm(
        [0, 1, 1, 1, 2], [RemovedConstants(2), RemovedConstants(), RemovedConstants(2)]
    )
    with pytest.raises(ValueError, match=r"removes \[1, 0, 3\] channels"):
        other.load_state_dict(norm.state_dict())


def test_compile() -> None:
    norm = example()
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    norm = example()
    x = torch.randn(9, 5, 3)
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(norm, (torch.randn(4, 5, 3),), dynamic_shapes=shapes, strict=strict)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.export.load(stream).module()(x), norm(x))


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    norm = example().eval()
    x = torch.randn(2, 5, 3)
    torch.onnx.export(norm, (x,), str(tmp_path / "norm.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "norm.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), norm(x).detach(), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    none = RemovedConstants()
    with pytest.raises(ValueError, match="entries 0 to 1"):
        CompensatedGroupNorm([0, 2], [none, none])
    with pytest.raises(ValueError, match="entries 0 to 0"):
        CompensatedGroupNorm([], [none])
    with pytest.raises(ValueError, match=r"one original size, got \[1, 2\]"):
        CompensatedGroupNorm([0, 1, 1], [none, none])
