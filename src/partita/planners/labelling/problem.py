"""The labelling problem: a label per node of a graph, cheapest by node and edge costs, under memory over time.

Choosing a sharding for every operation of a model is this problem (Zheng et al., *Alpa*, OSDI 2022, section 4; Google's
contest on intra-operator parallelism, ASPLOS 2025, whose statement is used here word for word: a node's usage counts
while the node lives, and at no moment may the sum exceed the limit). Without the limit it is the minimisation of a
pairwise energy, a weighted constraint network of binary functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from partita.errors import PlanError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """What two nodes' labels cost together: ``cost[label of a, label of b]``; ``inf`` forbids the pair."""

    a: int
    b: int
    cost: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Nodes 0, 1, … with a cost and a memory usage per label; edges; and when each node's usage counts.

    ``costs[v]`` and ``usages[v]`` have one entry per label of ``v`` (usages in the unit of ``limit``, not negative);
    ``usages[v]`` counts at the integer moments ``intervals[v][0] <= t < intervals[v][1]``. Edges between the same two
    nodes add up. Whole numbers (bytes) are summed exactly below 2**53; with fractional usages the limit holds up to
    rounding.
    """

    costs: tuple[Floats, ...]
    edges: tuple[Edge, ...] = ()
    usages: tuple[Floats, ...] = ()
    intervals: tuple[tuple[int, int], ...] = ()
    limit: float = math.inf

    @property
    def num_nodes(self) -> int:
        return len(self.costs)

    def check(self) -> None:
        """Every inconsistency of the description at once, as a PlanError."""
        wrong: list[str] = []
        n = self.num_nodes
        for v, cost in enumerate(self.costs):
            if cost.ndim != 1 or not len(cost):
                wrong.append(f"node {v}: costs of shape {cost.shape}, needs one dim with an entry per label")
            elif np.isnan(cost).any() or (cost == -math.inf).any():
                wrong.append(f"node {v}: a cost is not a number above -inf")
        if self.usages or self.intervals:
            if not len(self.usages) == len(self.intervals) == n:
                wrong.append(f"{len(self.usages)} usages and {len(self.intervals)} intervals for {n} nodes")
            for v, (cost, usage) in enumerate(zip(self.costs, self.usages, strict=False)):
                if usage.shape != cost.shape:
                    wrong.append(f"node {v}: {usage.shape} usages for {cost.shape} costs")
                elif not (usage >= 0).all() or np.isinf(usage).any():
                    wrong.append(f"node {v}: a usage is negative or not finite")
        for k, edge in enumerate(self.edges):
            if not (0 <= edge.a < n and 0 <= edge.b < n) or edge.a == edge.b:
                wrong.append(f"edge {k}: joins {edge.a} and {edge.b}; needs two different nodes below {n}")
            elif edge.cost.shape != (len(self.costs[edge.a]), len(self.costs[edge.b])):
                wrong.append(f"edge {k}: costs of shape {edge.cost.shape} between nodes {edge.a} and {edge.b}")
            elif np.isnan(edge.cost).any() or (edge.cost == -math.inf).any():
                wrong.append(f"edge {k}: a cost is not a number above -inf")
        if math.isnan(self.limit):
            wrong.append("the limit is not a number")
        if wrong:
            shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            raise PlanError(f"not a labelling problem: {shown}. Give each node, edge and usage the shape named.")

    def cost(self, labels: Sequence[int]) -> float:
        """Sum of the node and edge costs of ``labels`` (``inf`` where a forbidden pair is chosen)."""
        total = math.fsum(float(cost[label]) for cost, label in zip(self.costs, labels, strict=True))
        return total + math.fsum(float(edge.cost[labels[edge.a], labels[edge.b]]) for edge in self.edges)

    def peak(self, labels: Sequence[int]) -> float:
        """The largest sum of usages at any moment."""
        change: dict[int, float] = {}
        for usage, (begin, end), label in zip(self.usages, self.intervals, labels, strict=False):
            if end > begin:
                change[begin] = change.get(begin, 0.0) + float(usage[label])
                change[end] = change.get(end, 0.0) - float(usage[label])
        moments = sorted(change)
        return float(np.cumsum([change[t] for t in moments]).max(initial=0.0))

    def fits(self, labels: Sequence[int]) -> bool:
        """No forbidden pair, and no moment above the limit."""
        return math.isfinite(self.cost(labels)) and self.peak(labels) <= self.limit


@dataclass(frozen=True, slots=True)
class Labelling:
    """An answer: a label per node, its cost, and a proven lower bound on the cost of any.

    ``status``: "optimal" (cost equals the bound, up to one part in 10**9), "feasible", "infeasible" (proven; ``bound``
    is ``inf``) or "unknown" (nothing found in the time given, nothing proven). ``labels`` is empty without an answer.
    """

    labels: tuple[int, ...]
    cost: float
    lower_bound: float
    status: Status
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """How far above the optimum the cost can be, as a fraction of the bound's size."""
        if self.cost <= self.lower_bound:
            return 0.0
        return (self.cost - self.lower_bound) / abs(self.lower_bound) if self.lower_bound else math.inf
