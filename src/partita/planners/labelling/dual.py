"""Lower bounds by passing costs between edges and nodes, with a price per moment for memory.

For any prices and any messages, the cheapest label of each node plus the cheapest pair of each edge, both after the
messages have moved costs between them, less the prices times the room, is at most the optimum. ``sweep`` improves
the messages node by node, monotonically (sequential tree-reweighted message passing: Kolmogorov, *Convergent
tree-reweighted message passing for energy minimization*, PAMI 2006), and rounds to labels on its way. Prices follow
the excess of those labels.
"""

from __future__ import annotations

import numpy as np

from partita.planners.labelling.flat import Flat
from partita.planners.labelling.kernel import kernel
from partita.planners.labelling.problem import Floats, Ints


def message_starts(flat: Flat) -> Ints:
    """Where each edge's messages stand: to its first node at ``2 e``, to its second at ``2 e + 1``."""
    sizes = np.diff(flat.label_at)
    both = np.stack([sizes[flat.edge_a], sizes[flat.edge_b]], axis=1).ravel()
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(both)])


@kernel
def _pull(flat: Flat, message_at: Ints, messages: Floats, e: int, to_a: bool, out: Floats) -> None:
    """The edge's cheapest pair per label of one end, its cost to the other end's node taken off."""
    a, b = flat.edge_a[e], flat.edge_b[e]
    na, nb = flat.label_at[a + 1] - flat.label_at[a], flat.label_at[b + 1] - flat.label_at[b]
    at = flat.matrix_at[e]
    if to_a:
        other = message_at[2 * e + 1]
        for x in range(na):
            least = np.inf
            for y in range(nb):
                value = flat.matrix[at + x * nb + y] - messages[other + y]
                if value < least:
                    least = value
            out[x] = least
    else:
        other = message_at[2 * e]
        for y in range(nb):
            out[y] = np.inf
        for x in range(na):
            paid = messages[other + x]
            for y in range(nb):
                value = flat.matrix[at + x * nb + y] - paid
                if value < out[y]:
                    out[y] = value


@kernel
def sweep(flat: Flat, message_at: Ints, messages: Floats, unary: Floats, forward: bool, labels: Ints) -> None:
    """One pass over the nodes; ``messages`` improve in place and ``labels`` become a rounding of them."""
    n = len(flat.label_at) - 1
    most, degree = 0, 0
    for i in range(n):
        most = max(most, flat.label_at[i + 1] - flat.label_at[i])
        degree = max(degree, flat.near_at[i + 1] - flat.near_at[i])
    pulled = np.zeros((degree, most))
    total = np.zeros(most)
    greedy = np.zeros(most)
    for step in range(n):
        i = step if forward else n - 1 - step
        size = flat.label_at[i + 1] - flat.label_at[i]
        for x in range(size):
            total[x] = unary[flat.label_at[i] + x]
            greedy[x] = total[x]
        before, after = 0, 0
        for k in range(flat.near_at[i], flat.near_at[i + 1]):
            e = flat.near_edge[k]
            a, b = flat.edge_a[e], flat.edge_b[e]
            other = b if a == i else a
            row = pulled[k - flat.near_at[i]]
            _pull(flat, message_at, messages, e, a == i, row)
            done = other < i if forward else other > i
            wide = flat.label_at[b + 1] - flat.label_at[b]
            for x in range(size):
                total[x] += row[x]
            if done:
                before += 1
                at = flat.matrix_at[e]
                for x in range(size):
                    if a == i:
                        greedy[x] += flat.matrix[at + x * wide + labels[other]]
                    else:
                        greedy[x] += flat.matrix[at + labels[other] * wide + x]
            else:
                after += 1
                for x in range(size):
                    greedy[x] += row[x]
        labels[i] = np.argmin(greedy[:size])
        share = 1.0 / max(before, after, 1)
        for k in range(flat.near_at[i], flat.near_at[i + 1]):
            e = flat.near_edge[k]
            a, b = flat.edge_a[e], flat.edge_b[e]
            other = b if a == i else a
            done = other < i if forward else other > i
            to = message_at[2 * e] if a == i else message_at[2 * e + 1]
            row = pulled[k - flat.near_at[i]]
            for x in range(size):
                messages[to + x] = row[x] if done else row[x] - share * total[x]


@kernel
def marginals(flat: Flat, message_at: Ints, messages: Floats, unary: Floats, out: Floats) -> None:
    """What ``messages`` say of each label, into ``out``: how much dearer about the best labels with it are."""
    most = 0
    for i in range(len(flat.label_at) - 1):
        most = max(most, flat.label_at[i + 1] - flat.label_at[i])
    row = np.zeros(most)
    out[:] = unary
    for i in range(len(flat.label_at) - 1):
        size = flat.label_at[i + 1] - flat.label_at[i]
        for k in range(flat.near_at[i], flat.near_at[i + 1]):
            e = flat.near_edge[k]
            _pull(flat, message_at, messages, e, flat.edge_a[e] == i, row)
            for x in range(size):
                out[flat.label_at[i] + x] += row[x]


@kernel
def bound_of(flat: Flat, message_at: Ints, messages: Floats, unary: Floats) -> float:
    """The bound that ``messages`` prove on the priced costs ``unary`` and the edges (prices times room not yet off)."""
    n = len(flat.label_at) - 1
    total = unary.copy()
    bound = 0.0
    for e in range(len(flat.edge_a)):
        a, b = flat.edge_a[e], flat.edge_b[e]
        na, nb = flat.label_at[a + 1] - flat.label_at[a], flat.label_at[b + 1] - flat.label_at[b]
        to_a, to_b = message_at[2 * e], message_at[2 * e + 1]
        least = np.inf
        for x in range(na):
            for y in range(nb):
                value = flat.matrix[flat.matrix_at[e] + x * nb + y] - messages[to_a + x] - messages[to_b + y]
                if value < least:
                    least = value
        bound += least
        for x in range(na):
            total[flat.label_at[a] + x] += messages[to_a + x]
        for y in range(nb):
            total[flat.label_at[b] + y] += messages[to_b + y]
    for i in range(n):
        bound += total[flat.label_at[i] : flat.label_at[i + 1]].min()
    return bound
