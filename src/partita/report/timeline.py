"""A Trace drawn in text, time from left to right:

cpu:0  FFFFBB..BBWW   80 %
cpu:1  ..FFBBFFBBWW   90 %
       0        12 ms
"""

from __future__ import annotations

from partita.report.figures import devices_of
from partita.trace import Trace
from partita.units import format_seconds

RANK = {"F": 3, "B": 3, "W": 3, "REDUCE": 2}
MARK = {"F": "F", "B": "B", "W": "W", "REDUCE": "r"}


def timeline(trace: Trace, width: int = 72) -> str:
    """A line a device: F, B, W as they run, ``r`` reducing, ``.`` idle or waiting; then its busy share."""
    devices = devices_of(trace)
    if not trace.events:
        return "nothing was recorded"
    begin = min(e.start for e in trace.events)
    total = trace.step_seconds or 1.0
    label = max(len(d) for d in devices)
    lines = []
    for device in devices:
        cells = ["."] * width
        covered = [0.0] * width
        for event in trace.events:
            if event.device != device or event.kind not in RANK:
                continue
            left, right = ((t - begin) / total * width for t in (event.start, event.end))
            for column in range(int(left), min(width, int(right) + 1)):
                share = (min(right, column + 1) - max(left, column)) * RANK[event.kind]
                if share > covered[column]:
                    cells[column], covered[column] = MARK[event.kind], share
        busy = 1 - trace.bubble(device)
        lines.append(f"{device.ljust(label)}  {''.join(cells)}  {busy:4.0%}")
    end = format_seconds(trace.step_seconds)
    lines.append(f"{' ' * label}  0{end.rjust(width - 1)}")
    return "\n".join(lines)
