"""What a pass will do, as data: edits, refusals, and the reasons a site was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why a channel or a site stayed as it was.  Every member has a test that produces it."""

    UNKNOWN_OP = "no rule for this op"
    OPAQUE_HOOK = "a forward hook may read or change anything"
    TRAINING_MODE = "batch statistics are used (training mode)"
    NON_FINITE = "the weight holds inf or nan"
    UNSUPPORTED_DTYPE = "complex, quantized, sparse or integer weight"
    SHARED_WEIGHT = "the parameter is used at several sites that disagree"
    UNTRACKED_AXIS = "tied to an axis whose channels are not followed"
    CHANNEL_MIXING = "the op mixes all channels of this axis"
    NOT_LINEAR_IN_NORM = "a reader of the norm's output is not linear in it"
    BORDER = "a nonzero constant meets zero padding"
    BLOCK_COUNT = "revived: blocks must keep equally many channels"
    MULTIPLE_OF = "revived: the count must be a multiple"
    LAST_CHANNEL = "revived: a tensor that is still needed keeps one channel"
    OUTPUT_LAYOUT = "the output's channels spread over several axes"
    GROWS = "folding would make the model larger"
    CONSTANT_TABLE = "a constant table stays whole, its readers pick from it"
    MUTATION = "an in-place write that is read under another name"
    DATA_DEPENDENT = "the size or index depends on data"
    OTHER_READERS = "the fused value is also read as a whole"
    COMPUTED_WEIGHT = "the weight is computed in the graph"
    MASKED = "a query may see no key: then the result is 0"
    UNRECOGNISED_CALL = "the arguments of the call are not known when the graph is read"


@dataclass(frozen=True)
class Refusal:
    """A site that looks like a match and is not taken.  ``node`` is the fx node's name."""

    node: str
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Edit:
    """One independent change; subclasses name what changes.  ``node`` is the fx node's name it belongs to."""

    node: str

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description: the edit's kind and its fields; tensors appear by shape only."""
        fields = {k: _plain(v) for k, v in vars(self).items()}
        return {"kind": type(self).__name__, **fields}


@dataclass
class Plan:
    """Edits and refusals of one pass, in node order."""

    edits: list[Edit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.edits)


def _plain(value: Any) -> Any:
    if hasattr(value, "shape") and hasattr(value, "tolist"):
        return value.tolist() if value.dtype.is_floating_point is False else {"shape": list(value.shape)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return repr(value)
