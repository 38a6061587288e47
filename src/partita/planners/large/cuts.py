"""Cuts: where the stages of a layout begin and end, so that the slowest is fastest, within memory and marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from partita.planners.large.degrees import Degrees
from partita.planners.large.loads import Array, Loads, Row
from partita.planners.large.marks import Marks

TOLERANCE = 0.002


def balanced(
    loads: Loads, degrees: Degrees, rows: tuple[Row, ...], marks: Marks, best: float = np.inf
) -> list[int] | None:
    """Ends of the stages (of all chunks, in model order); None where none fits or none can beat ``best`` seconds."""
    m = loads.microbatches(degrees)
    p, v = degrees.stages, degrees.chunks
    total = len(rows[0].kinds)
    starts = marks.starts
    if p * v > len(starts):
        return None
    groups = degrees.groups
    flights = loads.flights(degrees, m)
    floors = [marks.floor_on(g.pool) for g in groups] if marks.places else [marks.floor] * len(groups)
    light = [loads.busy(degrees, row) @ row.counts for row in rows]

    def times(stage: int, least: int, stop: int, most: float) -> tuple[int, Array]:
        """Busy seconds a microbatch, shared by the replicas, of a stage [i, stop) for every i from the one that is
        returned, the first from ``least`` on that can be no longer than ``most``: with a thousand layers that are few.
        """
        g = degrees.group_of(0 if v > 1 else stage)
        row, replicas = rows[g], groups[g].replicas
        longest = most * replicas * (1.0 + 1e-9)
        first = max(least, floors[g][stop], int(np.searchsorted(light[g], light[g][stop] - longest)))
        if v > 1:
            busy = light[g][stop] - light[g][first:stop]
        else:
            counts = row.counts[:, stop : stop + 1] - row.counts[:, first:stop]
            fixed = row.fixed[:, stop : stop + 1] - row.fixed[:, first:stop]
            busy = loads.load(degrees, stage, row, counts, fixed, flights[stage]).busy
        return first, np.where(marks.cuts[first:stop], busy, np.inf) / replicas

    work = [loads.least(degrees, g, row) for g, row in zip(groups, rows, strict=True)]
    low = 1.0 / sum(g.stages * g.replicas / w for g, w in zip(groups, work, strict=True)) / v
    if degrees.schedule == "zero_bubble":
        ceiling = best / max(ceil(m / g.replicas) * g.replicas for g in groups)
    else:
        rest = v * min((ceil(m / g.replicas) - 1) * g.replicas for g in groups)
        ceiling = (best - (min(work) if v == 1 else 0.0)) / rest if rest else best
    return _narrowed(lambda most: _cover(times, starts, p * v, total, most), low, ceiling)


def _cover(
    times: Callable[[int, int, int, float], tuple[int, Array]],
    starts: NDArray[np.int64],
    stages: int,
    total: int,
    most: float,
) -> tuple[list[int], float] | None:
    """Ends of stages no longer than ``most``, filled from the last to the first; the longest of them."""
    stops, stop, longest = [], total, 0.0
    for stage in range(stages - 1, -1, -1):
        least = int(starts[stage])  # as many stages must still find a place to begin before this one
        if stop <= least:
            return None
        begin, here = times(stage, least, stop, most)
        ok = (here <= most) & np.isfinite(here)
        if not ok.any():
            return None
        first = int(ok.argmax())
        if stage == 0 and begin + first > least:
            return None
        longest = max(longest, float(here[first]))
        stops.append(stop)
        stop = begin + first
    return stops[::-1], longest


def _narrowed(cover: Callable[[float], tuple[list[int], float] | None], low: float, ceiling: float) -> list[int] | None:
    """The ends for the smallest longest stage between the bounds, to ``TOLERANCE``."""
    found = cover(ceiling) if ceiling >= low else None
    if found is None:
        return None
    for _ in range(12):
        high = found[1]
        if high - low < TOLERANCE * high:
            break
        middle = low + 0.5 * (high - low) if high < 4 * low else 2.0 * low
        tried = cover(middle)
        if tried is None:
            low = middle
        else:
            found = tried
    return found[0]


def spans_of(degrees: Degrees, stops: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Of each device in a row, the units [start, stop) of each of its chunks."""
    starts = [0, *stops[:-1]]
    p = degrees.stages
    return tuple(tuple((starts[s], stops[s]) for s in range(rank, p * degrees.chunks, p)) for rank in range(p))
