"""Subsets: the most valuable set of units that one device can run within a load, whatever the others do.

The pricing problem of a cover by sets: a knapsack whose weight is the units' seconds and the nets that the set cuts,
solved along a frontier. Of each state, the best value in each of some hundred steps of the load is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.planners.labelling.kernel import kernel
from partita.planners.placing.frontier import Frontier, Ints
from partita.planners.problem import Array

ROOM = 24_000_000  # buckets of all states, kept to trace a set back
WIDE = 2_000_000  # buckets of the widest step's states
STEP, EDGE = 1.05, 0.95
Flags = NDArray[np.bool_]
Backs = NDArray[np.int32]


@kernel
def _walk(
    first: Ints, onward: Ints, weight: Array, value: Array, free: Flags, cap: float, slope: float, below: bool,
    load: Array, best: Array, line: Array, back: Backs,
) -> int:  # fmt: skip
    """Fills load, best and line, (2, states, buckets), of the ends at the returned side. ``weight`` (states, 2).

    ``line``: the most that a value exceeds ``slope`` times its load. ``below``: of what meets in a bucket, the least
    load goes with the best value and the best line: none is missed, some are not there. Otherwise the best by the line
    stays as it is, and ``back`` (states, buckets) tells where it came from.
    """
    steps, buckets = len(first) - 2, load.shape[2]
    scale = (buckets - 1) / cap if cap > 0 else 0.0
    side = 0
    line[0, 0, :] = -np.inf
    line[0, 0, 0] = best[0, 0, 0] = load[0, 0, 0] = 0.0
    for step in range(steps):
        begin, end = first[step], first[step + 1]
        then = 1 - side
        for state in range(first[step + 2] - end):
            for b in range(buckets):
                line[then, state, b] = best[then, state, b] = -np.inf
                load[then, state, b] = np.inf
        for state in range(begin, end):
            here = state - begin
            top = high = -np.inf
            for b in range(buckets):
                if line[side, here, b] == -np.inf or (best[side, here, b] <= top and line[side, here, b] <= high):
                    continue
                top, high = max(top, best[side, here, b]), max(high, line[side, here, b])
                for with_ in range(2):
                    heavy = load[side, here, b] + weight[state, with_]
                    if heavy > cap or (with_ and not free[step]):
                        continue
                    gain = best[side, here, b] + value[step] * with_
                    over = line[side, here, b] + value[step] * with_ - slope * weight[state, with_]
                    to, at = onward[state, with_], min(int(heavy * scale), buckets - 1)
                    if below:
                        load[then, to, at] = min(load[then, to, at], heavy)
                        best[then, to, at] = max(best[then, to, at], gain)
                        line[then, to, at] = max(line[then, to, at], over)
                    elif over > line[then, to, at]:
                        load[then, to, at], best[then, to, at], line[then, to, at] = heavy, gain, over
                        back[end + to, at] = (here * buckets + b) * 2 + with_
        side = then
    return side


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """An upper bound on the value of a set by its load."""

    loads: Array
    values: Array
    lines: Array
    slope: float

    def at(self, load: float) -> float:
        """No set of at most this load is worth more."""
        last = int(np.searchsorted(self.loads, load, side="right")) - 1
        return min(float(self.values[last]), float(self.lines[last]) + self.slope * load)


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    value: float
    load: float
    units: Flags


@dataclass(slots=True, eq=False)
class Subsets:
    """Of a frontier, for devices of one kind. ``slope``: what a second of load is worth about the best sets."""

    line: Frontier
    weight: Array
    free: Flags
    seconds: float  # of all units that can run
    slope: float = 0.0
    steep: float = 1.0

    @classmethod
    def of(cls, line: Frontier, seconds: Array, transfer: float) -> Subsets:
        """``seconds`` (units): infinite where a unit cannot run."""
        ordered = seconds[line.order]
        able = np.isfinite(ordered)
        weight = transfer * line.cut
        weight[:, 1] += np.repeat(np.where(able, ordered, 0.0), np.diff(line.first)[: len(ordered)])
        return cls(line, weight, able, float(ordered[able].sum()) or 1.0)  # any slope bounds

    def _run(
        self, value: Array, cap: float, buckets: int, back: Backs | None, out: Flags | None
    ) -> tuple[Array, Array, Array]:
        load, best, over = np.empty((3, 2, self.line.widest, buckets))
        free = self.free if out is None else self.free & ~out[self.line.order]
        side = _walk(
            self.line.first, self.line.onward, self.weight, value[self.line.order], free, cap, self.slope, back is None,
            load, best, over, np.zeros((1, 1), dtype=np.int32) if back is None else back,
        )  # fmt: skip
        return load[side, 0], best[side, 0], over[side, 0]

    def curve(self, value: Array, cap: float, buckets: int) -> Curve:
        """Up to the load ``cap``; the slope is then moved towards where the curve would be lower."""
        self.slope = self.steep * float(np.maximum(value, 0.0).sum()) / self.seconds
        load, best, line = self._run(value, cap, max(8, min(buckets, WIDE // self.line.widest)), None, None)
        seen = np.isfinite(best)
        load, line = load[seen], line[seen]
        found = Curve(load, np.maximum.accumulate(best[seen]), np.maximum.accumulate(line), self.slope)
        self.steep *= STEP if load[int(line.argmax())] > EDGE * cap else 1 / STEP
        return found

    def best(self, value: Array, cap: float, buckets: int, out: Flags | None = None) -> Subset | None:
        """A set of great value, without the units ``out``; None where no set has any."""
        buckets = max(8, min(buckets, ROOM // int(self.line.first[-1]), WIDE // self.line.widest))
        back = np.empty((int(self.line.first[-1]), buckets), dtype=np.int32)
        load, best, _ = self._run(value, cap, buckets, back, out)
        at = int(best.argmax())
        return Subset(float(best[at]), float(load[at]), self._trace(back, at, buckets)) if best[at] > 0 else None

    def _trace(self, back: Backs, at: int, buckets: int) -> Flags:
        inside = np.zeros(len(self.line.order), dtype=np.bool_)
        first, state = self.line.first, 0
        for step in range(len(self.line.order) - 1, -1, -1):
            code = int(back[first[step + 1] + state, at])
            inside[self.line.order[step]] = code & 1
            state, at = divmod(code >> 1, buckets)
        return inside
