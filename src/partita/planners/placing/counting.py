"""Counting: a bound on the load from how many large units a device can hold.

A device within a load of T holds at most m units that each take over T / (m + 1). Fekete and Schepers, *New classes of
fast lower bounds for bin packing problems* (Mathematical Programming, 2001): the dual feasible functions u(m) round
every unit's share of a device so, down to a multiple of 1 / m, and still no device holds more than 1 in all.
"""

from __future__ import annotations

import numpy as np

from partita.planners.placing.problem import Placement
from partita.planners.problem import Array

MOST = 32
STEPS = 40


def counted(problem: Placement, low: float) -> float:
    """The largest load at which some count says that the devices do not suffice; ``low`` where none does beyond it."""
    for kind in range(len(problem.kinds)):
        if problem.kinds[kind].count and np.isfinite(low) and low > 0 and not _enough(problem, kind, low):
            high = 2 * low
            while not _enough(problem, kind, high):
                low, high = high, 2 * high
            for _ in range(STEPS):
                middle = 0.5 * (low + high)
                low, high = (low, middle) if _enough(problem, kind, middle) else (middle, high)
    return low


def _enough(problem: Placement, main: int, cap: float) -> bool:
    """Whether every count lets the devices hold all units within ``cap``, by shares of the kind ``main``."""
    size = problem.kinds[main].seconds / cap
    size = np.where(np.isfinite(size), size * (1 - 1e-9), 0.0)
    for m in range(1, MOST + 1):
        share = np.minimum(np.floor((m + 1) * size) / m, 1.0)
        left = float(share.sum())
        for k, kind in enumerate(problem.kinds):
            if k != main and kind.count:
                left -= _most(share, kind.seconds, kind.count * cap, cap)
        if left > problem.kinds[main].count * (1 + 1e-9):
            return False
    return True


def _most(share: Array, seconds: Array, room: float, cap: float) -> float:
    """The most shares that fit in ``room`` seconds, units divided at will."""
    able = (seconds <= cap * (1 + 1e-9)) & (share > 0)
    gained, spent = share[able], seconds[able]
    order = np.argsort(-gained / np.maximum(spent, 1e-300), kind="stable")
    reached = np.concatenate([[0.0], np.cumsum(spent[order])])
    total = np.concatenate([[0.0], np.cumsum(gained[order])])
    return float(total[-1]) if reached[-1] <= room else float(np.interp(room, reached, total))
