"""Search: the fastest layout of a large model, best bound first.

Every combination of stages, replicas, tensor degree, microbatch, interleaving, ZeRO level and sequence division gets a
lower bound in closed form; they are priced with their true cuts and memory in the order of the bounds until the next
bound is no better than the best layout found: that one is then the best of all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np

from partita.cost.roofline import Assumptions
from partita.graph import Graph
from partita.planners.large.layout import Degrees, Group, Layout, Pricer, Row
from partita.planners.large.prices import Pool, Prices
from partita.planners.large.units import Units

SECONDS = 6.0
MOST_SAMPLES, MIXED_SAMPLES = 256, 16
CHUNKS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
KEPT = 40
NEAR = 1.1  # layouts up to a tenth slower than the best are kept, to be told as the next best
PATIENCE = 4  # times the seconds are spent where nothing was found to fit yet


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user fixed; 0 leaves it to the search. ``within_node``: tensor degrees stay inside a node."""

    degree: int = 0
    stages: int = 0
    replicas: int = 0
    samples: int = 0
    chunks: int = 0
    sequence: bool | None = None
    recompute: str = "needed"
    within_node: bool = True
    zero: int = -1


@dataclass(frozen=True, slots=True)
class Found:
    """``layouts``: best first. ``bound``: no layout of the family is faster. ``tried``: how many of ``listed`` were."""

    layouts: tuple[Layout, ...]
    bound: float
    tried: int
    listed: int
    why_not: str = ""

    @property
    def gap(self) -> float:
        return max(0.0, self.layouts[0].seconds / self.bound - 1.0) if self.layouts and self.bound else 0.0


class Search:
    """One model on one cluster."""

    def __init__(
        self,
        graph: Graph,
        units: Units,
        pools: tuple[Pool, ...],
        *,
        batch: int,
        assume: Assumptions,
        optimizer: str = "adamw",
        headroom: float = 0.95,
        train: bool = True,
        limits: Limits | None = None,
        like: Search | None = None,
    ) -> None:
        """``like``: a search of the same model and assumptions, whose looked-up counts serve here too."""
        self.graph, self.units, self.pools, self.batch = graph, units, pools, batch
        self.limits = limits or Limits()
        self.assume, self.optimizer, self.headroom = assume, optimizer, headroom
        self.kinds = np.array([u.kind for u in units.row])
        self.prices: Prices = Prices(graph, units, assume, like.prices.shapes if like else None)
        self.ties: tuple[tuple[int, int, float], ...] = like.ties if like else _ties(graph, units)
        self.pricer = Pricer(pools, batch, assume, optimizer=optimizer, headroom=headroom, train=train, ties=self.ties)
        self._rows: dict[tuple[int, int, bool, int], Row | None] = {}

    def changed(self, pools: tuple[Pool, ...] | None = None, batch: int = 0, optimizer: str = "") -> Search:
        """The same search on other devices, for another batch or optimizer."""
        return Search(
            self.graph,
            self.units,
            pools or self.pools,
            batch=batch or self.batch,
            assume=self.assume,
            optimizer=optimizer or self.optimizer,
            headroom=self.headroom,
            train=self.pricer.train,
            limits=self.limits,
            like=self,
        )

    def best_of(self, listed: Sequence[Degrees]) -> float:
        """Seconds of the fastest of these layouts; infinite where none fits."""
        best = np.inf
        for degrees in listed:
            rows = self.rows(degrees)
            layout = self.pricer.price(degrees, rows, best) if rows is not None else None
            best = min(best, layout.seconds if layout is not None else np.inf)
        return float(best)

    def row(self, pool: int, degree: int, sequence: bool, samples: int) -> Row | None:
        key = (pool, degree, sequence, samples)
        if key not in self._rows:
            prices = self.prices.of(self.pools[pool], degree, sequence, samples)
            self._rows[key] = Row.of(self.kinds, prices) if prices is not None else None
        return self._rows[key]

    def rows(self, degrees: Degrees) -> tuple[Row, ...] | None:
        found = [self.row(g.pool, g.degree, degrees.sequence, degrees.samples) for g in degrees.groups]
        return None if any(r is None for r in found) else tuple(r for r in found if r is not None)

    def run(self, seconds: float = SECONDS) -> Found:
        """The best layouts. ``seconds``: of this process, after which the best so far is returned with its bound."""
        began = time.process_time()
        listed: list[tuple[float, Degrees, tuple[Row, ...]]] = []
        for degrees in self._all():
            rows = self.rows(degrees)
            if rows is not None and self._may_fit(degrees, rows):
                listed.append((self.pricer.bound(degrees, rows), degrees, rows))
        listed.sort(key=lambda item: item[0])
        best, tried, bound = np.inf, 0, 0.0
        found: list[Layout] = []
        for bound, degrees, rows in listed:
            if bound >= best or time.process_time() - began > seconds * (1 if found else PATIENCE):
                break
            layout = self.pricer.price(degrees, rows, best * NEAR)
            tried += 1
            if layout is not None:
                found.append(layout)
                best = min(best, layout.seconds)
        else:
            bound = best
        found.sort(key=lambda item: item.seconds)
        why = "" if found else self._why_not(listed)
        return Found(tuple(found[:KEPT]), min(bound, best), tried, len(listed), why)

    def _why_not(self, listed: list[tuple[float, Degrees, tuple[Row, ...]]]) -> str:
        if listed:
            return "activations and weights of every layout exceed the devices' memory, even where all is recomputed"
        return "weights, gradients and optimizer state exceed the memory of all devices together"

    # -- what there is to try

    def _all(self) -> Iterator[Degrees]:
        for groups in self._groups():
            replicas = max(g.replicas for g in groups)
            divided = any(g.degree > 1 for g in groups)
            stages = sum(g.stages for g in groups)
            for samples in self._samples(replicas, stages, MIXED_SAMPLES if len(groups) > 1 else MOST_SAMPLES):
                m = -(-self.batch // samples)
                if m < replicas:
                    continue
                ways = (self.limits.sequence,) if self.limits.sequence is not None else (True, False)
                for sequence in ways if divided else (False,):
                    assert sequence is not None
                    for zero in self._zero(groups, stages):
                        one = Degrees(groups, samples, 1, zero, sequence, self.limits.recompute)
                        if self.limits.chunks in (0, 1):
                            yield one
                        for chunks in self._chunks(groups, stages, m):
                            yield replace(one, chunks=chunks)

    def _zero(self, groups: tuple[Group, ...], stages: int) -> tuple[int, ...]:
        if self.limits.zero >= 0:
            return (self.limits.zero,)
        if not self.pricer.train or max(g.replicas for g in groups) == 1:
            return (0,)
        return (1, 2, 3) if stages == 1 else (1,)

    def _chunks(self, groups: tuple[Group, ...], stages: int, m: int) -> tuple[int, ...]:
        if len(groups) > 1 or stages < 2 or not self.pricer.train or m % groups[0].replicas:
            return ()
        if (m // groups[0].replicas) % stages:
            return ()
        wanted = CHUNKS if not self.limits.chunks else (self.limits.chunks,) if self.limits.chunks > 1 else ()
        return tuple(v for v in wanted if stages * v <= len(self.units.row))

    def _samples(self, replicas: int, stages: int, largest: int) -> tuple[int, ...]:
        """Microbatches of one replica: powers of two, and all of its samples at once."""
        if self.limits.samples:
            return (self.limits.samples,)
        most = max(1, self.batch // replicas)
        sizes = {1 << k for k in range(most.bit_length()) if 1 << k <= min(most, largest)}
        if stages == 1:
            sizes.add(-(-self.batch // replicas))
        return tuple(sorted(sizes))

    def _groups(self) -> Iterator[tuple[Group, ...]]:
        for k in range(len(self.pools)):
            for group in self._of_pool(k, every=True):
                yield (group,)
        if len(self.pools) < 2 or self.limits.stages or self.limits.replicas:
            return
        for count in range(2, len(self.pools) + 1):
            for order in permutations(range(len(self.pools)), count):
                for groups in product(*(tuple(self._of_pool(k, every=False)) for k in order)):
                    if sum(g.stages for g in groups) <= len(self.units.row):
                        yield tuple(groups)

    def _of_pool(self, k: int, *, every: bool) -> Iterator[Group]:
        """Ways to use one pool. ``every``: any number of stages; else those that leave no device idle."""
        pool, limits = self.pools[k], self.limits
        for degree in _divisors(pool.per_node if limits.within_node else pool.count):
            if limits.degree and degree != limits.degree:
                continue
            count = pool.count // degree
            for stages in range(1, min(count, len(self.units.row)) + 1):
                if limits.stages and stages != limits.stages:
                    continue
                replicas = min(count // stages, self.batch)
                if limits.replicas:
                    replicas = limits.replicas if limits.replicas <= replicas else 0
                if replicas < 1 or (not every and stages * replicas != count):
                    continue
                yield Group(k, stages, replicas, degree)

    def _may_fit(self, degrees: Degrees, rows: tuple[Row, ...]) -> bool:
        """Whether weights and their state fit all devices together."""
        room = total = 0.0
        for group, row in zip(degrees.groups, rows, strict=True):
            counts = row.all
            held = self.pricer.state.held(
                float(row.weights @ counts),
                float(row.trained @ counts),
                group.replicas,
                degrees.zero,
            )
            room += group.stages * self.pricer.limit(self.pools[group.pool]) / held
            total = 1.0
        return room >= total


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _ties(graph: Graph, units: Units) -> tuple[tuple[int, int, float], ...]:
    """(unit, later unit, elements) of every parameter that two units take."""
    where: dict[str, list[int]] = {}
    for i, unit in enumerate(units.row):
        for name in dict.fromkeys(n for o in unit.ops for n in graph.ops[o].uses()):
            if graph.tensor(name).role == "parameter":
                where.setdefault(name, []).append(i)
    return tuple((at[0], j, float(graph.tensor(name).nbytes(1) // 4)) for name, at in where.items() for j in at[1:])
