"""The Squeeze-Release cycle: train under a penalty, prune, minimize, release what zeros are left, again."""

from srfx.cycle.groups import ChannelGroups, GroupSlice, channel_groups
from srfx.cycle.penalty import GroupPenalty, L1Penalty
from srfx.cycle.release import release

__all__ = ["ChannelGroups", "GroupPenalty", "GroupSlice", "L1Penalty", "channel_groups", "release"]
