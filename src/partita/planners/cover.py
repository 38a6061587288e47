"""Cover: which blocks to recompute so that enough bytes are saved at the least extra time (a covering knapsack)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from partita.planners.problem import Array

EXACT_BLOCKS = 14


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


def cover_spans(seconds: Array, gains: Array, need: Array, where: NDArray[np.bool_]) -> Array:
    """For spans of a chain, extra seconds to gain ``need[a, b]`` from blocks a..b-1 (infinite where impossible).

    An upper bound that ``cover`` meets or beats: blocks at least as worthwhile as a threshold, in order, for each of
    a few thresholds.
    """
    result = np.full(need.shape, np.inf)
    rows, columns = np.nonzero(where)
    useful = gains > 0
    if not len(rows) or not useful.any():
        return result
    ratio = np.where(useful, seconds / np.where(useful, gains, 1.0), np.inf)
    wanted = need[rows, columns]
    best = np.full(len(rows), np.inf)
    for level in np.unique(np.quantile(ratio[useful], (0.25, 0.5, 0.75, 1.0))):
        mask = ratio <= level
        gain = np.concatenate([[0.0], np.cumsum(np.where(mask, gains, 0.0))])
        cost = np.concatenate([[0.0], np.cumsum(np.where(mask, seconds, 0.0))])
        stop = np.searchsorted(gain, gain[rows] + wanted * (1 + 1e-12), side="left")
        ok = stop <= columns
        best[ok] = np.minimum(best[ok], cost[stop[ok]] - cost[rows[ok]])
    result[rows, columns] = best
    return result
