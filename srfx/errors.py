"""Errors a user can meet.  Each message says what was found, where (node name), and what to do about it."""

from __future__ import annotations

OP_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What torch raises when it is given something that it cannot take (a ``TraceError`` is a ``ValueError``)."""

RUN_FAILURES = (*OP_FAILURES, AssertionError)
"""What a model may raise on inputs that it is not made for."""


class SrfxError(Exception):
    """Base of all errors that srfx raises on purpose; the input model is never changed when one is raised."""


class CaptureError(SrfxError):
    """The model could not be turned into a graph that srfx reads (not traceable, lint fails, meta tensors)."""


class MissingShapesError(CaptureError):
    """No shape metadata, no example inputs, and no common input shape fits: pass ``example_inputs``."""


class UnsupportedModelError(SrfxError):
    """The model holds something that no rewrite can be exact for (lazy, quantized or sparse parameters)."""


class VerificationError(SrfxError):
    """The rewritten model does not compute what the original computes."""


class ShapeMismatchError(SrfxError):
    """Two tensors that belong together disagree in shape."""


class UnknownChannelError(SrfxError):
    """A node or channel was named that the plan does not know."""


class PlanError(SrfxError):
    """A plan does not fit the model it is applied to, or a plan file is damaged or of another version."""


class CycleError(SrfxError):
    """A step of the Squeeze-Release cycle cannot be taken as asked for."""


class FileError(SrfxError):
    """A file that cannot be read: it is none of ``srfx.save``, or does not belong to what it is loaded with."""


class DamagedFileError(FileError):
    """A file that was cut short or changed after it was written."""


class NewerFileError(FileError):
    """A file that a newer srfx wrote in a form that this one does not know."""


class MissingArchitectureError(FileError):
    """A file that needs code of the original model: pass ``model`` to ``srfx.load``."""


class UnsavableError(SrfxError):
    """The model holds something that has no place in a file of ``srfx.save``."""


class ApplyError(SrfxError):
    """A module cannot follow what minimize made of it; it was left as it was."""
