"""Series: exact reductions of a labelling problem without memory, for graphs made of series and parallel runs.

    one neighbour     a - b            b's cheapest label for each of a's            (RI)
    two neighbours    a - b - c        an edge a - c: the least over b's labels      (RII)

The rules of Scholz and Eckstein, *Register allocation for irregular architectures* (2002), whatever the labels cost.
They reduce a chain of blocks with residual connections to little. What then remains is eliminated node by node where no
table on the way has more than ``ENTRIES`` entries (``sharding.eliminate``), which is exact as well; else it is left to
``labelling.solve``, with its bound.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from partita.planners.labelling import Edge, Labelling, Problem, solve
from partita.planners.labelling.problem import Floats, Ints
from partita.sharding.eliminate import cheapest

ENTRIES = 1 << 22
EXACT = 1 << 62  # no table is given up


@dataclass(slots=True)
class _Left:
    costs: list[Floats]
    adjacent: list[dict[int, Floats]]
    gone: list[tuple[int, tuple[int, ...], Ints]]


def solve_series(problem: Problem, *, seconds: float = 60.0) -> Labelling:
    """The cheapest labels: by elimination where the tables stay small, else ``labelling.solve`` on what is left.

    Usages and limit are not looked at. Raises PlanError where the description is inconsistent.
    """
    started = time.monotonic()
    problem.check()
    left = _reduced(problem)
    core = [v for v in range(problem.num_nodes) if left.adjacent[v]]
    labels = [-1] * problem.num_nodes
    bound = 0.0
    status = "optimal"
    if core and _widest(left, core) <= ENTRIES:
        one = {v: left.costs[v] for v in core}
        two = {(a, b): table for a in core for b, table in left.adjacent[a].items() if a < b}
        chosen, least = cheapest(one, two, limit=EXACT)
        for v, label in chosen.items():
            labels[v] = label
        bound = least
    elif core:
        place = {v: i for i, v in enumerate(core)}
        edges = tuple(Edge(place[a], place[b], table) for a in core for b, table in left.adjacent[a].items() if a < b)
        found = solve(Problem(tuple(left.costs[v] for v in core), edges), seconds=seconds)
        if not found.labels:
            return Labelling((), math.inf, found.lower_bound, found.status, time.monotonic() - started)
        for v, label in zip(core, found.labels, strict=True):
            labels[v] = label
        bound, status = found.lower_bound, found.status
    removed = {v for v, _, _ in left.gone}
    for v in range(problem.num_nodes):
        if v not in removed and not left.adjacent[v]:
            labels[v] = int(left.costs[v].argmin())
            bound += float(left.costs[v].min())
    for v, others, best in reversed(left.gone):
        labels[v] = int(best[tuple(labels[u] for u in others)])
    cost = problem.cost(labels)
    taken = time.monotonic() - started
    if math.isinf(cost):
        return Labelling((), math.inf, math.inf, "infeasible", taken)
    return Labelling(tuple(labels), cost, min(cost, bound), "optimal" if status == "optimal" else "feasible", taken)


def _reduced(problem: Problem) -> _Left:
    """What the two rules leave, once neither applies."""
    costs = [np.array(c, dtype=np.float64) for c in problem.costs]
    left = _Left(costs, [{} for _ in costs], [])
    for edge in problem.edges:
        _join(left, edge.a, edge.b, np.asarray(edge.cost, dtype=np.float64))
    queue = list(range(len(costs) - 1, -1, -1))
    while queue:
        v = queue.pop()
        near = left.adjacent[v]
        if not 1 <= len(near) <= 2:
            continue
        others = tuple(near)
        if len(others) == 1:
            total = near[others[0]].T + left.costs[v]
            left.costs[others[0]] = left.costs[others[0]] + total.min(axis=1)
            best = total.argmin(axis=1)
        else:
            a, b = others
            best, least = _least(near[a].T + left.costs[v], near[b])
        for u in others:
            del left.adjacent[u][v]
        left.adjacent[v] = {}
        left.gone.append((v, others, best))
        if len(others) == 2:
            _join(left, others[0], others[1], least)
        queue += [u for u in others if 1 <= len(left.adjacent[u]) <= 2]
    return left


def _widest(left: _Left, core: list[int]) -> int:
    """Entries of the largest table that eliminating the core takes, least first."""
    near = {v: set(left.adjacent[v]) for v in core}
    size = {v: len(left.costs[v]) for v in core}
    entries = {v: size[v] * math.prod(size[u] for u in near[v]) for v in core}
    queue = [(n, v) for v, n in entries.items()]
    heapify(queue)
    widest = 0
    while queue:
        n, v = heappop(queue)
        if entries.get(v) != n:
            continue
        widest = max(widest, n)
        del entries[v]
        others = near.pop(v)
        for u in others:
            near[u] = (near[u] | others) - {u, v}
            entries[u] = size[u] * math.prod(size[w] for w in near[u])
            heappush(queue, (entries[u], u))
    return widest


def _least(before: Floats, after: Floats) -> tuple[Ints, Floats]:
    """Over the labels between: ``least[i, j] = min over k of before[i, k] + after[k, j]``, and which k."""
    best = np.empty((len(before), after.shape[1]), dtype=np.int64)
    least = np.empty(best.shape)
    across = np.ascontiguousarray(after.T)
    for i, row in enumerate(before):
        total = across + row
        best[i] = at = total.argmin(axis=1)
        least[i] = total[np.arange(len(at)), at]
    return best, least


def _join(left: _Left, a: int, b: int, cost: Floats) -> None:
    present = left.adjacent[a].get(b)
    table = cost if present is None else present + cost
    left.adjacent[a][b], left.adjacent[b][a] = table, table.T
