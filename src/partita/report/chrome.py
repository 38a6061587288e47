"""Traces in Chrome's JSON format, one process row each: opens in https://ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
import os

from partita.strict_yaml import write_text
from partita.trace import Trace


def chrome_trace(*traces: Trace) -> dict[str, object]:
    """One JSON object that holds all the traces, predicted above measured where given in that order."""
    rows: list[object] = []
    for pid, trace in enumerate(traces):
        rows.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": trace.origin}})
        single = trace.to_chrome()["traceEvents"]
        assert isinstance(single, list)
        rows += [{**row, "pid": pid} for row in single]
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"origin": ", ".join(t.origin for t in traces)}}


def write_chrome(path: str | os.PathLike[str], *traces: Trace) -> None:
    """Write ``chrome_trace``; raises UsageError where that is not possible."""
    write_text(path, json.dumps(chrome_trace(*traces)), "trace")
