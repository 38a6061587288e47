"""Moves that relabel all but a few nodes at once, optimally while those few keep their labels.

Nodes are eliminated one after the other, each leaving a table of its best cost per labelling of the neighbours it had
left (Bertelè and Brioschi, *Nonserial Dynamic Programming*, 1972; bucket elimination: Dechter, AIJ 1999). Where even
the smallest such table would be too large, a node keeps its label instead and leaves the graph (cutset conditioning:
Dechter, AIJ 1990). An order depends on the graph alone, so it is made once and used at any prices and labels.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from partita.planners.labelling.flat import Flat
from partita.planners.labelling.kernel import kernel
from partita.planners.labelling.problem import Floats, Ints


class Elimination(NamedTuple):
    """Step ``s`` eliminates ``order[s]``. Its table stands at ``table_at[s]``, row-major over the labels of the nodes
    ``bag[bag_at[s] : bag_at[s + 1]]``, which go later. It adds up the factors at ``factor_at[s]``, an edge ``e`` as
    ``e`` and an earlier step's table as ``-1 - step``, with strides at ``stride_at``: the eliminated node's, then the
    bag's. ``kept_edge`` at ``kept_at[s]`` are its edges to nodes that keep their labels.
    """

    order: Ints
    bag_at: Ints
    bag: Ints
    table_at: Ints
    factor_at: Ints
    factor: Ints
    stride_at: Ints
    stride: Ints
    kept_at: Ints
    kept_edge: Ints
    largest: int  # entries of the largest table before its node's labels are minimised over
    work: int  # additions of a move


def eliminate(flat: Flat, entries: float, rng: np.random.Generator) -> Elimination:
    """A random order of elimination whose tables, the eliminated node's labels included, hold at most ``entries``."""
    order, bags = _order(flat, entries, rng)
    sizes = np.diff(flat.label_at).tolist()
    step_of = {v: s for s, v in enumerate(order)}
    kept: list[list[int]] = [[] for _ in order]
    factors: list[list[tuple[int, dict[int, int]]]] = [[] for _ in order]
    for e, (a, b) in enumerate(zip(flat.edge_a.tolist(), flat.edge_b.tolist(), strict=True)):
        steps = [step_of[v] for v in (a, b) if v in step_of]
        if len(steps) == 2:
            factors[min(steps)].append((e, {a: sizes[b], b: 1}))
        elif steps:
            kept[steps[0]].append(e)
    rows, largest, work = [], 1, 0
    strides: list[list[int]] = []
    for s, (v, bag) in enumerate(zip(order, bags, strict=True)):
        own, total = {}, 1
        for u in reversed(bag):
            own[u] = total
            total *= sizes[u]
        if bag:
            factors[min(step_of[u] for u in bag)].append((-1 - s, own))
        strides += [[stride.get(u, 0) for u in (v, *bag)] for _, stride in factors[s]]
        rows.append(total)
        largest = max(largest, total * sizes[v])
        work += total * sizes[v] * (1 + len(factors[s]))
    return Elimination(
        order=np.array(order, dtype=np.int64),
        bag_at=_starts(bags),
        bag=_joined(bags),
        table_at=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(rows, dtype=np.int64))]),
        factor_at=_starts(factors),
        factor=np.array([ref for own in factors for ref, _ in own], dtype=np.int64),
        stride_at=_starts(strides),
        stride=_joined(strides),
        kept_at=_starts(kept),
        kept_edge=_joined(kept),
        largest=largest,
        work=work,
    )


def _starts(parts: list[list[int]] | list[list[tuple[int, dict[int, int]]]]) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array([len(part) for part in parts], dtype=np.int64))])


def _joined(parts: list[list[int]]) -> Ints:
    return np.array([x for part in parts for x in part], dtype=np.int64)


def _order(flat: Flat, entries: float, rng: np.random.Generator) -> tuple[list[int], list[list[int]]]:
    """Eliminated nodes, smallest table first up to chance, and the later ones that each one's table depends on."""
    num_nodes = len(flat.label_at) - 1
    bits = np.log2(np.diff(flat.label_at)).tolist()
    most = math.log2(entries) + 1e-9
    near: list[set[int]] = [set() for _ in range(num_nodes)]
    for a, b in zip(flat.edge_a.tolist(), flat.edge_b.tolist(), strict=True):
        near[a].add(b)
        near[b].add(a)
    chance = rng.random(num_nodes).tolist()
    appeal = (
        rng.random(num_nodes) ** 2
    ).tolist()  # of keeping its label: hubs would, were it for the table's size alone
    table = [bits[v] + sum(bits[u] for u in near[v]) for v in range(num_nodes)]
    queue = [(table[v] + chance[v], v) for v in range(num_nodes)]
    heapq.heapify(queue)
    gone, eliminated = [False] * num_nodes, [False] * num_nodes
    order, bags = [], []
    while queue:
        rank, v = heapq.heappop(queue)
        if gone[v]:
            continue
        if table[v] + chance[v] > rank + 1e-9:  # it grew since
            heapq.heappush(queue, (table[v] + chance[v], v))
            continue
        others = near[v]
        if table[v] > most:
            keeps = max((v, *others), key=lambda u: appeal[u] * bits[u] * len(near[u]))
            gone[keeps] = True
            for u in near[keeps]:
                near[u].discard(keeps)
                table[u] -= bits[keeps]
                heapq.heappush(queue, (table[u] + chance[u], u))
            if keeps != v:
                heapq.heappush(queue, (table[v] + chance[v], v))
            continue
        gone[v] = eliminated[v] = True
        order.append(v)
        bags.append(sorted(others))
        for u in others:
            new = others - near[u] - {u}
            near[u] |= new
            near[u].discard(v)
            table[u] += sum(bits[w] for w in new) - bits[v]
            heapq.heappush(queue, (table[u] + chance[u], u))
    return order, [[u for u in bag if eliminated[u]] for bag in bags]


@kernel
def relabel_eliminated(flat: Flat, steps: Elimination, unary: Floats, labels: Ints, tables: Floats) -> None:
    """The eliminated nodes' ``labels`` become the best there are, in place, given the others'. ``tables`` is scratch of
    ``steps.table_at[-1] + steps.largest`` entries at least.
    """
    own = unary.copy()
    sums = tables[len(tables) - steps.largest :]
    most = 0
    for s in range(len(steps.order)):
        most = max(most, steps.bag_at[s + 1] - steps.bag_at[s])
    digit = np.zeros(most + 1, dtype=np.int64)
    for s in range(len(steps.order)):
        v, bag = steps.order[s], steps.bag_at[s]
        at, size, width = flat.label_at[v], flat.label_at[v + 1] - flat.label_at[v], steps.bag_at[s + 1] - bag
        rows = steps.table_at[s + 1] - steps.table_at[s]
        for k in range(steps.kept_at[s], steps.kept_at[s + 1]):
            e = steps.kept_edge[k]
            a, b = flat.edge_a[e], flat.edge_b[e]
            wide = flat.label_at[b + 1] - flat.label_at[b]
            for x in range(size):
                if a == v:
                    own[at + x] += flat.matrix[flat.matrix_at[e] + x * wide + labels[b]]
                else:
                    own[at + x] += flat.matrix[flat.matrix_at[e] + labels[a] * wide + x]
        for row in range(rows):
            for x in range(size):
                sums[row * size + x] = own[at + x]
        for f in range(steps.factor_at[s], steps.factor_at[s + 1]):
            ref, stride = steps.factor[f], steps.stride_at[f]
            source = flat.matrix if ref >= 0 else tables
            place = flat.matrix_at[ref] if ref >= 0 else steps.table_at[-1 - ref]
            along = steps.stride[stride]
            digit[:width] = 0
            for row in range(rows):
                for x in range(size):
                    sums[row * size + x] += source[place + x * along]
                for q in range(width - 1, -1, -1):
                    u = steps.bag[bag + q]
                    digit[q] += 1
                    place += steps.stride[stride + 1 + q]
                    if digit[q] < flat.label_at[u + 1] - flat.label_at[u]:
                        break
                    place -= digit[q] * steps.stride[stride + 1 + q]
                    digit[q] = 0
        for row in range(rows):
            least = np.inf
            for x in range(size):
                least = min(least, sums[row * size + x])
            tables[steps.table_at[s] + row] = least
    for s in range(len(steps.order) - 1, -1, -1):
        v, bag = steps.order[s], steps.bag_at[s]
        at, size, width = flat.label_at[v], flat.label_at[v + 1] - flat.label_at[v], steps.bag_at[s + 1] - bag
        for f in range(steps.factor_at[s], steps.factor_at[s + 1]):
            ref, stride = steps.factor[f], steps.stride_at[f]
            source = flat.matrix if ref >= 0 else tables
            place = flat.matrix_at[ref] if ref >= 0 else steps.table_at[-1 - ref]
            for q in range(width):
                place += steps.stride[stride + 1 + q] * labels[steps.bag[bag + q]]
            for x in range(size):
                own[at + x] += source[place + x * steps.stride[stride]]
        labels[v] = np.argmin(own[at : at + size])
