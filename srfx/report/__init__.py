"""What became of a model, in numbers: as text, JSON and a simple HTML table."""

from srfx.report.build import LayerRow, Report, Totals, plan, report

__all__ = ["LayerRow", "Report", "Totals", "plan", "report"]
