"""srfx: exact structural minimization of masked networks."""

from srfx.minimize import minimize

__all__ = ["minimize"]
