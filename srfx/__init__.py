"""srfx: exact structural minimization of masked networks."""

from srfx.apply import apply_
from srfx.cycle import (
    ChannelGroups,
    GroupPenalty,
    L1Penalty,
    SqueezeRelease,
    channel_groups,
    live_dropout,
    release,
)
from srfx.explain import Explanation, explain
from srfx.files import load, save
from srfx.minimize import default_passes, minimize
from srfx.passes import MachineCosts, machine_costs
from srfx.report import Report, plan, report
from srfx.verify import Verification, verify

__all__ = [
    "ChannelGroups",
    "Explanation",
    "GroupPenalty",
    "L1Penalty",
    "MachineCosts",
    "Report",
    "SqueezeRelease",
    "Verification",
    "apply_",
    "channel_groups",
    "default_passes",
    "explain",
    "live_dropout",
    "load",
    "machine_costs",
    "minimize",
    "plan",
    "release",
    "report",
    "save",
    "verify",
]
