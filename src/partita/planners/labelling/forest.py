"""Moves that relabel a whole forest at once, each the best there is while the other nodes keep their labels.

A random maximal set of nodes whose induced graph has no cycle is grown in a given order, and its best labels follow by
dynamic programming from the leaves (block coordinate descent over trees: Hamze and de Freitas, *From fields to trees*,
UAI 2004). On sparse graphs such a forest holds about half of the nodes.
"""

from __future__ import annotations

import numpy as np

from partita.planners.labelling.flat import Flat
from partita.planners.labelling.kernel import kernel
from partita.planners.labelling.problem import Floats, Ints


@kernel
def _root(parent: Ints, v: int) -> int:
    while parent[v] != v:
        parent[v] = parent[parent[v]]
        v = parent[v]
    return v


@kernel
def relabel_forest(flat: Flat, unary: Floats, labels: Ints, order: Ints) -> None:
    """``labels`` become optimal, in place, on a maximal induced forest grown in ``order``, given the rest."""
    n = len(flat.label_at) - 1
    tree = np.arange(n)
    inside = np.zeros(n, dtype=np.bool_)
    seen = np.full(n, -1)
    for v in order:
        fits = True
        for k in range(flat.near_at[v], flat.near_at[v + 1]):
            e = flat.near_edge[k]
            other = flat.edge_b[e] if flat.edge_a[e] == v else flat.edge_a[e]
            if inside[other]:
                root = _root(tree, other)
                if seen[root] == v:
                    fits = False
                    break
                seen[root] = v
        if fits:
            inside[v] = True
            for k in range(flat.near_at[v], flat.near_at[v + 1]):
                e = flat.near_edge[k]
                other = flat.edge_b[e] if flat.edge_a[e] == v else flat.edge_a[e]
                if inside[other]:
                    tree[_root(tree, other)] = v
    queue = np.empty(n, dtype=np.int64)
    above = np.full(n, -1)
    placed = np.zeros(n, dtype=np.bool_)
    count = 0
    best = unary.copy()
    for start in order:
        if not inside[start] or placed[start]:
            continue
        head = count
        queue[count] = start
        placed[start] = True
        count += 1
        while head < count:
            v = queue[head]
            head += 1
            at_v = flat.label_at[v]
            for k in range(flat.near_at[v], flat.near_at[v + 1]):
                e = flat.near_edge[k]
                a, b = flat.edge_a[e], flat.edge_b[e]
                other = b if a == v else a
                if inside[other]:
                    if not placed[other]:
                        placed[other] = True
                        above[other] = e
                        queue[count] = other
                        count += 1
                    continue
                wide = flat.label_at[b + 1] - flat.label_at[b]
                at = flat.matrix_at[e]
                for x in range(flat.label_at[v + 1] - at_v):
                    if a == v:
                        best[at_v + x] += flat.matrix[at + x * wide + labels[other]]
                    else:
                        best[at_v + x] += flat.matrix[at + labels[other] * wide + x]
    for k in range(count - 1, -1, -1):
        v = queue[k]
        e = above[v]
        if e < 0:
            continue
        a, b = flat.edge_a[e], flat.edge_b[e]
        na, nb = flat.label_at[a + 1] - flat.label_at[a], flat.label_at[b + 1] - flat.label_at[b]
        at, at_a, at_b = flat.matrix_at[e], flat.label_at[a], flat.label_at[b]
        if b == v:
            for x in range(na):
                least = np.inf
                for y in range(nb):
                    value = flat.matrix[at + x * nb + y] + best[at_b + y]
                    if value < least:
                        least = value
                best[at_a + x] += least
        else:
            for y in range(nb):
                least = np.inf
                for x in range(na):
                    value = flat.matrix[at + x * nb + y] + best[at_a + x]
                    if value < least:
                        least = value
                best[at_b + y] += least
    for k in range(count):
        v = queue[k]
        e = above[v]
        size, at_v = flat.label_at[v + 1] - flat.label_at[v], flat.label_at[v]
        chosen, least = 0, np.inf
        for x in range(size):
            value = best[at_v + x]
            if e >= 0:
                a, b = flat.edge_a[e], flat.edge_b[e]
                wide = flat.label_at[b + 1] - flat.label_at[b]
                if a == v:
                    value += flat.matrix[flat.matrix_at[e] + x * wide + labels[b]]
                else:
                    value += flat.matrix[flat.matrix_at[e] + labels[a] * wide + x]
            if value < least:
                chosen, least = x, value
        labels[v] = chosen
