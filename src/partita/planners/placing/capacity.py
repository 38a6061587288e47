"""Capacity: how much work devices can do within a cap on the load, and so which ideals a placement can cut at.

Units are measured in the seconds that one kind takes for them. A device of another kind does at most the fractional
knapsack's worth of them within the cap (the best exchange rates first), so a side of a cut holds no more than its
devices can do; where they are all of that one kind, the cut must fit too, since a device of the side pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from partita.planners.placing.counting import counted
from partita.planners.placing.problem import Placement
from partita.planners.problem import Array

Bools = NDArray[np.bool_]
TOLERANCE = 1 + 1e-9


class Capacity:
    """Of the devices of ``problem``; asked with a cap in seconds."""

    def __init__(self, problem: Placement) -> None:
        self.problem = problem
        self.measures = [np.where(np.isfinite(kind.seconds), kind.seconds, 0.0) for kind in problem.kinds]
        self.curves = [[self._curve(kind.seconds, m) for kind in problem.kinds] for m in self.measures]

    @staticmethod
    def _curve(seconds: Array, measure: Array) -> tuple[float, Array, Array]:
        """(work that costs nothing, seconds, work done in them), best exchange rates first."""
        free = float(measure[seconds == 0].sum())
        able = np.isfinite(seconds) & (seconds > 0)
        spent, gained = seconds[able], measure[able]
        order = np.argsort(-gained / spent, kind="stable")
        return free, np.concatenate([[0.0], np.cumsum(spent[order])]), np.concatenate([[0.0], np.cumsum(gained[order])])

    def _most(self, measure: int, kind: int, cap: float) -> float:
        """The most work, in seconds of kind ``measure``, that one device of ``kind`` does within ``cap`` seconds."""
        if measure == kind:
            return cap
        free, spent, gained = self.curves[measure][kind]
        return free + float(np.interp(cap, spent, gained))

    def least(self) -> float:
        """A load that no placement is below: all work shared perfectly, the longest unit alone on its best device, and
        large units counted.
        """
        kinds = [kind for kind in self.problem.kinds if kind.count]
        if not kinds or not self.problem.num_units:
            return 0.0
        longest = float(np.min([kind.seconds for kind in kinds], axis=0).max())
        if not np.isfinite(longest):
            return longest
        low, high = longest, max(longest, min(float(m.sum()) for m in self.measures) * 2 + 1.0)
        while not self._enough(high):
            high *= 2.0
        if not self._enough(low):
            for _ in range(100):
                middle = 0.5 * (low + high)
                low, high = (low, middle) if self._enough(middle) else (middle, high)
        return counted(self.problem, low)

    def _enough(self, cap: float) -> bool:
        return all(
            sum(kind.count * self._most(m, k, cap) for k, kind in enumerate(self.problem.kinds)) * TOLERANCE
            >= self.measures[m].sum()
            for m, one in enumerate(self.problem.kinds)
            if one.count
        )

    def reach(self, cap: float) -> float:
        """The most work, in seconds of the first kind, between the two ends of a stage."""
        most = max(self._most(0, k, cap) for k, kind in enumerate(self.problem.kinds) if kind.count)
        return most * TOLERANCE + 1e-9 * float(self.measures[0].sum())

    def windows(
        self, states: Sequence[tuple[int, ...]], counts: Sequence[int], cap: float, work: Sequence[Array], cut: Array,
        nbytes: Array,
    ) -> Bools:  # fmt: skip
        """(states, ideals): whether an ideal can be what the devices of the state hold, and the others the rest.

        ``work`` (per kind), ``cut``, ``nbytes``: of each ideal; the last is the whole.
        """
        holds = np.stack([self._holds(state, cap, work, cut, nbytes) for state in states])
        rest = [tuple(c - u for c, u in zip(counts, state, strict=True)) for state in states]
        left_work, left_bytes = [w[-1] - w for w in work], nbytes[-1] - nbytes
        result: Bools = holds & np.stack([self._holds(state, cap, left_work, cut, left_bytes) for state in rest])
        return result

    def _holds(self, used: tuple[int, ...], cap: float, work: Sequence[Array], cut: Array, nbytes: Array) -> Bools:
        kinds = self.problem.kinds
        room = sum(kind.memory_bytes * u for kind, u in zip(kinds, used, strict=True) if u)
        ok: Bools = nbytes <= room * TOLERANCE
        for m, done in enumerate(work):
            most = sum(u * self._most(m, k, cap) for k, u in enumerate(used) if u)
            alone = all(u == 0 for k, u in enumerate(used) if k != m)
            need = done + kinds[m].transfer * cut if alone else done
            ok &= need <= most * TOLERANCE + 1e-9 * float(done.max())
        return ok
