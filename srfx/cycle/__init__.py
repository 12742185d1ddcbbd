"""The Squeeze-Release cycle: train under a penalty, prune, minimize, release what zeros are left, again."""

from srfx.cycle.groups import ChannelGroups, GroupSlice, channel_groups
from srfx.cycle.history import PhaseRecord
from srfx.cycle.penalty import GroupPenalty, L1Penalty
from srfx.cycle.phase import Phase
from srfx.cycle.release import release
from srfx.cycle.squeeze_release import SqueezeRelease
from srfx.cycle.train_flags import live_dropout

__all__ = [
    "ChannelGroups",
    "GroupPenalty",
    "GroupSlice",
    "L1Penalty",
    "Phase",
    "PhaseRecord",
    "SqueezeRelease",
    "channel_groups",
    "live_dropout",
    "release",
]
