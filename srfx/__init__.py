"""srfx: exact structural minimization of masked networks."""

from srfx.minimize import minimize
from srfx.report import Report, plan, report
from srfx.verify import Verification, verify

__all__ = ["Report", "Verification", "minimize", "plan", "report", "verify"]
