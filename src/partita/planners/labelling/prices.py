"""Prices of memory per moment. Few moments carry one: the peaks of the excess, with nothing priced close by in time.

A price on every exceeded moment would be a price on one long plateau, and its steps too short to matter at the peaks.
"""

from __future__ import annotations

import numpy as np

from partita.planners.labelling.problem import Floats, Ints

APART = 200  # priced moments stand at least this fraction of all moments apart when they are chosen
NEW_AT_ONCE = 5
RUNS = 10


def peaks(excess: Floats, priced: np.ndarray) -> Ints:
    """The worst exceeded moments, apart from each other and from those priced already."""
    apart = max(1, len(excess) // APART)
    counted = np.concatenate([[0], np.cumsum(priced)])
    chosen: list[int] = []
    for t in np.argsort(-excess)[: APART * NEW_AT_ONCE]:
        if excess[t] <= 0 or len(chosen) == NEW_AT_ONCE:
            break
        crowded = counted[min(len(excess), t + apart)] > counted[max(0, t - apart)]
        if not crowded and all(abs(t - other) > apart for other in chosen):
            chosen.append(int(t))
    return np.array(chosen, dtype=np.int64)


def moved(prices: Floats, excess: Floats, pace: float, unit: float) -> Floats:
    """Prices after one step of a search: at the peak of each run of exceeded moments dearer by ``pace`` of what is
    priced around it (of ``unit`` at least), cheaper by a third of that wherever there is room.
    """
    over = excess > 0
    after = np.where(over, prices, prices * (1.0 - 0.3 * pace))
    after[after < 1e-3 * unit] = 0.0
    if not over.any():
        return after
    turns = np.diff(np.concatenate([[0], over.astype(np.int8), [0]]))
    begins, ends = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
    worst = np.maximum.reduceat(np.append(excess, 0.0), np.stack([begins, ends], axis=1).ravel())[::2]
    reach, least = max(1, len(prices) // APART), max(unit, 0.02 * float(prices.max()))
    for run in np.argsort(-worst)[:RUNS]:
        t = int(begins[run] + excess[begins[run] : ends[run]].argmax())
        around = float(after[max(0, t - reach) : t + reach + 1].sum())
        after[t] += pace * max(around, least)
    return after
