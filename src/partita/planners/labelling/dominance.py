"""Labels that another one of the same node beats whatever the neighbours choose (Goldstein, *Efficient rotamer
elimination applied to protein side-chains*, Biophysical Journal 1994), here only where it never uses more memory; and
labels that take more memory than there is.
"""

from __future__ import annotations

import numpy as np

from partita.planners.labelling.flat import Flat
from partita.planners.labelling.kernel import COMPILED, kernel
from partita.planners.labelling.problem import Floats

COMPARISONS = 1e9 if COMPILED else 3e6  # of costs: a second or two


def fitting(flat: Flat) -> np.ndarray:
    """Marks, per label of every node, those that the room holds when all other nodes use as little as they can."""
    stays = np.ones(len(flat.cost), dtype=np.bool_)
    if not len(flat.span_begin):
        return stays
    ends = np.stack([flat.span_begin, flat.span_end], axis=1).ravel()
    least = np.minimum.reduceat(np.append(flat.room, np.inf), ends)[::2]
    for i in range(len(flat.label_at) - 1):
        begin, end = flat.span_at[i], flat.span_at[i + 1]
        if end > begin:
            usage = flat.usage[flat.usage_at[i] : flat.usage_at[i + 1]].reshape(-1, end - begin)
            stays[flat.label_at[i] : flat.label_at[i + 1]] = (usage <= least[begin:end]).all(axis=1)
    return stays


@kernel
def undominated(flat: Flat, work: float) -> np.ndarray:
    """Marks, per label of every node, those that stay; the optimum stays the same. After about ``work`` comparisons all
    that is left stays.
    """
    stays = np.ones(len(flat.cost), dtype=np.bool_)
    least = _least(flat)
    for i in range(len(flat.label_at) - 1):
        at, size = flat.label_at[i], flat.label_at[i + 1] - flat.label_at[i]
        beside = flat.span_at[i + 1] - flat.span_at[i]
        for k in range(flat.near_at[i], flat.near_at[i + 1]):
            e = flat.near_edge[k]
            beside += (flat.matrix_at[e + 1] - flat.matrix_at[e]) // size
        if work < 0:
            break
        for worse in range(size):
            for better in range(size):
                if better == worse or not stays[at + better] or least[at + better] > least[at + worse]:
                    continue
                work -= beside
                if _beats(flat, stays, i, better, worse):
                    stays[at + worse] = False
                    break
    return stays


@kernel
def _least(flat: Flat) -> Floats:
    """Each label's cost with its cheapest pair on every edge: no label beats one that is cheaper by this."""
    least = flat.cost.copy()
    for e in range(len(flat.edge_a)):
        a, b = flat.edge_a[e], flat.edge_b[e]
        na, nb = flat.label_at[a + 1] - flat.label_at[a], flat.label_at[b + 1] - flat.label_at[b]
        pairs = flat.matrix[flat.matrix_at[e] : flat.matrix_at[e + 1]].reshape(na, nb)
        for x in range(na):
            least[flat.label_at[a] + x] += pairs[x].min()
        for y in range(nb):
            least[flat.label_at[b] + y] += pairs[:, y].min()
    return least


@kernel
def _beats(flat: Flat, stays: np.ndarray, i: int, better: int, worse: int) -> bool:
    """With ``better`` in the place of ``worse``, no labelling costs more or uses more at any moment."""
    spans = flat.span_at[i + 1] - flat.span_at[i]
    for k in range(spans):
        if flat.usage[flat.usage_at[i] + better * spans + k] > flat.usage[flat.usage_at[i] + worse * spans + k]:
            return False
    saved = flat.cost[flat.label_at[i] + worse] - flat.cost[flat.label_at[i] + better]
    for q in range(flat.near_at[i], flat.near_at[i + 1]):
        e = flat.near_edge[q]
        a, b = flat.edge_a[e], flat.edge_b[e]
        other = b if a == i else a
        wide = flat.label_at[b + 1] - flat.label_at[b]
        least = np.inf
        for y in range(flat.label_at[other + 1] - flat.label_at[other]):
            if not stays[flat.label_at[other] + y]:
                continue
            if a == i:
                with_worse = flat.matrix[flat.matrix_at[e] + worse * wide + y]
                with_better = flat.matrix[flat.matrix_at[e] + better * wide + y]
            else:
                with_worse = flat.matrix[flat.matrix_at[e] + y * wide + worse]
                with_better = flat.matrix[flat.matrix_at[e] + y * wide + better]
            if with_better >= flat.forbidden:
                if with_worse < flat.forbidden:
                    return False
            elif with_worse - with_better < least:
                least = with_worse - with_better
        saved += least
    return bool(saved >= 0)
