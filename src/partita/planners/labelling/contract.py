"""Exact reductions: nodes whose label follows from a neighbour's are absorbed, labels that cannot stand are dropped.

Four rules, to a fixed point. *Arc consistency*: a label that some neighbour forbids under each of its own labels goes
(Mackworth, *Consistency in networks of relations*, 1977). *Functions*: where each label of ``a`` leaves one possible
label of ``b``, ``b`` is absorbed by ``a`` with its costs, edges and usage. *Leaves*: a node with one neighbour is
absorbed where, for each label of that neighbour, one of its labels is at once the cheapest and the smallest (rule RI of
Scholz and Eckstein, *Register allocation for irregular architectures*, 2002, where memory permits it). *Bridges*: a
node without memory between two neighbours becomes an edge between those (their rule RII), where that holds no more
label pairs than the two it replaces. In graphs of models most operations follow their operand, so that a graph of
35,000 nodes can shrink to some hundreds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from partita.planners.labelling.problem import Floats, Ints, Problem


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """What is left of a problem: ``nodes`` (their numbers in the problem) with the ``labels`` they still may take and
    the ``costs`` of those, and ``edges`` by positions in ``nodes``. ``absorbed`` says, in the order they went, which
    node took which label for each label of its absorber, or each pair of labels of its two; which label a node absorbed
    by two takes never matters to memory. ``settled`` nodes have a label for good, at ``constant``.
    """

    nodes: tuple[int, ...]
    labels: tuple[Ints, ...]
    costs: tuple[Floats, ...]
    edges: tuple[tuple[int, int, Floats], ...]
    absorbed: tuple[tuple[int, tuple[int, ...], Ints], ...]
    settled: tuple[tuple[int, int], ...] = ()
    constant: float = 0.0

    def expand(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """The whole problem's labels from a position in ``labels`` per core node."""
        label = {node: int(own[at]) for node, own, at in zip(self.nodes, self.labels, chosen, strict=True)}
        label.update(self.settled)
        for node, absorbers, follows in reversed(self.absorbed):
            label[node] = int(follows[tuple(label[v] for v in absorbers)])
        return tuple(label[v] for v in range(len(label)))

    def followers(self) -> dict[int, tuple[int, Ints]]:
        """Per node of the problem: its core node's position and its own label for each label of that; position -1
        for those whose usage is settled, with one label.
        """
        found = {node: (i, own) for i, (node, own) in enumerate(zip(self.nodes, self.labels, strict=True))}
        found |= {node: (-1, np.array([label])) for node, label in self.settled}
        for node, absorbers, follows in reversed(self.absorbed):
            if len(absorbers) == 1:
                position, label = found[absorbers[0]]
                found[node] = (position, follows[label])
            else:
                found[node] = (-1, np.array([follows.max()]))  # possible: where no label is, it says 0
        return found


def contract(problem: Problem) -> Core | None:
    """The core of ``problem``: same optimum, same feasible answers up to dominated ones. None where a node has no
    possible label left, which proves that there is no answer.
    """
    graph = Contraction(problem)
    return graph.core() if graph.run() else None


class Contraction:
    """The graph while it shrinks. ``labels[v]`` are v's surviving labels by their first numbers."""

    def __init__(self, problem: Problem) -> None:
        n = problem.num_nodes
        self.sizes = [len(cost) for cost in problem.costs]
        self.labels: list[Ints] = [np.arange(size) for size in self.sizes]
        self.costs = [np.array(cost, dtype=np.float64) for cost in problem.costs]
        self.adjacent: list[dict[int, Floats]] = [{} for _ in range(n)]
        self.alive = [True] * n
        self.absorbed: list[tuple[int, tuple[int, ...], Ints]] = []
        self.settled: list[tuple[int, int]] = []
        self.constant = 0.0
        timed = problem.usages and np.isfinite(problem.limit)
        self.usages: list[Floats | None] = [
            np.asarray(problem.usages[v], dtype=np.float64)
            if timed and problem.intervals[v][1] > problem.intervals[v][0] and np.ptp(problem.usages[v]) > 0
            else None
            for v in range(n)
        ]
        self.alone = [True] * n  # no absorbed node's usage varies with this one's label
        for edge in problem.edges:
            self._join(edge.a, edge.b, np.asarray(edge.cost, dtype=np.float64))
        self.queue = deque((a, b) for a in range(n) for b in self.adjacent[a])

    def _join(self, a: int, b: int, cost: Floats) -> None:
        present = self.adjacent[a].get(b)
        cost = cost if present is None else present + cost
        self.adjacent[a][b] = cost
        self.adjacent[b][a] = cost.T

    def drop(self, core: Core, kept: Sequence[np.ndarray]) -> bool:
        """Of the nodes of ``core`` (this graph's own) only the labels marked stay; False where a node has none left.
        ``run`` then goes on from there.
        """
        possible = [self._keep(v, marked) for v, marked in zip(core.nodes, kept, strict=True)]
        return all(possible)

    def release(self, nodes: Iterable[int]) -> None:
        """The usage of these nodes and of all that they absorbed exceeds no limit whatever their labels."""
        for v in nodes:
            self.usages[v], self.alone[v] = None, True
            self.queue += ((other, v) for other in self.adjacent[v])

    def run(self) -> bool:
        """Apply the rules until none does; False where a node has no possible label left."""
        for v in range(len(self.costs)):
            if not self._keep(v, np.isfinite(self.costs[v])):
                return False
        while self.queue:
            a, b = self.queue.popleft()
            if self.alive[a] and b in self.adjacent[a] and not self._visit(a, b):
                return False
        for v, alive in enumerate(self.alive):
            if alive and not self.adjacent[v] and self.alone[v]:
                self._settle(v)
        return True

    def _settle(self, v: int) -> None:
        """A node without neighbours keeps the labels that no other beats in cost and usage; an one is settled."""
        usage = self.usages[v]
        own = np.zeros(len(self.costs[v])) if usage is None else usage[self.labels[v]]
        order = np.lexsort((own, self.costs[v]))
        least = np.minimum.accumulate(own[order])
        first = np.ones(len(order), dtype=bool)
        first[1:] = least[1:] < least[:-1]
        kept = np.zeros(len(order), dtype=bool)
        kept[order[first]] = True
        self._keep(v, kept)
        if len(self.costs[v]) == 1:
            self.alive[v] = False
            self.settled.append((v, int(self.labels[v][0])))
            self.constant += float(self.costs[v][0])

    def _keep(self, v: int, kept: np.ndarray) -> bool:
        """Only the labels of ``v`` marked stay; False where none does."""
        if kept.all():
            return True
        self.labels[v], self.costs[v] = self.labels[v][kept], self.costs[v][kept]
        for other, cost in list(self.adjacent[v].items()):
            smaller = cost[kept]
            self.adjacent[v][other], self.adjacent[other][v] = smaller, smaller.T
            self.queue += ((v, other), (other, v))
        return len(self.costs[v]) > 0

    def _visit(self, a: int, b: int) -> bool:
        cost = self.adjacent[a][b]
        finite = np.isfinite(cost)
        possible = finite.sum(axis=1)
        if not possible.all():
            return self._keep(a, possible > 0)
        if possible.max() == 1:
            self._absorb(a, b, finite.argmax(axis=1))
        elif len(self.adjacent[b]) == 1 and self.alone[b]:
            total = cost + self.costs[b]
            cheapest = total.argmin(axis=1)
            usage = self.usages[b]
            if usage is not None:
                own = usage[self.labels[b]]
                smallest = np.where(finite, own, np.inf).min(axis=1)
                total = np.where(own[None, :] <= smallest[:, None], total, np.inf)
                dominating = total.argmin(axis=1)
                rows = np.arange(len(total))
                if (total[rows, dominating] > (cost + self.costs[b])[rows, cheapest]).any():
                    return True
                cheapest = dominating
            self._absorb(a, b, cheapest)
        elif len(self.adjacent[b]) == 2 and self.alone[b] and self.usages[b] is None:
            self._bridge(b)
        return True

    def _bridge(self, b: int) -> None:
        """``b`` leaves to an edge between its two neighbours, unless that edge would be larger than its own two."""
        (a, to_a), (c, to_c) = self.adjacent[b].items()
        own, first, second = self.costs[b], to_a.shape[1], to_c.shape[1]
        if c not in self.adjacent[a] and first * second > len(own) * (first + second):
            return
        cost, follows = np.full((first, second), np.inf), np.zeros((first, second), dtype=np.int64)
        for x, label in enumerate(self.labels[b]):
            through = to_a[x][:, None] + (own[x] + to_c[x])[None, :]
            better = through < cost
            cost[better], follows[better] = through[better], label
        whole = np.zeros((self.sizes[a], self.sizes[c]), dtype=np.int64)
        whole[np.ix_(self.labels[a], self.labels[c])] = follows
        self.absorbed.append((b, (a, c), whole))
        self.alive[b] = False
        self.adjacent[b] = {}
        del self.adjacent[a][b], self.adjacent[c][b]
        self._join(a, c, cost)
        self.queue += ((a, c), (c, a))

    def _absorb(self, a: int, b: int, follows: Ints) -> None:
        """``b`` leaves: it takes its label ``follows[label]`` (positions) under each label of ``a``."""
        between = self.adjacent[a].pop(b)
        del self.adjacent[b][a]
        self.costs[a] = self.costs[a] + self.costs[b][follows] + between[np.arange(len(follows)), follows]
        whole = np.zeros(self.sizes[a], dtype=np.int64)
        whole[self.labels[a]] = self.labels[b][follows]
        self.absorbed.append((b, (a,), whole))
        self.alive[b] = False
        if self.usages[b] is not None or not self.alone[b]:
            self.alone[a] = False
        for other, cost in self.adjacent[b].items():
            del self.adjacent[other][b]
            self._join(a, other, cost[follows])
            self.queue += ((a, other), (other, a))
        self.adjacent[b] = {}
        if len(self.adjacent[a]) <= 2:
            self.queue += ((other, a) for other in self.adjacent[a])

    def core(self) -> Core:
        nodes = tuple(v for v, alive in enumerate(self.alive) if alive)
        position = {v: i for i, v in enumerate(nodes)}
        edges = tuple(
            (position[a], position[b], np.ascontiguousarray(cost))
            for a in nodes
            for b, cost in self.adjacent[a].items()
            if a < b
        )
        return Core(
            nodes=nodes,
            labels=tuple(self.labels[v] for v in nodes),
            costs=tuple(self.costs[v] for v in nodes),
            edges=edges,
            absorbed=tuple(self.absorbed),
            settled=tuple(self.settled),
            constant=self.constant,
        )
