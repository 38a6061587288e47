"""Cover: which blocks to recompute so that enough bytes are saved at the least extra time (a covering knapsack)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
