"""The record of a minimize run as JSON and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from srfx.files.values import Decoder, Encoder
from srfx.record.keep_plan import KeepPlan
from srfx.record.record import Record


def record_data(record: Record) -> dict[str, Any]:
    """Every field by its name; the plan in its own JSON form."""
    encode = Encoder("the record")
    data = {f.name: encode(getattr(record, f.name)) for f in dataclasses.fields(record) if f.name != "plan"}
    return {**data, "plan": json.loads(record.plan.to_json())}


def record_of_data(data: dict[str, Any], device: torch.device | None) -> Record:
    """The inverse of `record_data`.

    Raises:
        PlanError: the plan is of another version.
    """
    decode = Decoder("the record", device=device)
    plan = KeepPlan.from_json(json.dumps(data["plan"]))
    return Record(plan, **{name: decode(value) for name, value in data.items() if name != "plan"})
