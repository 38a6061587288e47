"""Cuts: where the stages of a layout begin and end, so that the slowest is fastest, within memory and marks."""

from __future__ import annotations

from bisect import bisect_left
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
    light = [[float(x) for x in loads.busy(degrees, row) @ row.counts] for row in rows]
    following = [*starts.searchsorted(np.arange(total)), len(starts)]
    places = [*map(int, starts), total]
    known: dict[tuple[int, int], tuple[int, Array]] = {}

    def begin(stage: int, least: int, stop: int, most: float) -> tuple[int, float] | None:
        """Where the longest stage begins that ends at ``stop`` and is no longer than ``most``, from ``least`` on; its
        busy seconds a microbatch, shared by the replicas. With a thousand layers few places come into question.
        """
        g = degrees.group_of(0 if v > 1 else stage)
        row, replicas, sums = rows[g], groups[g].replicas, light[g]
        first = max(least, int(floors[g][stop]), bisect_left(sums, sums[stop] - most * replicas * (1.0 + 1e-9)))
        if v > 1:
            for at in range(int(following[min(first, total)]), len(starts)):
                seconds = (sums[stop] - sums[places[at]]) / replicas
                if places[at] >= stop or seconds <= most:
                    return (places[at], seconds) if places[at] < stop else None
            return None
        at, busy = known.get((stage, stop), (total, None))
        if busy is None or at > first:
            counts = row.counts[:, stop : stop + 1] - row.counts[:, first:stop]
            fixed = row.fixed[:, stop : stop + 1] - row.fixed[:, first:stop]
            busy = loads.load(degrees, stage, row, counts, fixed, flights[stage]).busy / replicas
            at, known[stage, stop] = first, (first, busy)
        busy = busy[first - at :]
        fits = np.flatnonzero((busy <= most) & np.isfinite(busy) & marks.cuts[first:stop])
        return (first + int(fits[0]), float(busy[fits[0]])) if len(fits) else None

    work = [loads.least(degrees, g, row) for g, row in zip(groups, rows, strict=True)]
    low = 1.0 / sum(g.stages * g.replicas / w for g, w in zip(groups, work, strict=True)) / v
    if degrees.schedule == "zero_bubble":
        ceiling = best / max(ceil(m / g.replicas) * g.replicas for g in groups)
    else:
        rest = v * min((ceil(m / g.replicas) - 1) * g.replicas for g in groups)
        ceiling = (best - (min(work) if v == 1 else 0.0)) / rest if rest else best
    return _narrowed(lambda most: _cover(begin, starts, p * v, total, most), low, ceiling)


def _cover(
    begin: Callable[[int, int, int, float], tuple[int, float] | None],
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
        found = begin(stage, least, stop, most)
        if found is None or (stage == 0 and found[0] > least):
            return None
        stops.append(stop)
        stop, longest = found[0], max(longest, found[1])
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
