"""Abreast: replicas of the whole model on devices of several kinds, each with a share of the batch after its speed.

    sizes    samples of every microbatch, in proportion to what the replicas do in a second; all end together
    ZeRO     over the replicas of all kinds; a reduction goes at the pace of the slowest kind's links

What HetPipe and others (Park et al., 2020) do with virtual workers of one stage. One tensor degree for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import combinations
from math import gcd

import numpy as np

from partita.planners.large.degrees import Degrees, Group, Layout, StageLayout
from partita.planners.large.exchange import tail_seconds
from partita.planners.large.layout import parts
from partita.planners.large.loads import Array, Load, Loads, Row
from partita.planners.large.search import Search

MOST_ROUNDS = 64


def abreast(search: Search, best: float = np.inf) -> Iterator[Layout]:
    """Layouts of one stage on several kinds, as the limits allow, that take no longer than ``best``."""
    marks, limits = search.marks, search.limits
    if marks.places or marks.floor.any() or not limits.allows(1) or limits.stages > 1 or limits.samples:
        return
    for count in range(2, len(search.pools) + 1):
        for used in combinations(range(len(search.pools)), count):
            loads = _loads(search, used)
            for degrees in _choices(search, used):
                made = _priced(search, loads, degrees, best)
                if made is not None:
                    best = min(best, made.seconds)
                    yield made


def _choices(search: Search, used: Sequence[int]) -> Iterator[Degrees]:
    """Degrees without the shares: ``samples`` is what a replica would get were all alike."""
    limits, batch = search.limits, search.batch
    per_node = gcd(*(search.pools[k].per_node for k in used))
    for degree in (d for d in range(1, per_node + 1) if per_node % d == 0):
        if (limits.degree and degree != limits.degree) or (limits.divided and degree == 1):
            continue
        groups = tuple(Group(k, 1, search.pools[k].count // degree, degree) for k in used)
        replicas = sum(g.replicas for g in groups)
        if limits.replicas not in (0, replicas):
            continue
        rounds = [1 << k for k in range(MOST_ROUNDS.bit_length())]
        if limits.microbatches:
            rounds = [limits.microbatches // replicas] if limits.microbatches % replicas == 0 else []
        for n in rounds:
            if n * replicas > batch:
                break
            for sequence in (limits.sequence,) if limits.sequence is not None else (degree > 1,):
                for zero in (limits.zero,) if limits.zero >= 0 else (1, 2, 3) if search.pricer.train else (0,):
                    yield Degrees(
                        groups, max(1, batch // (n * replicas)), 1, zero, bool(sequence) and degree > 1,
                        limits.recompute, shares=(n,) * len(groups),
                    )  # fmt: skip


def _priced(search: Search, loads: Loads, plain: Degrees, best: float) -> Layout | None:
    """With shares after the speed of each kind; None where one does not fit or it takes longer than ``best``."""
    rounds = plain.shares[0]
    counts = [g.replicas for g in plain.groups]
    each = -(-search.batch // rounds)
    shares = (plain.samples,) * len(counts)
    for _ in range(3):
        rows = search.rows(replace(plain, shares=shares))
        if rows is None:
            return None
        busy = [loads.least(replace(plain, shares=shares).side(i), _all(plain, i), r)
                for i, r in enumerate(rows)]  # fmt: skip
        if rounds * max(busy) > 4 * best:
            return None
        speed = [share / max(b, 1e-30) for share, b in zip(shares, busy, strict=True)]
        shares = tuple(max(p) for p in _by_group(apportioned(each, speed, counts), counts))
    degrees = replace(plain, shares=shares, samples=max(shares))
    rows = search.rows(degrees)
    return None if rows is None else _summed(search, loads, degrees, rows, rounds)


def _all(degrees: Degrees, i: int) -> Group:
    return degrees.side(i).groups[0]


def _summed(search: Search, loads: Loads, degrees: Degrees, rows: tuple[Row, ...], rounds: int) -> Layout | None:
    free = [_load(loads, degrees, i, row, row.fixed[:, -1:]) for i, row in enumerate(rows)]
    again = np.max([load.again for load in free], axis=0)  # a plan names what is recomputed for all of them
    loaded = [_load(loads, degrees, i, row, again) for i, row in enumerate(rows)]
    if not all(np.isfinite(load.backward[0]) for load in loaded):
        return None
    stages, pricer = [], search.pricer
    for i, (row, load) in enumerate(zip(rows, loaded, strict=True)):
        group, total = _all(degrees, i), row.total
        tied = sum(elements for _, _, elements in search.ties) / group.degree
        tail = 0.0
        if pricer.train:
            tail = tail_seconds(
                loads.pools[group.pool], group, total.weights - tied, total.trained - tied, loads.state,
                degrees.zero, search.assume,
            )  # fmt: skip
        stages.append(
            StageLayout(
                i, ((0, len(search.units.row)),), tuple(int(x) for x in load.again[:, 0]), float(load.forward[0]),
                float(load.backward[0]), float(load.memory[0]) + search.assume.reserve_bytes, tail, 0.0,
                float(load.late[0]),
            )
        )  # fmt: skip
    slow = max(range(len(stages)), key=lambda i: stages[i].forward + stages[i].backward)
    row, load = rows[slow], loaded[slow]
    plain = row.forward @ row.all + row.relief @ load.again[:, 0] + (row.backward @ row.all if pricer.train else 0.0)
    gathered = rounds * max(float(load.busy[0] - plain), 0.0)
    seconds = rounds * float(load.busy[0]) + max(s.tail for s in stages)
    m = rounds * sum(g.replicas for g in degrees.groups)
    alone = replace(degrees.side(slow), groups=(replace(degrees.side(slow).groups[0], replicas=m // rounds),))
    one = replace(stages[slow], group=0, tail=max(s.tail for s in stages))
    split = parts(alone, (one,), m, seconds, rounds * float(row.exchanged @ row.all), gathered)
    return Layout(degrees, tuple(stages), m, seconds, split, seconds)


def _load(loads: Loads, degrees: Degrees, i: int, row: Row, fixed: Array) -> Load:
    return loads.load(degrees.side(i), 0, row, row.counts[:, -1:], fixed, 1.0)


def _loads(search: Search, used: Sequence[int]) -> Loads:
    """With links between nodes as slow as the slowest kind's: a collective over all of them waits for it."""
    slow = min((search.pools[k].across for k in used), key=lambda channel: channel.bandwidth)
    made = copy(search.pricer.loads)
    made.pools = tuple(replace(p, across=slow) if k in used else p for k, p in enumerate(search.pools))
    made.forget()
    return made


def apportioned(total: int, speed: Sequence[float], counts: Sequence[int]) -> tuple[int, ...]:
    """Samples of each replica, one at least: in proportion to its group's speed, so that the last ends soonest."""
    rates = [s for s, n in zip(speed, counts, strict=True) for _ in range(n)]
    ideal = [total * r / sum(rates) for r in rates]
    sizes = [max(1, int(x)) for x in ideal]
    left = total - sum(sizes)
    order = sorted(range(len(rates)), key=lambda i: (sizes[i] + 1) / rates[i])
    for k in range(max(left, 0)):
        sizes[order[k % len(order)]] += 1
    largest = sorted(range(len(rates)), key=lambda i: -sizes[i] / rates[i])
    k = 0
    while left < 0:
        i = largest[k % len(largest)]
        if sizes[i] > 1:
            sizes[i] -= 1
            left += 1
        k += 1
    return tuple(sizes)


def _by_group(sizes: Sequence[int], counts: Sequence[int]) -> Iterator[Sequence[int]]:
    at = 0
    for n in counts:
        yield sizes[at : at + n]
        at += n


def sizes_of(search: Search, layout: Layout) -> tuple[int, ...]:
    """Samples of every microbatch, in the order the replicas take them."""
    degrees = layout.degrees
    counts = [g.replicas for g in degrees.groups]
    rounds = layout.microbatches // sum(counts)
    speed = [share / (s.forward + s.backward) for share, s in zip(degrees.shares, layout.stages, strict=True)]
    found: list[int] = []
    for k in range(rounds):
        mine = search.batch // rounds + (k < search.batch % rounds)
        found += apportioned(mine, speed, counts)
    return tuple(found)
