"""Marks: what a person fixed, laid on a row of units: where stages may and must begin, what is recomputed or placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.planners.large.degrees import Degrees
from partita.planners.large.prices import Pool


@dataclass(frozen=True, slots=True)
class Placed:
    """Units [first, last] run on the pool; ``index``: on the stage that has this device of it (-1: on any)."""

    first: int
    last: int
    pool: int
    index: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """``cuts[i]``: a stage may begin at unit ``i``. ``floor[stop]``: the first unit at which a stage that ends there
    may begin. ``again[u]``: the unit is recomputed, or where ``away[u]`` offloaded, whatever the memory.
    """

    cuts: NDArray[np.bool_]
    floor: NDArray[np.int64]
    again: NDArray[np.bool_]
    away: NDArray[np.bool_]
    places: tuple[Placed, ...] = ()

    @staticmethod
    def none(units: int) -> Marks:
        """Nothing is fixed."""
        again, away = (np.zeros(units, dtype=bool) for _ in range(2))
        return Marks(np.ones(units, dtype=bool), np.zeros(units + 1, dtype=np.int64), again, away)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Units at which a stage may begin, in order; the first is 0."""
        return np.flatnonzero(self.cuts)

    def over(self, degrees: Degrees, pools: tuple[Pool, ...]) -> Marks | None:
        """With the cuts that places ask for under these degrees; None where they cannot be met.

        Devices of a pool are taken block by block, one block a stage; blocks of a pool may change their stages.
        """
        if not self.places:
            return self
        cuts, floor = self.cuts.copy(), self.floor.copy()
        blocks: list[tuple[Placed, int]] = []
        for place in self.places:
            group = next((g for g in degrees.groups if g.pool == place.pool), None)
            if group is None:
                return None
            block = place.index // (group.replicas * group.degree) if place.index >= 0 else -1
            if (block + 1) * group.replicas * group.degree > pools[place.pool].count:
                return None
            blocks.append((place, block))
            if block >= 0:
                cuts[place.first + 1 : place.last + 1] = False
        for a, x in blocks:
            for b, y in blocks:
                if a.first > b.first or a is b:
                    continue
                if a.pool == b.pool and x == y and x >= 0:
                    cuts[a.first + 1 : b.last + 1] = False
                elif a.pool != b.pool or (x != y and min(x, y) >= 0):
                    if b.first <= a.last:
                        return None
                    floor[b.first + 1 :] = np.maximum(floor[b.first + 1 :], a.last + 1)
        return Marks(cuts, floor, self.again, self.away, self.places)

    def recomputed(
        self, kinds: NDArray[np.int64], spans: Sequence[tuple[int, int]], counts: Sequence[int]
    ) -> tuple[frozenset[int], ...]:
        """Of each span, the units that are relieved of what they save, so many of each kind: those a person named,
        then the first ones.
        """
        named = {u for a, b in spans for u in range(a, b) if self.again[u]}
        left = list(counts)
        for u in named:
            left[kinds[u]] -= 1
        chosen = set(named)
        for u in (u for a, b in spans for u in range(a, b) if u not in named):
            if left[kinds[u]] > 0:
                left[kinds[u]] -= 1
                chosen.add(u)
        return tuple(frozenset(u for u in range(a, b) if u in chosen) for a, b in spans)

    def floor_on(self, pool: int) -> NDArray[np.int64]:
        """``floor`` of stages on this pool: none of their units is placed on another."""
        floor = self.floor.copy()
        for place in self.places:
            if place.pool != pool:
                for unit in range(place.first, place.last + 1):
                    floor[unit + 1 :] = np.maximum(floor[unit + 1 :], unit + 1)
        return floor


def blocks_in_order(
    degrees: Degrees, spans: tuple[tuple[tuple[int, int], ...], ...], places: tuple[Placed, ...]
) -> tuple[int, ...]:
    """Which block of its pool's devices each stage gets: as placed, the rest in order."""
    fixed: dict[int, int] = {}
    for place in places:
        if place.index < 0:
            continue
        rank = next(r for r, mine in enumerate(spans) if any(a <= place.first < b for a, b in mine))
        group = degrees.groups[degrees.group_of(rank)]
        fixed[rank] = place.index // (group.replicas * group.degree)
    taken: dict[int, set[int]] = {}
    for rank, block in fixed.items():
        taken.setdefault(degrees.groups[degrees.group_of(rank)].pool, set()).add(block)
    found = []
    free = {g.pool: iter(b for b in range(10**9) if b not in taken.get(g.pool, ())) for g in degrees.groups}
    for rank in range(degrees.stages):
        pool = degrees.groups[degrees.group_of(rank)].pool
        found.append(fixed[rank] if rank in fixed else next(free[pool]))
    return tuple(found)
