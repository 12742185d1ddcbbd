"""Modules that appear in minimized networks: norms that keep the statistics of the channels they lost."""

from srfx.nn.attention import DropoutAttention
from srfx.nn.compensate import (
    AbsorbedColumns,
    absorbed_columns,
    compensate_group_norm,
    compensate_layer_norm,
    compensate_rms_norm,
)
from srfx.nn.group_norm import CompensatedGroupNorm
from srfx.nn.layer_norm import CompensatedLayerNorm
from srfx.nn.removed import RemovedConstants
from srfx.nn.rms_norm import CompensatedRMSNorm, rescale_rms_norm, resolved_rms_eps

__all__ = [
    "AbsorbedColumns",
    "CompensatedGroupNorm",
    "CompensatedLayerNorm",
    "CompensatedRMSNorm",
    "DropoutAttention",
    "RemovedConstants",
    "absorbed_columns",
    "compensate_group_norm",
    "compensate_layer_norm",
    "compensate_rms_norm",
    "rescale_rms_norm",
    "resolved_rms_eps",
]
