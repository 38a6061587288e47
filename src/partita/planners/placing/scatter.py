"""Scatter: the placement with the least maximum load, contiguous or not: search, then proof or a bound.

What no placement under the load in hand can part is joined first, again whenever that load falls. What is left is
annealed and then solved as a mixed-integer program, which also gives the bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from partita.planners.placing.anneal import anneal
from partita.planners.placing.capacity import Capacity
from partita.planners.placing.joins import joined
from partita.planners.placing.problem import Placed, Placement, loads
from partita.planners.placing.program import solve_program
from partita.planners.problem import Infeasible

SEARCH = 0.3
TEMPERATURES = (0.3, 0.01, 0.001)


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
    best = _seconds(problem, devices)
    began, best = time.perf_counter(), _seconds(problem, devices)
    for hot in TEMPERATURES:
        if best <= bound:
            break
        join = joined(problem, best)
        share = seconds * SEARCH / len(TEMPERATURES)
        found = join.widen(anneal(join.small, join.narrow(devices), seconds=share, seed=seed, hot=hot))
        if _seconds(problem, found) < best:
            devices, best = found, _seconds(problem, found)
    if best > bound:
        join = joined(problem, best)
        left = seconds - (time.perf_counter() - began)
        better, proven = solve_program(join.small, join.narrow(devices), cap=best, seconds=left)
        bound = max(bound, min(proven, best))
        if better is not None and _seconds(problem, join.widen(better)) < best:
            devices = join.widen(better)
            best = _seconds(problem, devices)
    return Placed(devices, best, min(bound, best))


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
