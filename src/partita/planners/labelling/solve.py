"""The labelling solver: exact reductions, then an exact program on a small core, bounds and search on a large one."""

from __future__ import annotations

import math
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np

from partita.planners.labelling.contract import Contraction, Core
from partita.planners.labelling.dominance import COMPARISONS, fitting, undominated
from partita.planners.labelling.exact import solve_exactly
from partita.planners.labelling.flat import Flat, flatten
from partita.planners.labelling.moments import memory_of
from partita.planners.labelling.moves import eliminate_all
from partita.planners.labelling.problem import Labelling, Problem
from partita.planners.labelling.record import Record
from partita.planners.labelling.search import first_answers, raise_bounds, search

EXACT_PAIRS = 200_000  # label pairs on edges up to which the core goes to the mixed-integer solver as well
BOUND_SHARE = 0.5  # of the time of one thread, for bounds
SHRINKS = 0.98  # of the label pairs are left by a round of reductions that is followed by another
START_SHARE = 0.03  # of the time of the other, before it descends
GRACE = 0.2  # seconds after the end for what is under way, before the answer is given without it


def solve(problem: Problem, *, seconds: float = 60.0, seed: int = 0) -> Labelling:
    """The cheapest labels found in ``seconds`` on two threads, with a lower bound; sooner where proven optimal.

    The time is kept on busy machines as well, but for the reductions (a second or two for 65,000 nodes), before which
    there is no answer, and the loops' compilation in the first call ever. A thread may outlive the call by seconds: it
    is in a step that cannot be interrupted, and what it finds is dropped.

    Raises PlanError where the description is inconsistent. Equal seeds give equal answers only where time does not
    decide, which is where the answer is proven optimal and unique.
    """
    started = time.monotonic()
    problem.check()
    reduced = reduce(problem)
    if reduced is None:
        return _none(started)
    core, flat = reduced
    record = Record(flat, seconds - (time.monotonic() - started), _whole(problem))
    record.raise_bound(_trivial_bound(flat))
    if core.nodes:
        _run(flat, record, seed)
    else:
        record.offer(np.zeros(0, dtype=np.int64))
    return _answer(problem, core, record, started)


def reduce(problem: Problem) -> tuple[Core, Flat] | None:
    """The core once no rule applies to it, and its arrays; None where nothing can be chosen or fit."""
    graph = Contraction(problem)
    if not graph.run():
        return None
    pairs = -1
    while True:
        core = graph.core()
        memory = memory_of(problem, core)
        if (memory.room < 0).any():
            return None
        flat = flatten(core, memory)
        if not core.nodes or (pairs >= 0 and len(flat.matrix) >= SHRINKS * pairs):
            return core, flat
        pairs = len(flat.matrix)
        graph.release(v for v, spans in zip(core.nodes, memory.spans, strict=True) if not len(spans.begin))
        stays = fitting(flat) & undominated(flat, COMPARISONS)
        if not graph.drop(core, np.split(stays, flat.label_at[1:-1])) or not graph.run():
            return None


def _run(flat: Flat, record: Record, seed: int) -> None:
    streams = np.random.default_rng(seed).spawn(3)
    first_answers(flat, record, streams[2])
    eliminate_all(flat, record, streams[2])
    if record.stopped:
        return
    small = int((flat.matrix < flat.forbidden).sum()) <= EXACT_PAIRS

    def first() -> None:
        if small:
            solve_exactly(flat, record)
        else:
            raise_bounds(flat, record, (1 - BOUND_SHARE) * record.seconds_left)
        search(flat, record, streams[0])

    def second() -> None:
        share = BOUND_SHARE if small else START_SHARE
        raise_bounds(flat, record, (1 - share) * record.seconds_left)
        search(flat, record, streams[1])

    # Not joined: a step of the mixed-integer solver in which it sees no clock may last for seconds more.
    pool = ThreadPoolExecutor(2)
    done, _ = wait([pool.submit(first), pool.submit(second)], record.seconds_left + GRACE, FIRST_EXCEPTION)
    pool.shutdown(wait=False)
    record.close()
    for one in done:
        one.result()


def _trivial_bound(flat: Flat) -> float:
    """Each node's cheapest label and each edge's cheapest pair."""
    if not len(flat.label_at) > 1:
        return 0.0
    nodes = float(np.minimum.reduceat(flat.cost, flat.label_at[:-1]).sum())
    return nodes + (float(np.minimum.reduceat(flat.matrix, flat.matrix_at[:-1]).sum()) if len(flat.edge_a) else 0.0)


def _whole(problem: Problem) -> bool:
    """Every cost is a whole number or infinite."""
    arrays = [*problem.costs, *(edge.cost for edge in problem.edges)]
    return all(bool((np.floor(x) == x).all()) for x in arrays)


def _none(started: float) -> Labelling:
    return Labelling((), math.inf, math.inf, "infeasible", time.monotonic() - started)


def _answer(problem: Problem, core: Core, record: Record, started: float) -> Labelling:
    if record.labels is None:
        if record.infeasible:
            return _none(started)
        bound = record.bound + core.constant
        return Labelling((), math.inf, bound, "unknown", time.monotonic() - started)
    labels = core.expand([int(x) for x in record.labels])
    cost = problem.cost(labels)
    bound = min(cost, record.bound + core.constant)
    return Labelling(labels, cost, bound, "optimal" if record.closed else "feasible", time.monotonic() - started)
