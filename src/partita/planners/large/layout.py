"""Layout: degrees of parallelism of a large model on a large cluster, with their best cuts, priced in closed form.

    stages x replicas x tensor degree x ZeRO level x recomputation x microbatches x schedule and interleaving

Step time is ``cost.pipeline``'s; memory is counted for the fullest device of every stage (``loads``).
"""

from __future__ import annotations

from math import ceil

import numpy as np

from partita.cost.pipeline import StageTime, step_seconds
from partita.cost.roofline import Assumptions
from partita.planners.large.bounds import plain, shared, single
from partita.planners.large.cuts import balanced, spans_of
from partita.planners.large.degrees import Degrees, Layout, StageLayout
from partita.planners.large.exchange import send_seconds, tail_seconds
from partita.planners.large.loads import Loads, Row
from partita.planners.large.marks import Marks
from partita.planners.large.prices import Pool


class Pricer:
    """Finds the cuts of a layout and prices it."""

    def __init__(
        self,
        pools: tuple[Pool, ...],
        batch: int,
        assume: Assumptions,
        *,
        optimizer: str,
        headroom: float,
        train: bool = True,
        ties: tuple[tuple[int, int, float], ...] = (),
        marks: Marks | None = None,
        microbatches: int = 0,
    ) -> None:
        self.pools, self.assume, self.train, self.ties = pools, assume, train, ties
        self.marks = marks
        self.loads = Loads(
            pools, batch, assume, optimizer=optimizer, headroom=headroom, train=train, microbatches=microbatches
        )

    def quick(self, degrees: Degrees, rows: tuple[Row, ...]) -> float:
        """No step of these degrees is shorter: all stages equally long, nothing recomputed that need not be."""
        return plain(self.loads, degrees, rows)

    def bound(self, degrees: Degrees, rows: tuple[Row, ...]) -> float:
        """The same with memory counted: infinite where it forbids all cuts. One stage: its price."""
        if degrees.stages == degrees.chunks == 1:
            alone = self.priced(degrees, rows, [len(rows[0].kinds)])
            return alone.seconds if alone is not None else np.inf
        return shared(self.loads, degrees, rows) if len(rows) > 1 else single(self.loads, degrees, rows[0])

    def price(self, degrees: Degrees, rows: tuple[Row, ...], best: float = np.inf) -> Layout | None:
        """The layout with the cuts that make its slowest stage fastest; None where none fits or none beats ``best``."""
        marks = self.marks or Marks.none(len(rows[0].kinds))
        here = marks.over(degrees, self.pools)
        stops = balanced(self.loads, degrees, rows, here, best) if here is not None else None
        return None if stops is None else self.priced(degrees, rows, stops)

    def priced(self, degrees: Degrees, rows: tuple[Row, ...], stops: list[int]) -> Layout | None:
        """With these ends of its stages; None where one does not fit."""
        m = self.loads.microbatches(degrees)
        p, v = degrees.stages, degrees.chunks
        made: list[StageLayout] = []
        exchanged = gathered = 0.0
        flights = self.loads.flights(degrees, m)
        for rank, spans in enumerate(spans_of(degrees, stops)):
            g = degrees.group_of(rank)
            group, row = degrees.groups[g], rows[g]
            pool = self.pools[group.pool]
            counts = np.sum([row.counts[:, b : b + 1] - row.counts[:, a : a + 1] for a, b in spans], axis=0)
            fixed = np.sum([row.fixed[:, b : b + 1] - row.fixed[:, a : a + 1] for a, b in spans], axis=0)
            load = self.loads.load(degrees, rank, row, counts, fixed, float(flights[rank]))
            if not np.isfinite(load.backward[0]):
                return None
            weights, trained = float(row.weights @ counts[:, 0]), float(row.trained @ counts[:, 0])
            for i, j, elements in self.ties:
                if any(a <= i < b for a, b in spans) and any(a <= j < b for a, b in spans):
                    weights, trained = weights - elements / group.degree, trained - elements / group.degree
            entering = float(row.sent[row.kinds[spans[0][0] - 1]]) if spans[0][0] else 0.0
            tail = 0.0
            if self.train:
                tail = tail_seconds(pool, group, weights, trained, self.loads.state, degrees.zero, self.assume)
            transfer = v * send_seconds(pool, group, entering, degrees.sequence)
            mine = ceil(m / group.replicas)
            exchanged += float(row.exchanged @ counts[:, 0]) * mine / p
            plain = row.forward @ counts + row.relief @ load.again + (row.backward @ counts if self.train else 0.0)
            gathered += max(float((load.busy - plain)[0]), 0.0) * mine / p
            made.append(
                StageLayout(
                    g, spans, tuple(int(x) for x in load.again[:, 0]), float(load.forward[0]), float(load.backward[0]),
                    float(load.memory[0]) + self.assume.reserve_bytes, tail, transfer, float(load.late[0]),
                )
            )  # fmt: skip
        return self._summed(degrees, tuple(made), m, exchanged, gathered)

    def times(self, degrees: Degrees, stages: tuple[StageLayout, ...], m: int) -> tuple[StageTime, ...]:
        """Each stage as the closed forms of ``cost.pipeline`` want it."""
        split = degrees.schedule == "zero_bubble"
        return tuple(
            StageTime(
                s.forward, s.backward - s.late * split, s.late * split, ceil(m / degrees.groups[s.group].replicas),
                s.transfer, 0.0, s.tail,
            )
            for s in stages
        )  # fmt: skip

    def _summed(
        self, degrees: Degrees, stages: tuple[StageLayout, ...], m: int, exchanged: float, gathered: float = 0.0
    ) -> Layout:
        times = self.times(degrees, stages, m)
        mine = max(t.microbatches for t in times)
        if degrees.chunks > 1:
            p = len(stages)
            busy = [t.forward + t.backward + 2.0 * t.transfer for t in times]
            seconds = mine * max(busy) + (p - 1) * sum(busy) / p / degrees.chunks + max(s.tail for s in stages)
        else:
            seconds = step_seconds(degrees.schedule, times, train=self.train)
        return Layout(degrees, stages, m, seconds, parts(degrees, stages, m, seconds, exchanged, gathered), seconds)


def parts(
    degrees: Degrees, stages: tuple[StageLayout, ...], m: int, seconds: float, exchanged: float, gathered: float
) -> tuple[tuple[str, float], ...]:
    """Where a step of so many seconds goes, seen from the slowest stage; 'bubble' is what is left."""
    mine = [ceil(m / degrees.groups[s.group].replicas) for s in stages]
    slowest = max((s.forward + s.backward) * n for s, n in zip(stages, mine, strict=True))
    sending = 2.0 * max(s.transfer for s in stages) * max(mine)
    tail = max(s.tail for s in stages)
    return (
        ("compute", slowest - exchanged - gathered),
        ("tensor exchange", exchanged),
        ("gathers not hidden", gathered),
        ("messages", sending),
        ("bubble", max(seconds - slowest - sending - tail, 0.0)),
        ("reduction and optimizer", tail),
    )
