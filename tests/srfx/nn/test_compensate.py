import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srfx.nn import (
    absorbed_columns,
    compensate_group_norm,
    compensate_layer_norm,
    compensate_rms_norm,
)


@pytest.mark.parametrize(
    ("norm", "compensate"),
    [
        (nn.LayerNorm(4), compensate_layer_norm),
        (nn.RMSNorm(4), compensate_rms_norm),
        (nn.GroupNorm(2, 4), compensate_group_norm),
    ],
)
class TestEveryNorm:
    def test_is_left_untouched_and_shares_nothing(self, norm: nn.Module, compensate: object) -> None:
        before = {name: value.clone() for name, value in norm.state_dict().items()}
        small = compensate(norm, [0, 1, 2], [1.0])
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.fill_(7.0)
        for name, value in norm.state_dict().items():
            assert torch.equal(value, before[name])

    def test_takes_a_mask(self, norm: nn.Module, compensate: object) -> None:
        by_index = compensate(norm, [0, 2], torch.tensor([1.0, 2.0]))
        by_mask = compensate(norm, torch.tensor([True, False, True, False]), [1.0, 2.0])
        assert repr(by_mask) == repr(by_index)

    def test_keeps_mode_dtype_and_requires_grad(self, norm: nn.Module, compensate: object) -> None:
        norm = type(norm)(*([2, 4] if isinstance(norm, nn.GroupNorm) else [4]), dtype=torch.float64).eval()
        norm.weight.requires_grad_(False)
        small = compensate(norm, [0, 1, 2], [1.0])
        assert not small.training
        assert small.weight.dtype == torch.float64
        assert not small.weight.requires_grad

    @pytest.mark.parametrize(
        ("keep", "constants", "message"),
        [
            ([0, 1], [1.0], "do not add up to 4"),
            ([1, 0, 2], [1.0], "increasing"),
            ([0, 1, 4], [1.0], "increasing indices below 4"),
            ([], [1.0] * 4, "increasing"),
            (torch.tensor([True, False]), [1.0], r"mask \[2\]"),
            ([0, 1, 2], [float("nan")], "finite"),
        ],
    )
    def test_refuses(
        self, norm: nn.Module, compensate: object, keep: object, constants: list[float], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            compensate(norm, keep, constants)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layer_norm_over_several_axes_loses_channels_on_one(axis: int) -> None:
    norm = nn.LayerNorm((3, 4, 5), dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x.select(axis + 1, 1).fill_(2.5)
    keep = [c for c in range(norm.normalized_shape[axis]) if c != 1]
    small = compensate_layer_norm(norm, keep, [2.5], axis=axis)
    index = torch.tensor(keep)
    truth = norm(x).index_select(axis + 1, index)
    torch.testing.assert_close(small(x.index_select(axis + 1, index)), truth, rtol=1e-10, atol=1e-10)
    small = compensate_layer_norm(norm, keep, [2.5], axis=axis - 3)
    torch.testing.assert_close(small(x.index_select(axis + 1, index)), truth, rtol=1e-10, atol=1e-10)


def test_emits_of_a_compensated_norm_stay_unless_said_otherwise() -> None:
    small = compensate_layer_norm(nn.LayerNorm(4), [0, 1, 2], [1.0], emits=("r",), emit_shift=1.0)
    again = compensate_layer_norm(small, [0, 1], [3.0])
    assert (again.emits, again.emit_shift) == (("r",), 1.0)
    assert compensate_layer_norm(small, [0, 1], [3.0], emits=()).emits == ()


def test_a_convolution_absorbs_columns_per_tap() -> None:
    """ConvNeXt's downsampling: norm over channels, then a 2 x 2 convolution with stride 2, no padding."""
    norm = nn.LayerNorm(6, dtype=torch.float64)
    conv = nn.Conv2d(6, 4, 2, stride=2, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    keep, gone = [0, 2, 3, 5], [1, 4]
    constants = torch.tensor([0.5, -2.0], dtype=torch.float64)
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    x[..., gone] = constants
    small = compensate_layer_norm(norm, keep, constants, emits=("r", "mu_r"))
    found = absorbed_columns(conv.weight[:, gone], constants, norm.weight[gone], norm.bias[gone])
    assert found.r.shape == found.mu_r.shape == (4, 1, 2, 2)
    kernel = torch.cat([conv.weight[:, keep], found.r, found.mu_r], dim=1)
    bias = conv.bias + found.bias.sum((1, 2))
    y = F.conv2d(small(x[..., keep]).permute(0, 3, 1, 2), kernel, bias, stride=2)
    torch.testing.assert_close(y, conv(norm(x).permute(0, 3, 1, 2)), rtol=1e-10, atol=1e-10)


def test_behind_padding_the_ones_channel_carries_beta() -> None:
    """Zero padding between norm and reader: beta is missing where the padding is, so it cannot be a bias."""
    norm = nn.LayerNorm(6, dtype=torch.float64)
    conv = nn.Conv1d(6, 4, 3, padding=1, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    keep, gone = [0, 2, 3, 5], [1, 4]
    constants = torch.tensor([0.5, -2.0], dtype=torch.float64)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    x[..., gone] = constants
    small = compensate_layer_norm(norm, keep, constants, emits=("r", "mu_r", "one"))
    found = absorbed_columns(conv.weight[:, gone], constants, norm.weight[gone], norm.bias[gone])
    kernel = torch.cat([conv.weight[:, keep], found.r, found.mu_r, found.bias.unsqueeze(1)], dim=1)
    y = F.conv1d(small(x[..., keep]).transpose(1, 2), kernel, conv.bias, padding=1)
    torch.testing.assert_close(y, conv(norm(x).transpose(1, 2)), rtol=1e-10, atol=1e-10)


def test_shift_keeps_half_precision_readers_accurate() -> None:
    """Far from 0, r (v - mu) cancels when made of r and mu r; of r and (mu - c) r it does not."""
    norm = nn.LayerNorm(64, dtype=torch.float64)
    reader = torch.randn(8, 64, dtype=torch.float64)
    x = 100.0 + torch.randn(50, 64, dtype=torch.float64)
    constants = 100.0 + torch.randn(24, dtype=torch.float64)
    x[:, 40:] = constants
    truth = norm(x) @ reader.T
    errors = {}
    for shift in (0.0, 100.0):
        keep, emits = list(range(40)), ("r", "mu_r")
        small = compensate_layer_norm(norm, keep, constants, emits=emits, emit_shift=shift)
        found = absorbed_columns(reader[:, 40:], constants, shift=shift)
        columns = torch.cat([reader[:, :40], found.r, found.mu_r], dim=1)
        y = small(x[:, :40]).bfloat16().double() @ columns.bfloat16().double().T
        errors[shift] = (y - truth).abs().max().item()
    rounded = norm(x).bfloat16().double() @ reader.bfloat16().double().T
    native = (rounded - truth).abs().max().item()
    assert errors[100.0] < 2 * native
    assert errors[0.0] > 10 * native


def test_equal_constants_need_one_channel_only() -> None:
    constants = torch.full((3,), 0.7)
    assert absorbed_columns(torch.randn(2, 3), constants, shift=float(constants[0])).r is None
    assert absorbed_columns(torch.randn(2, 3), torch.zeros(3)).r is None
    weight = torch.zeros(3)
    found = absorbed_columns(torch.randn(2, 3), constants, weight=weight)
    assert found.r is None
    assert found.mu_r is None


def test_kept_outputs_already_carry_the_mean() -> None:
    """docs/norms.md, lemma 4: (mu - m) r is a fixed combination of the kept outputs."""
    norm = nn.LayerNorm(6, dtype=torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    constants = torch.tensor([0.5, -2.0], dtype=torch.float64)
    mean = float(constants.mean())
    small = compensate_layer_norm(norm, [0, 1, 2, 3], constants, emits=("mu_r",), emit_shift=mean)
    out = small(torch.randn(5, 4, dtype=torch.float64))
    combination = ((out[:, :4] - small.bias) / small.weight).sum(-1) / small.removed.n_values
    torch.testing.assert_close(out[:, 4], combination, rtol=1e-12, atol=1e-12)
