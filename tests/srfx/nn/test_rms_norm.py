import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from srfx.nn import (
    CompensatedRMSNorm,
    absorbed_columns,
    compensate_rms_norm,
    rescale_rms_norm,
    resolved_rms_eps,
)


@st.composite
def removals(draw: st.DrawFn) -> tuple[int, list[int], Tensor, int]:
    width = draw(st.integers(2, 12))
    keep = sorted(draw(st.sets(st.integers(0, width - 1), min_size=1)))
    n_removed = width - len(keep)
    constants = draw(
        st.one_of(
            st.just([0.0] * n_removed), st.lists(st.floats(-50, 50), min_size=n_removed, max_size=n_removed)
        )
    )
    return width, keep, torch.tensor(constants, dtype=torch.float64), draw(st.integers(0, 2**16))


def example(**options: object) -> CompensatedRMSNorm:
    torch.manual_seed(0)
    norm = CompensatedRMSNorm(4, 6, 2.1, **options)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    return norm


@given(removals(), st.booleans(), st.sampled_from([None, 1e-6, 0.1]))
def test_plain_norm_with_rescaled_weight_and_eps(
    removal: tuple[int, list[int], Tensor, int], affine: bool, eps: float | None
) -> None:
    width, keep, constants, seed = removal
    torch.manual_seed(seed)
    norm = nn.RMSNorm(width, eps=eps, elementwise_affine=affine, dtype=torch.float64)
    if affine:
        nn.init.normal_(norm.weight)
    x = torch.randn(5, width, dtype=torch.float64)
    x[:, [c for c in range(width) if c not in keep]] = constants
    small = compensate_rms_norm(norm, keep, constants, dtype=torch.float64)
    assert type(small) is nn.RMSNorm
    torch.testing.assert_close(small(x[:, keep]), norm(x)[:, keep], rtol=1e-10, atol=1e-10)


@given(removals(), st.booleans())
def test_a_linear_reader_absorbs_the_removed_channels(
    removal: tuple[int, list[int], Tensor, int], twice: bool
) -> None:
    width, keep, constants, seed = removal
    torch.manual_seed(seed)
    gone = [c for c in range(width) if c not in keep]
    norm = nn.RMSNorm(width, eps=1e-5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    reader = nn.Linear(width, 3, dtype=torch.float64)
    x = torch.randn(5, width, dtype=torch.float64)
    x[:, gone] = constants
    small: nn.Module = norm
    if twice and gone:
        first = gone[0]
        small = compensate_rms_norm(
            norm, [c for c in range(width) if c != first], constants[:1], emits=("r",)
        )
        keep_now = [c - (c > first) for c in keep]
        small = compensate_rms_norm(small, keep_now, constants[1:])
    else:
        small = compensate_rms_norm(norm, keep, constants, emits=("r",))
    found = absorbed_columns(reader.weight[:, gone], constants, norm.weight[gone], shift=None)
    assert found.mu_r is None
    assert found.bias is None
    r = torch.zeros(3, 1, dtype=torch.float64) if found.r is None else found.r
    y = small(x[:, keep]) @ torch.cat([reader.weight[:, keep], r], dim=1).T + reader.bias
    torch.testing.assert_close(y, reader(norm(x)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_eps_none_is_what_the_native_layer_takes(dtype: torch.dtype) -> None:
    x = torch.full((1, 4), 1e-4, dtype=dtype)
    eps = resolved_rms_eps(None, dtype)
    torch.testing.assert_close(F.rms_norm(x, (4,)), F.rms_norm(x, (4,), eps=eps))
    full = torch.cat([x, torch.zeros(1, 2, dtype=dtype)], dim=-1)
    small = CompensatedRMSNorm(4, 6, elementwise_affine=False)(x)
    torch.testing.assert_close(small[:, :4], F.rms_norm(full, (6,))[:, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_the_native_layer(dtype: torch.dtype) -> None:
    x = (torch.randn(200, 48) * 3).to(dtype)
    values = torch.full((16,), 2.5, dtype=dtype)
    weight = torch.randn(64).to(dtype)
    full = torch.cat([x, values.expand(200, -1)], dim=-1)
    truth = F.rms_norm(full.double(), (64,), weight.double(), 1e-5)[:, :48]
    native = (F.rms_norm(full, (64,), weight, 1e-5)[:, :48].double() - truth).abs()
    norm = nn.RMSNorm(64, eps=1e-5, dtype=dtype)
    norm.weight = nn.Parameter(weight)
    for emits in ((), ("r",)):
        small = compensate_rms_norm(norm, list(range(48)), values, emits=emits)
        ours = (small(x)[:, :48].double() - truth).abs()
        # The rescaled weight is rounded once more in its own dtype.
        assert ours.max() <= 2.5 * native.max()
        assert ours.mean() <= 2 * native.mean()


def test_a_rescaled_weight_that_was_not_there_is_frozen() -> None:
    norm = nn.RMSNorm(4, elementwise_affine=False).eval()
    small = compensate_rms_norm(norm, [0, 1], [0.0, 0.0])
    assert not small.training
    assert not small.weight.requires_grad
    assert compensate_rms_norm(nn.RMSNorm(4), [0, 1], [0.0, 0.0]).weight.requires_grad


@pytest.mark.parametrize("emits", [("r",), ("r", "one"), ()])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients(emits: tuple[str, ...], affine: bool) -> None:
    norm = example(emits=emits, elementwise_affine=affine, eps=1e-5).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_state_copies_and_repr() -> None:
    norm = example(emits=("r",))
    assert repr(norm) == "CompensatedRMSNorm(4 of 6, removed sum of squares=2.1, eps=None, emits=('r',))"
    blank = CompensatedRMSNorm(4, 6)
    blank.load_state_dict(norm.state_dict())
    x = torch.randn(3, 4)
    for other in (blank, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), norm(x))
    with pytest.raises(ValueError, match="6 channels in all"):
        CompensatedRMSNorm(4, 7).load_state_dict(norm.state_dict())


def test_compile_and_export() -> None:
    norm = example(emits=("r",))
    x = torch.randn(9, 4)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(norm, (torch.randn(4, 4),), dynamic_shapes=shapes)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.export.load(stream).module()(x), norm(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="1 to n_total"):
        CompensatedRMSNorm(4, 3)
    with pytest.raises(ValueError, match="sum of squares"):
        CompensatedRMSNorm(4, 6, -1.0)
    with pytest.raises(ValueError, match="no mean"):
        CompensatedRMSNorm(4, 6, emits=("mu_r",))
    with pytest.raises(ValueError, match="do not fit"):
        rescale_rms_norm(torch.ones(3), 1e-5, 2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        rescale_rms_norm(None, 1e-5, 5, 4)
    with pytest.raises(ValueError, match="one axis"):
        compensate_rms_norm(nn.RMSNorm((2, 4)), [0], [1.0])
