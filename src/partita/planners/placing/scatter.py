"""Scatter: the placement with the least maximum load, contiguous or not: search, then proof or a bound.

What no placement under the load in hand can part is joined first, again whenever that load falls. What is left is
annealed; then a cover by sets of single devices gives a bound (``covering``) and sets to anneal from; what that leaves
open is solved as a mixed-integer program.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from partita.planners.placing.anneal import anneal
from partita.planners.placing.capacity import Capacity
from partita.planners.placing.covering import Covering
from partita.planners.placing.joins import joined
from partita.planners.placing.master import Column
from partita.planners.placing.problem import Kind, Net, Placed, Placement, fits, loads
from partita.planners.placing.program import solve_program
from partita.planners.problem import Infeasible

SEARCH, COVER, TURN = 0.15, 0.5, 0.2  # shares of the time: annealing, covering, covering between two annealings
TEMPERATURES = (0.3, 0.03, 0.003) * 2


def scatter(
    problem: Placement, start: Sequence[int] | None = None, *, seconds: float = 60.0, seed: int = 0
) -> Placed | Infeasible:
    """The best placement found in about so many seconds, and the bound that was proven.

    ``start``: a placement to better, such as the best contiguous one; else one is sought. Infeasible: none fits
    (proven), or none was found in time (the reason says which).
    """
    if not problem.num_units:
        return Placed((), 0.0, 0.0)
    if not problem.device_kinds:
        return Infeasible("there are no devices")
    bound = Capacity(problem).least()
    if bound == np.inf:
        return Infeasible("a unit can run on no device")
    devices = tuple(start) if start is not None else _packed(problem)
    if devices is None:
        devices, proven = solve_program(problem, None, cap=np.inf, seconds=seconds * SEARCH)
        if devices is None and proven == np.inf:
            return Infeasible("no placement fits the devices' memory")
        if devices is None:
            return Infeasible(f"no placement was found in {seconds * SEARCH:.3g} seconds")
    _compiled()
    search = _Search(problem, devices, bound, time.perf_counter(), seconds, seed)
    search.anneal()
    search.cover()
    search.program()
    return Placed(search.devices, search.best, min(search.bound, search.best))


@cache
def _compiled() -> None:
    """Has the loops compiled (or read from disk), before the clock runs."""
    tiny = Placement((Kind("", 2, np.ones(2)),), np.ones(2), (Net((0, 1), 1.0),), ())
    anneal(tiny, (0, 0), seconds=0.0)
    joined(tiny, 2.0)
    covering = Covering(tiny, 2.0, 0.0)
    covering.offer((0, 0))
    covering.run(time.perf_counter() + 0.01)


class _Search:
    """The best placement so far, ``bound`` that none is below, and what betters either within ``seconds``."""

    def __init__(
        self, problem: Placement, devices: tuple[int, ...], bound: float, began: float, seconds: float, seed: int
    ) -> None:
        self.problem, self.devices, self.bound = problem, devices, bound
        self.best = _seconds(problem, devices)
        self.join = joined(problem, self.best)
        self.began, self.seconds, self.seed = began, seconds, seed

    def better(self, found: tuple[int, ...]) -> bool:
        """Keeps a placement of the groups if it is one."""
        devices = self.join.widen(found)
        load = _seconds(self.problem, devices)
        if load >= self.best or not fits(self.problem, devices):
            return False
        self.devices, self.best = devices, load
        self.join = joined(self.problem, load)
        return True

    @property
    def closed(self) -> bool:
        return self.best <= self.bound * (1 + 1e-9)

    def anneal(self) -> None:
        for turn, hot in enumerate(TEMPERATURES):
            if self.closed:
                return
            share = self.seconds * SEARCH / len(TEMPERATURES)
            start = self.join.narrow(self.devices)
            self.better(anneal(self.join.small, start, seconds=share, seed=self.seed + turn, hot=hot))

    def cover(self) -> None:
        """Covers and anneals in turn; a better placement begins the cover anew, with the sets that were met."""
        end = self.began + self.seconds * (SEARCH + COVER)
        met: list[Column] = []
        while not self.closed and time.perf_counter() < end:
            join = self.join
            covering = Covering(join.small, self.best, self.bound)
            leaders = list(join.leaders)
            covering.offer(join.narrow(self.devices), (replace(one, units=one.units[leaders]) for one in met))
            while not covering.done and time.perf_counter() < end:
                covering.run(min(end, time.perf_counter() + TURN * self.seconds))
                self.bound = max(self.bound, covering.bound)
                packed = covering.packed()
                if self.closed or (packed is not None and self.better(self._annealed(packed))):
                    break
            else:
                return
            met = covering.sets(join.groups)

    def _annealed(self, start: tuple[int, ...]) -> tuple[int, ...]:
        return anneal(self.join.small, start, seconds=0.02 * self.seconds, seed=self.seed, hot=TEMPERATURES[1])

    def program(self) -> None:
        left = self.began + self.seconds - time.perf_counter()
        if self.closed or left <= 0:
            return
        found, proven = solve_program(self.join.small, self.join.narrow(self.devices), cap=self.best, seconds=left)
        best = self.best
        if found is not None:
            self.better(found)
        self.bound = max(self.bound, min(proven, best))


def _seconds(problem: Placement, devices: Sequence[int]) -> float:
    return float(loads(problem, devices).max())


def _packed(problem: Placement) -> tuple[int, ...] | None:
    """Large units first, each on the device with the least work among those that have room."""
    kinds = problem.device_kinds
    work, room = np.zeros(len(kinds)), np.array([kind.memory_bytes for kind in kinds])
    devices = [0] * problem.num_units
    for unit in np.argsort(-problem.nbytes, kind="stable").tolist():
        after = work + np.array([kind.seconds[unit] for kind in kinds])
        after[room < problem.nbytes[unit]] = np.inf
        device = int(after.argmin())
        if not np.isfinite(after[device]):
            return None
        work[device] = after[device]
        room[device] -= problem.nbytes[unit]
        devices[unit] = device
    return tuple(devices)
