"""Minimized models in one file, and back: weights as safetensors, everything else as JSON, no pickle."""

from srfx.files.load import load
from srfx.files.save import save

__all__ = ["load", "save"]
