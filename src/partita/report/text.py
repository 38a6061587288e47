"""Text tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from partita.report.figures import compare
from partita.trace import Trace


def comparison_table(predicted: Trace | None, measured: Trace | None) -> Table:
    """Predicted beside measured: step time, busy and idle time and peak memory of each device."""
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for heading in ("predicted", "measured", "off by"):
        table.add_column(heading, justify="right")
    for row in compare(predicted, measured):
        table.add_row(row.name, row.show(row.predicted), row.show(row.measured), row.off)
    return table
