"""Search: the fastest layout of a large model, best bound first.

Every combination of stages, replicas, tensor degree, microbatch, interleaving, ZeRO level and sequence division gets a
lower bound in closed form; they are priced with their true cuts and memory in the order of the bounds until the next
bound is no better than the best layout found: that one is then the best of all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import permutations, product

import numpy as np

from partita.cost.roofline import Assumptions
from partita.graph import Graph
from partita.planners.large.degrees import Degrees, Group, Layout
from partita.planners.large.layout import Pricer
from partita.planners.large.loads import Row
from partita.planners.large.marks import Marks
from partita.planners.large.prices import Pool, Prices
from partita.planners.large.tensor import Form
from partita.planners.large.units import Units

SECONDS = 5.0
MOST_SAMPLES, MIXED_SAMPLES = 256, 16
CHUNKS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
KEPT = 40
NEAR = 1.1  # layouts up to a tenth slower than the best are kept, to be told as the next best
QUICK = 1.5
PATIENCE = 4  # times the seconds are spent where nothing was found to fit yet


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user fixed; 0 leaves it to the search. ``within_node``: tensor degrees stay inside a node.

    ``stages``: in a row; ``total`` and ``most``: of the plan, with those that a device takes in turn, exactly and at
    most. ``divided``: ops are divided (a degree above 1). ``order``: '' leaves the schedule open.
    """

    degree: int = 0
    stages: int = 0
    replicas: int = 0
    samples: int = 0
    chunks: int = 0
    sequence: bool | None = None
    recompute: str = "needed"
    within_node: bool = True
    zero: int = -1
    total: int = 0
    most: int = 0
    microbatches: int = 0
    divided: bool = False
    order: str = ""

    def allows(self, stages: int) -> bool:
        """So many stages in the plan."""
        return (not self.total or stages == self.total) and (not self.most or stages <= self.most)


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
        """Of the closed forms, by which the search goes."""
        best = min((layout.closed for layout in self.layouts), default=0.0)
        return max(0.0, best / self.bound - 1.0) if self.bound else 0.0


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
        marks: Marks | None = None,
        wanted: Mapping[str, Form] | None = None,
    ) -> None:
        """``like``: a search of the same model and assumptions, whose looked-up counts serve here too. ``wanted``: how
        parameters must be divided.
        """
        self.graph, self.units, self.pools, self.batch = graph, units, pools, batch
        self.limits = limits or Limits()
        self.assume, self.optimizer, self.headroom = assume, optimizer, headroom
        self.kinds = np.array([u.kind for u in units.row])
        self.marks = marks or Marks.none(len(units.row))
        self.prices: Prices = Prices(graph, units, assume, like.prices.shapes if like else None, wanted)
        if like is not None and like._same_prices(self):
            self.prices = like.prices
        self.ties: tuple[tuple[int, int, float], ...] = like.ties if like else _ties(graph, units)
        self.pricer = Pricer(
            pools, batch, assume, optimizer=optimizer, headroom=headroom, train=train, ties=self.ties,
            marks=self.marks, microbatches=self.limits.microbatches,
        )  # fmt: skip
        self._rows: dict[tuple[int, int, bool, int, bool], Row | None] = {}

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
            marks=self.marks,
            wanted=self.prices.wanted,
        )

    def _same_prices(self, other: Search) -> bool:
        """Prices looked up here are those of the other search: they do not depend on memory, batch or counts."""

        def priced(search: Search) -> object:
            kinds = {
                (
                    p.device.kind,
                    p.device.memory_bandwidth,
                    p.per_node,
                    p.inside,
                    p.across if len(p.names) > p.per_node else None,
                )
                for p in search.pools
            }
            return kinds, search.units.row, search.prices.wanted, search.assume

        return priced(self) == priced(other)

    def row(self, pool: int, degree: int, sequence: bool, samples: int, *, stays: bool = False) -> Row | None:
        """``stays``: nothing is offloaded."""
        key = (pool, degree, sequence, samples, stays)
        if key not in self._rows:
            prices, marks = self.prices.of(self.pools[pool], degree, sequence, samples), self.marks
            bandwidth = 0.0 if stays else self.pools[pool].device.host_bandwidth * self.assume.links
            host = 1.0 / bandwidth if bandwidth else 0.0
            row = Row.of(self.kinds, prices, marks.again, marks.away, host) if prices is not None else None
            self._rows[key] = row
        return self._rows[key]

    def rows(self, degrees: Degrees) -> tuple[Row, ...] | None:
        sizes = degrees.shares or (degrees.samples,) * len(degrees.groups)
        # all is recomputed as asked; side by side a plan names what is recomputed for devices of all kinds
        stays = degrees.recompute == "all" or (bool(degrees.shares) and not self.marks.away.any())
        found = [
            self.row(g.pool, g.degree, degrees.sequence, n, stays=stays)
            for g, n in zip(degrees.groups, sizes, strict=True)
        ]
        return None if any(r is None for r in found) else tuple(r for r in found if r is not None)

    def run(self, seconds: float = SECONDS, first: Sequence[Degrees] = ()) -> Found:
        """The best layouts. ``seconds``: of this process, after which the best so far is returned with its bound.

        ``first``: degrees to price before all others, because they are likely good.
        """
        began = time.process_time()
        found = [x for x in map(self._priced, first) if x is not None]
        known = set(first)
        queue = [
            (self.pricer.quick(degrees, rows), i, False, degrees, rows)
            for i, (degrees, rows) in enumerate(self._listed())
            if degrees not in known
        ]
        listed = len(queue) + len(known)
        heapify(queue)
        best, tried, bound = min((x.seconds for x in found), default=np.inf), len(known), np.inf
        while queue:
            bound, i, exact, degrees, rows = heappop(queue)
            if bound >= best or time.process_time() - began > seconds * (1 if found else PATIENCE):
                break
            if not exact:  # memory is counted only for those whose turn comes
                least = max(bound, self.pricer.bound(degrees, rows))
                if least < np.inf:
                    heappush(queue, (least, i, True, degrees, rows))
                continue
            layout = self.pricer.price(degrees, rows, best * NEAR)
            tried += 1
            if layout is not None:
                found.append(layout)
                best = min(best, layout.seconds)
        else:
            bound = best
        found.sort(key=lambda item: item.seconds)
        why = "" if found else self._why_not(listed)
        return Found(tuple(found[:KEPT]), min(bound, best), tried, listed, why)

    def _priced(self, degrees: Degrees) -> Layout | None:
        rows = self.rows(degrees)
        return self.pricer.price(degrees, rows) if rows is not None else None

    def fits(self, seconds: float = QUICK) -> bool:
        """Whether any layout is found to fit within so many seconds of this process."""
        began = time.process_time()
        for degrees, rows in sorted(
            self._listed(), key=lambda pair: (pair[0].samples, -pair[0].zero, -_divided(pair[0]))
        ):
            if self.pricer.bound(degrees, rows) < np.inf and self.pricer.price(degrees, rows) is not None:
                return True
            if time.process_time() - began > seconds:
                break
        return False

    def _listed(self) -> Iterator[tuple[Degrees, tuple[Row, ...]]]:
        """Degrees whose weights and state fit all devices together, with the prices of the units."""
        for degrees in self._all():
            rows = self.rows(degrees)
            if rows is not None and self._may_fit(degrees, rows):
                yield degrees, rows

    def _why_not(self, listed: int) -> str:
        if listed:
            return "activations and weights of every layout exceed the devices' memory, even where nothing is kept"
        return "weights, gradients and optimizer state exceed the memory of all devices together"

    # -- what there is to try

    def _all(self) -> Iterator[Degrees]:
        limits = self.limits
        for groups in self._groups():
            replicas = max(g.replicas for g in groups)
            divided = any(g.degree > 1 for g in groups)
            stages = sum(g.stages for g in groups)
            for samples in self._samples(replicas, stages, MIXED_SAMPLES if len(groups) > 1 else MOST_SAMPLES):
                m = limits.microbatches or -(-self.batch // samples)
                if m < replicas:
                    continue
                ways = (limits.sequence,) if limits.sequence is not None else (True, False)
                for sequence in ways if divided else (False,):
                    assert sequence is not None
                    for zero in self._zero(groups, stages):
                        for order, chunks in self._orders(groups, stages, m, zero):
                            yield Degrees(groups, samples, chunks, zero, sequence, limits.recompute, order)

    def _orders(self, groups: tuple[Group, ...], stages: int, m: int, zero: int) -> Iterator[tuple[str, int]]:
        """(order where a device has one stage, stages a device takes in turn)."""
        limits = self.limits
        if limits.chunks in (0, 1) and limits.allows(stages):
            if stages == 1:
                yield "1f1b", 1
            elif limits.order != "interleaved":
                yield limits.order or "1f1b", 1
                splits = self.pricer.train and len(groups) == 1 and zero < 2 and limits.recompute != "all"
                if not limits.order and splits and not self.marks.again.any():
                    yield "zero_bubble", 1
        if limits.order in ("", "interleaved") and not self.marks.places:
            yield from (("1f1b", v) for v in self._chunks(groups, stages, m) if limits.allows(stages * v))

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
        limits = self.limits
        wanted: tuple[int, ...] = CHUNKS
        if limits.chunks or limits.total:
            wanted = (limits.chunks or limits.total // stages,)
        return tuple(v for v in wanted if v > 1 and stages * v <= len(self.units.row))

    def _samples(self, replicas: int, stages: int, largest: int) -> tuple[int, ...]:
        """Microbatches of one replica: powers of two, and all of its samples at once."""
        if self.limits.microbatches:
            return (-(-self.batch // self.limits.microbatches),) if self.limits.microbatches <= self.batch else ()
        if self.limits.samples:
            return (self.limits.samples,)
        most = max(1, self.batch // replicas)
        sizes = {1 << k for k in range(most.bit_length()) if 1 << k <= min(most, largest)}
        if stages == 1:
            sizes.add(-(-self.batch // replicas))
        return tuple(sorted(sizes))

    def _groups(self) -> Iterator[tuple[Group, ...]]:
        """Stages in a row on one pool, or on several, which then leave none of their devices idle."""
        most = min(filter(None, (self.limits.stages, self.limits.total, self.limits.most, len(self.units.row))))
        for k in range(len(self.pools)):
            for group in self._of_pool(k, most):
                if not self.limits.stages or group.stages == self.limits.stages:
                    yield (group,)
        if len(self.pools) < 2:
            return
        for count in range(2, len(self.pools) + 1):
            for order in permutations(range(len(self.pools)), count):
                used = [[g for g in self._of_pool(k, most) if self._all_of(g)] for k in order]
                for groups in product(*used):
                    stages = sum(g.stages for g in groups)
                    if stages <= most and (not self.limits.stages or stages == self.limits.stages):
                        yield tuple(groups)

    def _all_of(self, group: Group) -> bool:
        """The group uses all devices of its pool, or all that fixed replicas leave it."""
        count = self.pools[group.pool].count // group.degree
        return group.stages * group.replicas == count or bool(self.limits.replicas)

    def _of_pool(self, k: int, most: int) -> Iterator[Group]:
        """Ways to use one pool: as many replicas as there are devices for, or as were asked for."""
        pool, limits = self.pools[k], self.limits
        for degree in _divisors(pool.per_node if limits.within_node else pool.count):
            if (limits.degree and degree != limits.degree) or (limits.divided and degree == 1):
                continue
            count = pool.count // degree
            for stages in range(1, min(count, most) + 1):
                replicas = min(count // stages, self.batch)
                if limits.replicas:
                    replicas = limits.replicas if limits.replicas <= replicas else 0
                if replicas:
                    yield Group(k, stages, replicas, degree)

    def _may_fit(self, degrees: Degrees, rows: tuple[Row, ...]) -> bool:
        """Whether weights and their state fit all devices together."""
        room, loads = 0.0, self.pricer.loads
        for group, row in zip(degrees.groups, rows, strict=True):
            held = loads.state.held(row.total.weights, row.total.trained, group.replicas, degrees.zero)
            room += group.stages * loads.limit(self.pools[group.pool]) / max(held, 1.0)
        return room >= 1.0


def _divided(degrees: Degrees) -> int:
    """In how many parts weights lie."""
    return max(g.stages * g.degree for g in degrees.groups)


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
