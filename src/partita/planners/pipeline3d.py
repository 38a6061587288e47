"""Pipeline stages, each with its own tensor degree, replicas and way to run every unit, under each device's memory.

The problem and the recurrence of Tarnawski, Narayanan and Phanishayee, *Piper: Multidimensional Planner for DNN
Parallelization* (NeurIPS 2021): the slowest stage is to be fast, and a stage holds as many samples as there are
replicas from it on, for each of its own. Theirs picks the ways to run units greedily; here the choice is exact, and is
made only for stages that are fast enough to matter: the others keep a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from partita.planners.choice import Choices, cheapest
from partita.planners.ideals import downsets
from partita.planners.problem import Array, Infeasible

Bools = NDArray[np.bool_]

MAX_IDEALS = 3_000
STEP = 1.02


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run a unit on the devices of one tensor group: seconds a sample, bytes a device.

    ``flight_bytes``: for every sample in flight. ``sync``: (edge, bytes) of tensors to gather where the edge leaves the
    stage.
    """

    name: str
    seconds: float
    weight_bytes: float
    flight_bytes: float
    fixed_bytes: float
    sync: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Pipeline3D:
    """``ways``: of each unit, by tensor degree. ``edges``: (producer, consumer, bytes a sample).

    ``bandwidth``: bytes a second; ``microbatches``: a batch's, over which replicas share the reduction of gradients.
    """

    ways: tuple[Mapping[int, tuple[Way, ...]], ...]
    edges: tuple[tuple[int, int, float], ...]
    devices: int
    memory_bytes: float
    bandwidth: float
    microbatches: int


@dataclass(frozen=True, slots=True)
class Stage3D:
    """``ways``: the index of the way that each unit is run."""

    units: tuple[int, ...]
    degree: int
    replicas: int
    ways: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pipelined:
    """``seconds``: of the slowest stage, a sample. No plan is faster than ``bound``."""

    stages: tuple[Stage3D, ...]
    seconds: float
    bound: float


def choices(problem: Pipeline3D, units: tuple[int, ...], degree: int, replicas: int, flight: int) -> Choices:
    """(seconds, bytes) of every way of these units as one stage; a unit without ways at the degree has none."""
    inside = set(units)
    leaving = {i for i, (a, b, _) in enumerate(problem.edges) if (a in inside) != (b in inside)}
    carried = dict.fromkeys(units, 0.0)
    for i in leaving:
        a, b, nbytes = problem.edges[i]
        carried[a if a in inside else b] += nbytes
    reduce = 4.0 * (replicas - 1) / problem.microbatches
    found = []
    for unit in units:
        rows = []
        for way in problem.ways[unit].get(degree, ()):
            moved = 2.0 * (carried[unit] + sum(nbytes for edge, nbytes in way.sync if edge in leaving))
            seconds = (way.seconds + (moved + reduce * way.weight_bytes) / problem.bandwidth) / replicas
            rows.append((seconds, way.flight_bytes * flight + way.fixed_bytes))
        found.append(np.array(rows).reshape(-1, 2))
    return tuple(found)


def plan_seconds(problem: Pipeline3D, stages: tuple[Stage3D, ...]) -> tuple[float, float]:
    """(seconds a sample of the slowest stage, bytes of the fullest device)."""
    after = sum(stage.replicas for stage in stages)
    slowest = fullest = 0.0
    for stage in stages:
        rows = choices(problem, stage.units, stage.degree, stage.replicas, -(-after // stage.replicas))
        picked = np.array([row[way] for row, way in zip(rows, stage.ways, strict=True)]).reshape(-1, 2).sum(axis=0)
        slowest, fullest = max(slowest, float(picked[0])), max(fullest, float(picked[1]))
        after -= stage.replicas
    return slowest, fullest


def pipeline3d(problem: Pipeline3D, *, limit: int = MAX_IDEALS) -> Pipelined | Infeasible:
    """The plan whose slowest stage is fastest: optimal, or Infeasible where no plan fits (or the graph has over
    ``limit`` ideals, and the reason says so).
    """
    before = [0] * len(problem.ways)
    for a, b, _ in problem.edges:
        before[b] |= 1 << a
    masks = downsets(before, limit)
    if masks is None:
        return Infeasible(f"the graph has over {limit} ideals: join units that belong together")
    search = _Search(problem, masks)
    while True:
        seconds, path = search.run()
        if not path:
            return Infeasible("no pipeline fits the devices' memory")
        if not search.settle(seconds, path):
            stages = tuple(search.stage(key, a, b) for key, a, b in path)
            exact = plan_seconds(problem, stages)[0]
            return Pipelined(stages, exact, exact)


@dataclass(slots=True, eq=False)
class _Table:
    """Per stage (from ideal, to ideal): ``seconds``, a lower bound where ``open``; there, ``upper`` is a bound too."""

    seconds: Array
    open: Bools
    upper: Array


Key = tuple[int, int, int]
Step = tuple[Key, int, int]


class _Search:
    def __init__(self, problem: Pipeline3D, masks: list[int]) -> None:
        self.problem = problem
        n = len(problem.ways)
        self.member = np.array([[mask >> unit & 1 for unit in range(n)] for mask in masks], dtype=np.bool_)
        self.member = self.member.reshape(len(masks), n)
        outside = (~self.member).astype(np.float32) @ self.member.T.astype(np.float32)
        self.inside: Bools = outside.T == 0
        np.fill_diagonal(self.inside, False)
        self.degrees = sorted({degree for ways in problem.ways for degree in ways if ways[degree]})
        self.tables: dict[Key, _Table] = {}
        self.bases = {degree: self._base(degree) for degree in self.degrees if degree <= problem.devices}

    def _base(self, degree: int) -> tuple[Array, Bools]:
        """Per stage: least bytes moved; whether all ways of its units move as many."""
        shape = self.inside.shape
        moved, alike = np.zeros(shape), np.ones(shape, dtype=np.bool_)
        for edge, (a, b, nbytes) in enumerate(self.problem.edges):
            ends = [~self.member[:, unit][:, None] & self.member[:, unit][None, :] for unit in (a, b)]
            for unit, leaves in ((a, ends[0] & ~ends[1]), (b, ends[1] & ~ends[0])):
                ways = self.problem.ways[unit].get(degree, ())
                sync = [sum(more for e, more in way.sync if e == edge) for way in ways] or [0.0]
                moved += leaves * 2.0 * (nbytes + min(sync))
                if min(sync) < max(sync):
                    alike &= ~leaves
        return moved, alike

    def _table(self, key: Key) -> _Table:
        """A bound on every stage: each unit's least time, which is exact where the fastest ways fit and move as much as
        any; none where even the leanest ways do not fit.
        """
        if key not in self.tables:
            self.tables[key] = self._bounded(key)
        return self.tables[key]

    def _bounded(self, key: Key) -> _Table:
        degree, replicas, flight = key
        problem = self.problem
        moved, alike = self.bases[degree]
        reduce = 4.0 * (replicas - 1) / problem.microbatches / problem.bandwidth
        limit = problem.memory_bytes * (1 + 1e-12)
        rows = np.zeros((len(problem.ways), 5))
        for unit, offered in enumerate(problem.ways):
            each = [
                (way.seconds + reduce * way.weight_bytes, way.flight_bytes * flight + way.fixed_bytes)
                for way in offered.get(degree, ())
            ]
            if each:
                rows[unit, :4] = (*min(each), *min(each, key=lambda row: (row[1], row[0])))
            else:
                rows[unit, 4] = 1.0
        reach = self.member @ rows
        least, fast, most, lean, missing = (reach[None, :, i] - reach[:, None, i] for i in range(5))
        ok = self.inside & (lean <= limit) & (missing == 0)
        lower, upper = ((seconds + moved / problem.bandwidth) / replicas for seconds in (least, most))
        open_ = ok & ~(alike & (fast <= limit))
        return _Table(np.where(ok, lower, np.inf), open_, np.where(alike, upper, np.inf))

    def _moves(self, devices: int, replicas: int) -> list[tuple[Key, tuple[int, int]]]:
        """First stages of a pipeline's rest that uses so many devices and replicas; what is left behind them."""
        found = []
        for degree, mine in product(self.bases, range(1, replicas + 1)):
            rest = (devices - degree * mine, replicas - mine)
            if rest[0] >= rest[1] and self.problem.microbatches % mine == 0:
                found.append(((degree, mine, -(-replicas // mine)), rest))
        return found

    def run(self) -> tuple[float, list[Step]]:
        """The least maximum by what the tables say, and its stages."""
        problem = self.problem
        nothing = np.full(len(self.member), np.inf)
        nothing[-1] = 0.0
        values: dict[tuple[int, int], Array] = {(0, 0): nothing}
        for devices in range(1, problem.devices + 1):
            for replicas in range(1, min(devices, problem.microbatches) + 1):
                best = np.full(len(self.member), np.inf)
                for key, rest in self._moves(devices, replicas):
                    if rest in values:
                        slowest = np.maximum(self._table(key).seconds, values[rest][None, :])
                        np.minimum(best, slowest.min(axis=1), out=best)
                if np.isfinite(best).any():
                    values[devices, replicas] = best
        state = min(values, key=lambda s: (values[s][0], s))
        least = float(values[state][0])
        if not np.isfinite(least):
            return np.inf, []
        path: list[Step] = []
        at = 0
        while at != len(self.member) - 1:
            for key, rest in self._moves(*state):
                if rest in values:
                    slowest = np.maximum(self._table(key).seconds[at], values[rest])
                    to = int(slowest.argmin())
                    if slowest[to] <= values[state][at]:
                        path.append((key, at, to))
                        at, state = to, rest
                        break
        return least, path

    def settle(self, seconds: float, path: list[Step]) -> bool:
        """Whether a stage on the path may be slower than ``seconds``; then all that may or may not get their time."""
        if not any(self.tables[key].open[a, b] and self.tables[key].upper[a, b] > seconds for key, a, b in path):
            return False
        for key, table in self.tables.items():
            for a, b in np.argwhere(table.open & (table.seconds <= seconds * STEP) & (table.upper > seconds)):
                rows = choices(self.problem, self._units(a, b), *key)
                found = cheapest(rows, self.problem.memory_bytes * (1 + 1e-12))
                table.open[a, b] = False
                table.seconds[a, b] = np.inf if found is None else found[0]
        return True

    def _units(self, a: int, b: int) -> tuple[int, ...]:
        return tuple(int(u) for u in np.nonzero(self.member[b] & ~self.member[a])[0])

    def stage(self, key: Key, a: int, b: int) -> Stage3D:
        units = self._units(a, b)
        found = cheapest(choices(self.problem, units, *key), self.problem.memory_bytes * (1 + 1e-12))
        assert found is not None
        return Stage3D(units, key[0], key[1], found[1])
