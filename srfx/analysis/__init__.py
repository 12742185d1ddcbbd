"""Analyses: labels, constancy, liveness, classes.  They read a program and fill a FactTable; nothing is written."""

from srfx.analysis.solver import analyse

__all__ = ["analyse"]
