"""Cover: which blocks to recompute or offload so that enough bytes are saved at the least extra time (a covering
knapsack, with several ways for an item where there are both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.planners.choice import cheapest
from partita.planners.problem import Array

EXACT_BLOCKS = 14
Indices = NDArray[np.int64]


def cover(seconds: Sequence[float], gains: Sequence[float], need: float) -> tuple[float, tuple[int, ...]] | None:
    """(least seconds, positions) with gains adding up to ``need``; None where all together do not.

    Exact to EXACT_BLOCKS useful positions; beyond, best value first and then without what proves unneeded.
    """
    useful = [i for i, gain in enumerate(gains) if gain > 0]
    if sum(gains[i] for i in useful) < need:
        return None
    if need <= 0:
        return 0.0, ()
    if len(useful) <= EXACT_BLOCKS:
        bits = (np.arange(1 << len(useful))[:, None] >> np.arange(len(useful))[None, :]) & 1
        gain = bits @ np.array([gains[i] for i in useful])
        cost = np.where(gain >= need, bits @ np.array([seconds[i] for i in useful]), np.inf)
        best = int(cost.argmin())
        if not np.isfinite(cost[best]):
            return None
        return float(cost[best]), tuple(i for k, i in enumerate(useful) if bits[best, k])
    chosen: list[int] = []
    left = need
    for i in sorted(useful, key=lambda i: (seconds[i] / gains[i], i)):
        if left <= 0:
            break
        chosen.append(i)
        left -= gains[i]
    for i in sorted(chosen, key=lambda i: -seconds[i]):
        if left + gains[i] <= 0:
            chosen.remove(i)
            left += gains[i]
    return sum(seconds[i] for i in chosen), tuple(sorted(chosen))


def spare(
    ways: Sequence[tuple[Sequence[float], Sequence[float]]], need: float
) -> tuple[float, tuple[tuple[int, ...], ...]] | None:
    """As ``cover`` where there are several ``ways`` (seconds, gains) for every position: positions of each way.

    Exact to EXACT_BLOCKS useful positions; beyond, the best exchanges first and then without what proves unneeded.
    """
    if len(ways) == 1:
        one = cover(*ways[0], need)
        return None if one is None else (one[0], (one[1],))
    rows = [  # of each position: (seconds, gain, way), the way -1 of leaving it
        [(0.0, 0.0, -1), *((float(s[i]), float(g[i]), w) for w, (s, g) in enumerate(ways) if g[i] > 0)]
        for i in range(len(ways[0][0]))
    ]
    useful = [i for i, row in enumerate(rows) if len(row) > 1]
    most = [max(gain for _, gain, _ in rows[i]) for i in useful]
    if sum(most) < need:
        return None
    picked = dict.fromkeys(useful, 0)
    if need > 0 and len(useful) <= EXACT_BLOCKS:
        choices = tuple(np.array([(s, m - g) for s, g, _ in rows[i]]) for i, m in zip(useful, most, strict=True))
        best = cheapest(choices, sum(most) - need)
        if best is None:  # short by a rounding
            return None
        picked = dict(zip(useful, best[1], strict=True))
    elif need > 0:
        picked = _exchanged(rows, useful, need)
    total = sum(rows[i][k][0] for i, k in picked.items())
    chosen = [(i, rows[i][k][2]) for i, k in picked.items()]
    return total, tuple(tuple(i for i, w in chosen if w == way) for way in range(len(ways)))


def _exchanged(
    rows: Sequence[Sequence[tuple[float, float, int]]], useful: Sequence[int], need: float
) -> dict[int, int]:
    """Position -> which of its rows: the exchange of the least seconds a byte first."""
    picked, left = dict.fromkeys(useful, 0), need
    exchanges = sorted(
        ((s - t) / (g - h), i, k) for i in useful for k, (s, g, _) in enumerate(rows[i]) for t, h, _ in rows[i] if g > h
    )
    for _, i, k in exchanges:
        if left <= 0:
            break
        more = rows[i][k][1] - rows[i][picked[i]][1]
        if more > 0:
            picked[i], left = k, left - more
    for i in sorted(useful, key=lambda i: -rows[i][picked[i]][0]):
        if left + rows[i][picked[i]][1] <= 0:
            left += rows[i][picked[i]][1]
            picked[i] = 0
    return picked


@dataclass(frozen=True, slots=True, eq=False)
class Thresholds:
    """Of blocks in a chain: bytes gained and seconds taken, added up from the start, by those at least as worthwhile as
    each of a few thresholds.
    """

    gains: tuple[Array, ...]
    seconds: tuple[Array, ...]

    @staticmethod
    def of(seconds: Array, gains: Array) -> Thresholds:
        useful = gains > 0
        if not useful.any():
            return Thresholds((), ())
        ratio = np.where(useful, seconds / np.where(useful, gains, 1.0), np.inf)
        masks = [ratio <= level for level in np.unique(np.quantile(ratio[useful], (0.25, 0.5, 0.75, 1.0)))]
        gained, taken = (
            tuple(np.concatenate([[0.0], np.cumsum(np.where(mask, row, 0.0))]) for mask in masks)
            for row in (gains, seconds)
        )
        return Thresholds(gained, taken)

    def least(self, first: Indices, last: Indices, need: Array) -> Array:
        """Seconds for each run of blocks from ``first`` to before ``last`` to gain ``need`` (infinite where it cannot).

        An upper bound that ``cover`` meets or beats: for each threshold the blocks it lets pass, in order.
        """
        best = np.full(len(need), np.inf)
        for gain, cost in zip(self.gains, self.seconds, strict=True):
            stop = np.searchsorted(gain, gain[first] + need * (1 + 1e-12), side="left")
            ok = stop <= last
            best[ok] = np.minimum(best[ok], cost[stop[ok]] - cost[first[ok]])
        return best
