"""Beside: devices of one host share its memory and its power; what a device computes alone takes less time.

    cpu:0   F0 ████ F1 ████   B0 ██████        timings were taken with all devices at work; where the others wait,
    cpu:1        F0 ████ B0 ████    B1 ...     the same work takes ``alone`` of that

Which parts overlap follows from the times and the times from what overlaps: simulated, eased, simulated again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Spans = Mapping[tuple[str, int], tuple[float, float, float]]


def paces(spans: Spans) -> dict[tuple[str, int], float]:
    """(device, position in its list) -> share of its full seconds, from (start, end, alone) of all that computes.

    ``alone`` where no other device computes meanwhile, 1 where all others do all the time, linear between.
    """
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for (device, position), span in spans.items():
        lines.setdefault(device, []).append((position, *span))
    made = {device: np.array(sorted(rows)) for device, rows in lines.items()}
    busy: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # moments, seconds computed until then
    for device, rows in made.items():
        moments = rows[:, 1:3].reshape(-1)
        worked = np.repeat(np.cumsum(rows[:, 2] - rows[:, 1]), 2)
        worked[0::2] -= rows[:, 2] - rows[:, 1]
        busy[device] = moments, worked
    found: dict[tuple[str, int], float] = {}
    for device, rows in made.items():
        starts, ends, alone = rows[:, 1], rows[:, 2], rows[:, 3]
        beside = np.zeros(len(rows))
        for other, (moments, worked) in busy.items():
            if other != device:
                beside += np.interp(ends, moments, worked) - np.interp(starts, moments, worked)
        share = beside / np.maximum(ends - starts, 1e-30) / max(len(made) - 1, 1)
        pace = alone + (1.0 - alone) * np.clip(share, 0.0, 1.0)
        found.update({(device, int(position)): float(p) for position, p in zip(rows[:, 0], pace, strict=True)})
    return found
