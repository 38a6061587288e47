"""Report: plans and traces for people: tables, a timeline, a Chrome trace, one HTML page. Needs no torch."""

from partita.report.chrome import chrome_trace, write_chrome
from partita.report.page import write_page
from partita.report.text import comparison_table
from partita.report.timeline import timeline

__all__ = ["chrome_trace", "comparison_table", "timeline", "write_chrome", "write_page"]
