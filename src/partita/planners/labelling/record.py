"""What the searches that run side by side know together: the best labels, the best bound, the prices, when to stop."""

from __future__ import annotations

import math
import threading
import time

import numpy as np

from partita.planners.labelling.flat import Flat, cost_of, load_of
from partita.planners.labelling.problem import Floats, Ints

CLOSED = 1e-7  # a bound this close below the cost, relatively, proves it optimal
ROUNDING = 1e-9  # relative error allowed for in a bound


class Record:
    """One core's best answer and best bound so far. Safe to use from several threads."""

    def __init__(self, flat: Flat, seconds: float, whole_numbers: bool) -> None:
        self.flat = flat
        self.deadline = time.monotonic() + seconds
        self.labels: Ints | None = None
        self.cost = math.inf
        self.bound = -math.inf
        self._proposed = (np.zeros(len(flat.label_at) - 1, dtype=np.int64), np.zeros(len(flat.room)))
        self._proposed_gap = math.inf
        self._proposed_used = False
        self.marginals: Floats | None = None  # of the labels, at the prices proposed
        self._started_gap = math.inf
        self.infeasible = False
        self._whole_numbers = whole_numbers
        self._final = False
        self._lock = threading.Lock()
        self._done = threading.Event()

    def offer(self, labels: Ints) -> bool:
        """Take ``labels`` over where they are cheaper than the best, without a forbidden pair, and fit."""
        cost = float(cost_of(self.flat, labels))
        if cost >= self.cost or cost >= self.flat.forbidden / 2:
            return False
        load = np.zeros(len(self.flat.room) + 1)
        load_of(self.flat, labels, load)
        if (load[:-1] > self.flat.room).any():
            return False
        with self._lock:
            if cost >= self.cost or self._final:
                return False
            self.labels, self.cost = labels.copy(), cost
            self._settle()
        return True

    def propose(self, labels: Ints, prices: Floats, gap: float) -> bool:
        """Keep ``labels`` to start from where their cost, excess priced, is closest to the bound at these prices."""
        with self._lock:
            if gap >= self._proposed_gap:
                return False
            self._proposed, self._proposed_gap = (labels.copy(), prices.copy()), gap
            self._proposed_used = False
            return True

    def start(self, rng: np.random.Generator) -> tuple[Ints, Floats]:
        """Labels and prices to descend from: the proposed ones, once; then they or the best, at shaken prices."""
        with self._lock:
            labels, prices = self._proposed
            if self._proposed_used:
                if self.labels is not None and rng.random() < 0.8:
                    labels = self.labels
                prices = prices * np.exp(rng.normal(0.0, 0.3) + rng.normal(0.0, 0.2, len(prices)))
            self._proposed_used = True
            self._started_gap = self._proposed_gap
            return labels.copy(), prices.copy()

    @property
    def prices(self) -> Floats:
        """Those proposed."""
        return self._proposed[1]

    @property
    def has_better_start(self) -> bool:
        """What is proposed now has come much closer to its bound than what was started from last."""
        return self._proposed_gap < 0.7 * self._started_gap

    def raise_bound(self, bound: float) -> None:
        """Take a proven lower bound over where it is higher, less what rounding may have added."""
        if not math.isfinite(bound):
            return
        bound -= ROUNDING * abs(bound)
        if self._whole_numbers:
            bound = math.ceil(bound - ROUNDING)
        with self._lock:
            if not self._final:
                self.bound = max(self.bound, bound)
                self._settle()

    def refute(self) -> None:
        """No answer exists."""
        self.infeasible = True
        self._done.set()

    def close(self) -> None:
        """What stands now is the answer: nothing offered later changes it, and whoever searches on stops soon."""
        with self._lock:
            self._final = True
        self._done.set()

    @property
    def closed(self) -> bool:
        """The best answer is proven optimal."""
        if not math.isfinite(self.cost) or not math.isfinite(self.bound):
            return False
        return self.cost - self.bound <= CLOSED * max(abs(self.cost), abs(self.bound))

    @property
    def stopped(self) -> bool:
        return self._done.is_set() or time.monotonic() >= self.deadline

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _settle(self) -> None:
        if self.closed:
            self._done.set()
