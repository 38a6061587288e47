"""Relief: the ways in which blocks of a stage can hold less, and what each takes: made again, offloaded, lent.

Lending parameters needs room for copies: of all that are lent, but of three blocks at most. Which these are is not
known before the choice, so it is made for each ``level`` (no block above it is lent) with room for three of that size,
and once with every lent block's own copy (``full``): the best of all is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from partita.planners.objective import copies_bytes
from partita.planners.problem import Array, Problem
from partita.planners.spans import Sized

Way = tuple[Array, Array]
"""Of each block, seconds of a microbatch and bytes of making its stage hold less."""
MOST_LEVELS = 6


@dataclass(frozen=True, slots=True)
class How:
    """Which ways are open: blocks may be made again (``again``), offloaded (``away``), lent up to ``level`` bytes."""

    again: bool = False
    away: bool = False
    level: float = 0.0
    full: bool = False

    def copies(self, total: Array, largest: Array) -> Array:
        """Room for copies. ``total``, ``largest``: of what must be lent."""
        if self.full:
            return total
        result: Array = 3.0 * np.maximum(largest, self.level) if self.level else copies_bytes(total, largest)
        return result

    def ways(self, at: Sized, pool: int, mine: int, before: int) -> tuple[Way, ...]:
        """As ``named``. ``mine``: microbatches of a replica; ``before``: those held at once."""
        found: list[Way] = []
        if self.again:
            found.append((at.again_seconds[pool], at.again_bytes * before))
        if self.away:
            found.append((at.away_seconds[pool], at.away_bytes[pool] * before))
        if self.level:
            lent, fits = at.lent, (at.lent.sizes > 0) & (at.lent.sizes <= self.level)
            gains = np.where(fits, lent.gains - lent.sizes * self.full, 0.0)
            found.append((lent.waits[pool] + lent.update / mine, gains))
            if self.away:
                sent = at.away_bytes[pool]
                both = np.where(fits & (sent > 0), gains + sent * before, 0.0)
                found.append((lent.both[pool] + lent.update / mine, both))
        return tuple(found)

    @property
    def named(self) -> tuple[tuple[str, ...], ...]:
        """The fields of ``StageChoice`` that a block of each of the ways is listed in."""
        found: list[tuple[str, ...]] = [("recompute",)] if self.again else []
        found += [("offload",)] if self.away else []
        found += [("lend",), *([("offload", "lend")] if self.away else [])] if self.level else []
        return tuple(found)


PLAIN = How()


def hows(problem: Problem, at: Sized, pool: int) -> tuple[tuple[How, ...], bool]:
    """All that is open on a pool, and whether that is every level."""
    open_ = list(_without_lending(problem, pool))
    if not at.lent.pools[pool]:
        return tuple(open_), True
    levels = np.unique(at.lent.sizes[at.lent.sizes > 0])
    every = len(levels) <= MOST_LEVELS
    if not every:
        levels = np.unique(np.quantile(levels, np.linspace(0.0, 1.0, MOST_LEVELS), method="higher"))
    for level in levels.tolist():
        full = level == levels[-1] and problem.train  # in inference a copy is all that a parameter takes
        for how in (PLAIN, *_without_lending(problem, pool)):
            open_ += [How(how.again, how.away, level, each) for each in (False, True)[: 1 + full]]
    return tuple(open_), every


def _without_lending(problem: Problem, pool: int) -> Iterator[How]:
    if not problem.train:
        return
    yield How(again=True)
    if problem.may_offload and problem.pools[pool].host > 0:
        yield How(away=True)
        yield How(again=True, away=True)
