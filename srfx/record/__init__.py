"""What minimize did, kept with its result: the plan, numbers for the report, and how both survive copies."""

from srfx.record.attach import attach, record_of
from srfx.record.keep_plan import AxisCut, KeepPlan, RefusalNote, TensorPlan
from srfx.record.record import Record, TensorSpec

__all__ = [
    "AxisCut",
    "KeepPlan",
    "Record",
    "RefusalNote",
    "TensorPlan",
    "TensorSpec",
    "attach",
    "record_of",
]
