"""AutoParallel's own integer program read as a labelling problem, and labels judged by that program's constraints.

Its variables are (node, argument, strategy, strategy of the argument's producer), one chosen per node and argument. So
a node's label is its strategy, work is a node's cost, and an argument's message and transition are the cost of the edge
from its producer. Nodes of repeated blocks that it ties are one node here, counted as often. Nothing is priced anew:
costs are those of its variables, and ``judge`` puts an answer into its variables and asks its constraints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from partita.planners.labelling import Edge, Problem


@dataclass(frozen=True, slots=True)
class Read:
    """``nodes``: its number of each of our nodes. ``source``: of (its node, argument), whose label the argument has."""

    problem: Problem
    nodes: tuple[int, ...]
    source: dict[tuple[int, int], int]


def read(optimizer: Any) -> Read:
    """The labelling problem of a ``ShardingOptimizer``."""
    root = {linked[0]: own[0] for linked, own in optimizer.cluster_links.items()}
    times: dict[int, int] = defaultdict(lambda: 1)
    for own in root.values():
        times[own] += 1
    nodes = [i for i, node in enumerate(optimizer.nodes) if node.op != "output" and i not in root]
    place = {i: k for k, i in enumerate(nodes)}
    labels = {i: len(optimizer.strats[optimizer.nodes[i]].strategies) for i in nodes}
    source, alike = _sources(optimizer, root, place)
    cost = {i: np.zeros(labels[i]) for i in nodes}
    edges: dict[tuple[int, int], Any] = {}
    by_argument: dict[tuple[int, int], list[tuple[int, int, float]]] = defaultdict(list)
    shut = _shut(optimizer)
    for key, var in optimizer.decision_vars.items():
        node, argument, out, given = key
        price = math.inf if key in shut else var.cost * times[node]
        by_argument[node, argument].append((out, given, price))
    for (node, argument), entries in by_argument.items():
        table = np.full((labels[node], 1 + max(given for _, given, _ in entries)), np.inf)
        for out, given, price in entries:
            table[out, given] = price
        origin = source.get((node, argument))
        if origin is None:
            cost[node] = cost[node] + table.min(axis=1)
        elif origin == node:
            cost[node] = cost[node] + np.diagonal(table)
        else:
            edges[origin, node] = edges.get((origin, node), 0.0) + table.T
    for a, b in alike:
        edges[a, b] = edges.get((a, b), 0.0) + _same(labels[a], labels[b], ((k, k) for k in range(labels[a])))
    for a, b, pairs in _pairs(optimizer, root):
        if a == b:
            cost[a] = cost[a] + np.diagonal(_same(labels[a], labels[a], pairs))
        else:
            edges[a, b] = edges.get((a, b), 0.0) + _same(labels[a], labels[b], pairs)
    found = tuple(Edge(place[a], place[b], np.asarray(table)) for (a, b), table in edges.items())
    return Read(Problem(tuple(cost[i] for i in nodes), found), tuple(nodes), source)


def spent(optimizer: Any) -> dict[tuple[str, str], float]:
    """Its objective at the values of its variables: by what for (work, messages, transitions) and kind of node."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for key, chosen in optimizer.decision_vars.items():
        value = float(chosen.var.varValue or 0.0) * (1 + len(optimizer._root_to_linked.get(key, [])))
        if value:
            node = optimizer.nodes[key[0]]
            kind = str(getattr(node.target, "__name__", node.op)) if node.op == "call_function" else node.op
            found["work", kind] += value * chosen.compute_cost
            found["messages", kind] += value * chosen.comm_cost
            found["transitions", kind] += value * chosen.sharding_transition_cost
    return dict(found)


def _sources(
    optimizer: Any, root: dict[int, int], place: dict[int, int]
) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """The producer of each argument, and producers that its constraints make equal. Where a node uses a tensor twice,
    only the first use is bound to the producer, as in its program.
    """
    source: dict[tuple[int, int], int] = {}
    alike: set[tuple[int, int]] = set()
    for number, node in enumerate(optimizer.nodes):
        if node.op == "output":
            continue
        own = root.get(number, number)
        seen: set[Any] = set()
        for argument, producer in enumerate(optimizer._all_input_nodes(node)):
            if producer in seen:
                continue
            seen.add(producer)
            origin = optimizer.node_map[producer]
            if number in root and origin in root:
                continue
            origin = root.get(origin, origin)
            first = source.setdefault((own, argument), origin)
            if first != origin:
                alike.add((min(first, origin), max(first, origin)))
    return source, alike


def _shut(optimizer: Any) -> set[tuple[int, int, int, int]]:
    """Variables that a constraint holds at zero."""
    key_of = {var.name: key for key, var in optimizer.pulp_variables.items()}
    found = set()
    for constraint in optimizer.prob.constraints.values():
        if constraint.sense == 0 and constraint.constant == 0 and all(c > 0 for c in constraint.values()):
            found.update(key_of[var.name] for var in constraint)
    return found


def _pairs(optimizer: Any, root: dict[int, int]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Nodes whose placements must agree (a weight and its gradient), with the labels that correspond."""
    key_of = {var.name: key for key, var in optimizer.pulp_variables.items()}
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for name, constraint in optimizer.prob.constraints.items():
        if name.startswith("grad_") and "_constraint" in name and "_disable" not in name:
            sides: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
            for var, sign in constraint.items():
                node, _, out, _ = key_of[var.name]
                sides[sign > 0].add((node, out))
            if not sides[True] or not sides[False]:
                continue
            ((b, out_b),), ((a, out_a),) = sides[True], sides[False]
            found[a, b].append((out_a, out_b))
    return [(a, b, pairs) for (a, b), pairs in found.items()]


def _same(rows: int, columns: int, pairs: Any) -> Any:
    """Zero where both or neither of each pair is chosen, infinite elsewhere."""
    table = np.zeros((rows, columns))
    for i, j in pairs:
        row, column = table[i].copy(), table[:, j].copy()
        table[i], table[:, j] = np.inf, np.inf
        table[i, j] = min(row[j], column[i])
    return table


def judge(optimizer: Any, read_as: Read, labels: tuple[int, ...]) -> float:
    """Its own objective with our labels in its variables; infinite where one of its constraints does not hold."""
    import pulp

    label = dict(zip(read_as.nodes, labels, strict=True))
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for (node, argument, out, given), var in optimizer.decision_vars.items():
        if (node, argument) not in read_as.source and out == label[node]:
            best[node, argument] = min(best.get((node, argument), (math.inf, 0)), (var.cost, given))
    for (node, argument, out, given), var in optimizer.pulp_variables.items():
        origin = read_as.source.get((node, argument))
        wanted = best[node, argument][1] if origin is None else label[origin]
        var.varValue = 1.0 if out == label[node] and given == wanted else 0.0
    optimizer._set_objective()
    if not all(c.valid(1e-6) for c in optimizer.prob.constraints.values()):
        return math.inf
    return float(pulp.value(optimizer.prob.objective))
