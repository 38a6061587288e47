"""Moves of a descent: forests, cheap and new each time, and eliminations, dearer and from a pool of orders."""

from __future__ import annotations

import time

import numpy as np

from partita.planners.labelling.elimination import Elimination, eliminate, relabel_eliminated
from partita.planners.labelling.flat import Flat, cost_of
from partita.planners.labelling.forest import relabel_forest
from partita.planners.labelling.kernel import COMPILED
from partita.planners.labelling.problem import Floats, Ints
from partita.planners.labelling.record import Record

WORK = 2e7 if COMPILED else 2e5  # additions of an elimination
ENTRIES = 2.0**20  # of its largest table, at most
POOL = 16  # orders kept
ORDER_SHARE = 0.1  # of the time, for new orders
ORDER_SECONDS = 2e-5  # a node or edge, expected of the first order
FORESTS = 4  # between two eliminations
WHOLE_SHARE = 0.02  # of the time, for seeing whether all nodes can be eliminated


class Moves:
    """The moves of one thread over one core."""

    def __init__(self, flat: Flat, record: Record, rng: np.random.Generator) -> None:
        self.flat, self.record, self.rng = flat, record, rng
        self.pool: list[Elimination] = []
        self.tables = np.zeros(0)
        self.entries = min(ENTRIES, 8 * WORK / len(flat.label_at))
        self.turn = 0
        self.begun = time.monotonic()
        self.spent = 0.0
        self.expected = ORDER_SECONDS * (len(flat.label_at) + len(flat.edge_a))

    def relabel(self, unary: Floats, labels: Ints) -> None:
        """The next move: ``labels`` get no dearer by ``unary`` and the edges."""
        self.turn += 1
        if self.turn % (FORESTS + 1) == 0:
            if self.spent <= ORDER_SHARE * (time.monotonic() - self.begun):
                self._order()
            if self.pool:
                chosen = self.pool[int(self.rng.integers(len(self.pool)))]
                relabel_eliminated(self.flat, chosen, unary, labels, self.tables)
                return
        relabel_forest(self.flat, unary, labels, self.rng.permutation(len(labels)))

    def _order(self) -> None:
        """A new order joins the pool, or takes another's place; tables get smaller until a move is quick enough."""
        started = time.monotonic()
        while self.record.seconds_left > 3 * self.expected:
            begun = time.monotonic()
            new = eliminate(self.flat, self.entries, self.rng)
            self.expected = time.monotonic() - begun
            if new.work > WORK and self.entries > 1:
                self.entries /= 4
                continue
            if len(self.pool) < POOL:
                self.pool.append(new)
            else:
                self.pool[int(self.rng.integers(POOL))] = new
            needed = int(new.table_at[-1]) + new.largest
            if needed > len(self.tables):
                self.tables = np.zeros(needed)
            break
        self.spent += time.monotonic() - started


def eliminate_all(flat: Flat, record: Record, rng: np.random.Generator) -> None:
    """Where no node need keep its label: the best labels whatever memory they use, which are the optimum if they fit.
    Nothing where finding that out would take a notable part of the time.
    """
    expected = ORDER_SECONDS * (len(flat.label_at) + len(flat.edge_a))
    if expected > WHOLE_SHARE * record.seconds_left:
        return
    steps = eliminate(flat, ENTRIES, rng)
    if len(steps.order) < len(flat.label_at) - 1 or steps.work > 10 * WORK:
        return
    labels = np.zeros(len(steps.order), dtype=np.int64)
    relabel_eliminated(flat, steps, flat.cost, labels, np.zeros(int(steps.table_at[-1]) + steps.largest))
    cost = float(cost_of(flat, labels))
    if cost >= flat.forbidden / 2:
        record.refute()
        return
    record.raise_bound(cost)
    record.offer(labels)
