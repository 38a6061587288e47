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
    known: dict[tuple[int, int], Array] = {}

    def times(stage: int, stop: int) -> Array:
        """Busy seconds a microbatch, shared by the replicas, of a stage [i, stop) for every i < stop."""
        key = (0 if v > 1 else stage, stop)
        if key not in known:
            g = degrees.group_of(key[0])
            row = rows[g]
            counts = row.counts[:, stop : stop + 1] - row.counts[:, :stop]
            fixed = row.fixed[:, stop : stop + 1] - row.fixed[:, :stop]
            if v > 1:
                busy = loads.busy(degrees, row) @ counts
            else:
                busy = loads.load(degrees, stage, row, counts, fixed, flights[stage]).busy
            floor = floors[g][stop]
            busy = np.where(marks.cuts[:stop] & (np.arange(stop) >= floor), busy, np.inf)
            known[key] = busy / groups[g].replicas
        return known[key]

    work = [loads.least(degrees, g, row) for g, row in zip(groups, rows, strict=True)]
    low = 1.0 / sum(g.stages * g.replicas / w for g, w in zip(groups, work, strict=True)) / v
    if degrees.schedule == "zero_bubble":
        ceiling = best / max(ceil(m / g.replicas) * g.replicas for g in groups)
    else:
        rest = v * min((ceil(m / g.replicas) - 1) * g.replicas for g in groups)
        ceiling = (best - (min(work) if v == 1 else 0.0)) / rest if rest else best
    return _narrowed(lambda most: _cover(times, starts, p * v, total, most), low, ceiling)


def _cover(
    times: Callable[[int, int], Array], starts: NDArray[np.int64], stages: int, total: int, most: float
) -> tuple[list[int], float] | None:
    """Ends of stages no longer than ``most``, filled from the last to the first; the longest of them."""
    stops, stop, longest = [], total, 0.0
    for stage in range(stages - 1, -1, -1):
        least = int(starts[stage])  # as many stages must still find a place to begin before this one
        if stop <= least:
            return None
        here = times(stage, stop)[least:]
        ok = (here <= most) & np.isfinite(here)
        first = int(ok.argmax())
        if not ok[first] or (stage == 0 and first > 0):
            return None
        longest = max(longest, float(here[first]))
        stops.append(stop)
        stop = first + least
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
