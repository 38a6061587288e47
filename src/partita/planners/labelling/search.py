"""Two searches that help each other: one raises the bound and rounds it to labels, the other descends from those.

Labels rounded from good messages at good prices are a far better place to descend from than any others: forest moves
alone end tens of per cent higher.
"""

from __future__ import annotations

import math
import time

import numpy as np

from partita.planners.labelling.dual import bound_of, marginals, message_starts, sweep
from partita.planners.labelling.flat import Flat, cost_of, load_of, priced, smallest
from partita.planners.labelling.forest import relabel_forest
from partita.planners.labelling.moves import Moves
from partita.planners.labelling.prices import moved, peaks
from partita.planners.labelling.problem import Floats, Ints
from partita.planners.labelling.record import Record
from partita.planners.labelling.region import likely, relabel_region

MOVES = 300  # of a descent
NOISY_MOVES = 4
NOISE = (0.0, 0.1, 0.5, 2.0)  # of the cost per node
PACE = (0.05, 0.002)  # of the prices at its begin and end
REGION_PAIRS = 20_000  # label pairs on the edges of the first region
REGION_SECONDS = 4.0  # for a region
FIRST_MOVES = 60
PATIENCE = 10  # steps without a better bound before the prices' steps shorten
SHORTEST = 1e-3  # step, as a share of Polyak's, at which bounds are raised no more


def raise_bounds(flat: Flat, record: Record, until: float) -> None:
    """Sweeps over the messages, each followed by a step of the prices along the excess of the labels it rounds to
    (Polyak's step length), while more than ``until`` seconds are left.
    """
    message_at = message_starts(flat)
    messages = np.zeros(message_at[-1])
    unary = np.zeros(len(flat.cost))
    labels = np.zeros(len(flat.label_at) - 1, dtype=np.int64)
    load = np.zeros(len(flat.room) + 1)
    prices = np.zeros(len(flat.room))
    heading = np.zeros(len(prices))
    best, best_prices, stride, idle = -math.inf, prices, 0.3, 0
    last = 0.0  # seconds of the last turn
    while not record.stopped and record.seconds_left > until + last:
        begun = time.monotonic()
        priced(flat, prices, unary)
        for forward in (True, False):
            sweep(flat, message_at, messages, unary, forward, labels)
            load_of(flat, labels, load)
            excess = load[:-1] - flat.room
            record.offer(labels)
        bound = float(bound_of(flat, message_at, messages, unary)) - float(prices @ flat.room)
        record.raise_bound(bound)
        if record.propose(labels, prices, float(cost_of(flat, labels)) + float(prices @ excess) - bound):
            said = np.zeros(len(unary))
            marginals(flat, message_at, messages, unary, said)
            record.marginals = said
        if bound > best + 1e-5 * abs(best) or not math.isfinite(best):
            idle = 0
        else:
            idle += 1
        if bound > best:
            best, best_prices = bound, prices.copy()
        last = time.monotonic() - begun
        if idle >= PATIENCE:
            stride, idle, prices = 0.7 * stride, 0, best_prices.copy()
            heading[:] = 0.0
            if stride < SHORTEST:
                return
            continue
        active = prices > 0
        active[peaks(excess, active)] = True
        heading = np.where(active, 0.6 * heading + excess, 0.0)
        norm = float(heading @ heading)
        if norm > 0:
            least = 1e-3 * max(abs(best), abs(float(cost_of(flat, labels))))
            gap = max(min(record.cost, 1.3 * abs(best)) - bound, least)
            prices = np.maximum(0.0, prices + stride * gap / norm * heading)


def first_answers(flat: Flat, record: Record, rng: np.random.Generator) -> None:
    """The labels that use least, then forest moves from there at one price for memory at all moments: halved after
    labels that fit, raised after those that do not. Far from the best, and there after a fraction of a second.
    """
    labels = smallest(flat)
    record.offer(labels)
    load = np.zeros(len(flat.room) + 1)
    load_of(flat, labels, load)
    unary = np.zeros(len(flat.cost))
    price = abs(float(cost_of(flat, labels))) / (float(flat.room.sum()) or 1.0)
    for _ in range(FIRST_MOVES):
        if record.stopped:
            return
        priced(flat, np.full(len(flat.room), price), unary)
        relabel_forest(flat, unary, labels, rng.permutation(len(labels)))
        load_of(flat, labels, load)
        fits = not (load[:-1] > flat.room).any()
        if fits:
            record.offer(labels)
        price *= 0.5 if fits else 1.3


def search(flat: Flat, record: Record, rng: np.random.Generator) -> None:
    """Descents from what is proposed, and from the best labels at shaken prices, until time ends. After one that found
    nothing better, a region of the best labels is relabelled exactly; regions grow where that is quick.
    """
    pairs, moves = REGION_PAIRS, Moves(flat, record, rng)
    while not record.stopped:
        before = record.cost
        labels, prices = record.start(rng)
        descend(flat, record, moves, labels, prices, rng)
        time_left = not record.stopped and record.seconds_left > 3 * REGION_SECONDS  # the program may overrun
        if record.labels is not None and record.cost >= before and time_left:
            stays = likely(flat, record, pairs, rng)
            proven = relabel_region(flat, record, record.labels, stays, pairs, REGION_SECONDS, rng)
            pairs = int(pairs * (1.3 if proven else 0.6))


def descend(flat: Flat, record: Record, moves: Moves, labels: Ints, prices: Floats, rng: np.random.Generator) -> None:
    """Moves at prices that follow the excess, ever more slowly; every labelling that fits is offered. The first
    moves see each label dearer by chance, by up to some nodes' share of the cost.
    """
    noise = float(rng.choice(NOISE)) * abs(float(cost_of(flat, labels))) / len(labels)
    unary = np.zeros(len(flat.cost))
    load = np.zeros(len(flat.room) + 1)
    room = float(flat.room.max(initial=0.0)) or 1.0
    for move in range(MOVES):
        if record.stopped or record.has_better_start:
            return
        pace = PACE[0] * (1 - move / MOVES) + PACE[1]
        priced(flat, prices, unary)
        if move < NOISY_MOVES:
            unary += rng.exponential(noise, len(unary))
        moves.relabel(unary, labels)
        load_of(flat, labels, load)
        excess = load[:-1] - flat.room
        if not (excess > 0).any():
            record.offer(labels)
        prices = moved(prices, excess, pace, 1e-6 * (abs(float(cost_of(flat, labels))) or 1.0) / room)
