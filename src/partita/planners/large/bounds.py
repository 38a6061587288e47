"""Bounds: seconds no layout of given degrees can beat, whatever its cuts.

Of p stages let s take w_s seconds a microbatch with nothing recomputed, keep a_s bytes of each of f_s microbatches, and
hold h_s bytes for good; c seconds of forward are the least that frees a byte. With M bytes a device

    t >= w_s + c (h_s / f_s + a_s - M / f_s)+         for the slowest stage's t and every s.

Summed over the stages S that keep most, where no other stage has more than r t activations (r: most bytes a second):

    t (p + c r |not S|) >= sum w + c (sum a + (sum h - |not S| M)+ / max f - M sum_S 1 / f_s)

Nothing is recomputed under zero bubble, so there a shortage means that nothing fits.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from partita.planners.large.degrees import Degrees, Group
from partita.planners.large.loads import Array, Loads, Row


def plain(loads: Loads, degrees: Degrees, rows: tuple[Row, ...]) -> float:
    """Seconds of a step, were memory free; at once."""
    if len(degrees.groups) > 1:
        return mixed(loads, degrees, rows)
    work = loads.least(degrees, degrees.groups[0], rows[0])
    return stepped(loads, degrees, rows[0], work / degrees.stages, work)


def stepped(loads: Loads, degrees: Degrees, row: Row, slowest: float, every: float) -> float:
    """Seconds of a step whose slowest stage takes ``slowest`` a microbatch and all of them ``every``."""
    p, mine = degrees.stages, ceil(loads.microbatches(degrees) / degrees.groups[0].replicas)
    if degrees.chunks > 1:
        return mine * slowest + (p - 1) / degrees.chunks * every / p
    if degrees.schedule == "zero_bubble":
        fill = max(every - 2.0 * row.total.late, 0.0)
        return mine * every / p + fill * (p - 1) / p
    return every + (mine - 1) * slowest


def single(loads: Loads, degrees: Degrees, row: Row) -> float:
    """Of one group with several stages, memory counted; infinite where it forbids every cut."""
    group, p, total = degrees.groups[0], degrees.stages, row.total
    work = loads.least(degrees, group, row)
    if not loads.train or degrees.recompute == "all":
        return stepped(loads, degrees, row, work / p, work)
    room = loads.limit(loads.pools[group.pool])
    held = loads.state.held(total.weights, total.trained, group.replicas, degrees.zero)
    flights = np.sort(loads.flights(degrees, loads.microbatches(degrees)))[::-1]
    others = p - np.arange(1, p + 1)
    short = total.saved + np.maximum(held - others * room, 0.0) / flights[0] - room * np.cumsum(1.0 / flights)
    if total.price == np.inf or degrees.schedule == "zero_bubble":
        return np.inf if short[-1] > 0 else stepped(loads, degrees, row, work / p, work)
    fixed = total.fixed  # recomputed because a person said so: may free memory too
    least = float(np.max((work - fixed + total.price * short) / (p + total.price * total.rate * others)))
    every = max(work, work - fixed + total.price * float(short[-1]))
    return stepped(loads, degrees, row, max(least, work / p), every)


def mixed(loads: Loads, degrees: Degrees, rows: tuple[Row, ...]) -> float:
    """Of several groups: the model shared between them as suits them best, stages of a group equally long."""
    m = loads.microbatches(degrees)
    groups = degrees.groups
    work = [loads.least(degrees, g, row) for g, row in zip(groups, rows, strict=True)]
    rest = [ceil(m / g.replicas) - 1 for g in groups]
    pace = [r * w / g.stages for g, w, r in zip(groups, work, rest, strict=True)]  # seconds for the whole model
    if min(pace) <= 0:
        return min(work)
    level = 1.0 / sum(1.0 / x for x in pace)
    if len(groups) != 2:
        return min(work) + level

    def seconds(x: float) -> float:
        """With the share ``x`` on the first group."""
        return x * work[0] + (1.0 - x) * work[1] + max(x * pace[0], (1.0 - x) * pace[1])

    return min(seconds(x) for x in (0.0, level / pace[0], 1.0))


def shared(loads: Loads, degrees: Degrees, rows: tuple[Row, ...]) -> float:
    """Of two groups: the best of all units at which the second may begin, memory counted; more groups: ``mixed``."""
    if len(rows) != 2:
        return mixed(loads, degrees, rows)
    m = loads.microbatches(degrees)
    flights = loads.flights(degrees, m)
    first = degrees.groups[0].stages
    total = np.zeros(rows[0].counts.shape[1])
    paces: list[Array] = []
    for group, row, mine in zip(degrees.groups, rows, (flights[:first], flights[first:]), strict=True):
        counts = row.counts if not paces else row.all[:, None] - row.counts
        work, slowest = _of_columns(loads, degrees, group, row, counts, mine)
        units = counts.sum(axis=0)
        total = total + np.where(units >= group.stages, work, np.inf)
        paces.append((ceil(m / group.replicas) - 1) * np.minimum(slowest, 1e30))
    return float(np.min(total + np.maximum(*paces)))


def _of_columns(
    loads: Loads, degrees: Degrees, group: Group, row: Row, counts: Array, flights: Array
) -> tuple[Array, Array]:
    """For columns of unit counts: least seconds a microbatch in all of a group's stages, and in the slowest."""
    busy = loads.busy(degrees, row) @ counts
    if not loads.train:
        return busy, busy / group.stages
    held = (row.weights @ counts) * loads.state.held(1.0, 0.0, group.replicas, degrees.zero)
    held = held + (row.trained @ counts) * loads.state.held(0.0, 1.0, group.replicas, degrees.zero)
    room = loads.limit(loads.pools[group.pool])
    busy = np.where(held > group.stages * room, np.inf, busy)
    if degrees.recompute != "all" and row.total.price < np.inf:
        short = row.saved @ counts + held / flights.max() - room * float(np.sum(1.0 / flights))
        busy = busy + row.total.price * np.maximum(short, 0.0)
    return busy, busy / group.stages
