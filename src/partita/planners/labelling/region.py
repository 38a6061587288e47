"""Regions of the graph relabelled exactly while the rest keeps its labels (large neighbourhood search: Shaw, CP 1998).

A region is all labels of few nodes, or few labels of many nodes (of all: a kernel search, Angelelli, Mansini and
Speranza, *Kernel search: a general heuristic for the multi-dimensional knapsack problem*, 2010). It grows from some
nodes outwards until its edges hold a given number of label pairs; the exact program then finds its best labels under
the memory that the rest leaves. Unlike a forest it may hold cycles, and it trades memory between its nodes as the limit
says and not as prices do, which is what counts where single labels take much of the room.
"""

from __future__ import annotations

import numpy as np

from partita.planners.labelling.exact import solve_exactly
from partita.planners.labelling.flat import Flat, load_of, priced
from partita.planners.labelling.problem import Ints
from partita.planners.labelling.record import Record

FEWEST = 2.0  # labels a node that a region may choose from, on average
DENSITIES = (1.0, 1.0, 1.5, 2.5, np.inf)  # times as many as let a region be the whole graph


def grown(flat: Flat, pairs: int, rng: np.random.Generator) -> Ints:
    """Nodes reached first from one to four random ones, until about ``pairs`` label pairs stand on edges among them."""
    num_nodes = len(flat.label_at) - 1
    sizes = np.diff(flat.matrix_at)
    inside = np.zeros(num_nodes, dtype=np.bool_)
    front = [int(v) for v in rng.integers(num_nodes, size=int(rng.integers(1, 5)))]
    held = 0
    while front and held < pairs:
        v = front.pop(int(rng.integers(min(len(front), 4))))
        if inside[v]:
            continue
        inside[v] = True
        edges = flat.near_edge[flat.near_at[v] : flat.near_at[v + 1]]
        others = np.where(flat.edge_a[edges] == v, flat.edge_b[edges], flat.edge_a[edges])
        held += int(sizes[edges[inside[others]]].sum())
        front += [int(u) for u in rng.permutation(others[~inside[others]])]
    return np.flatnonzero(inside)


def restricted(flat: Flat, labels: Ints, free: Ints) -> Flat:
    """The problem of the ``free`` nodes (ascending) where all others keep ``labels``."""
    position = np.full(len(labels), -1)
    position[free] = np.arange(len(free))
    cost = flat.cost.copy()
    a_free, b_free = position[flat.edge_a] >= 0, position[flat.edge_b] >= 0
    for e in np.flatnonzero(a_free != b_free):
        a, b = int(flat.edge_a[e]), int(flat.edge_b[e])
        wide = flat.label_at[b + 1] - flat.label_at[b]
        pairs = flat.matrix[flat.matrix_at[e] : flat.matrix_at[e + 1]].reshape(-1, wide)
        if a_free[e]:
            cost[flat.label_at[a] : flat.label_at[a + 1]] += pairs[:, labels[b]]
        else:
            cost[flat.label_at[b] : flat.label_at[b + 1]] += pairs[labels[a]]
    inner = np.flatnonzero(a_free & b_free)
    edge_a, edge_b = position[flat.edge_a[inner]], position[flat.edge_b[inner]]
    ends = np.concatenate([edge_a, edge_b])
    near = np.argsort(ends, kind="stable")
    load, own = np.zeros(len(flat.room) + 1), np.zeros(len(flat.room) + 1)
    load_of(flat, labels, load)
    label_at, label_of = _ranges(flat.label_at, free)
    matrix_at, matrix_of = _ranges(flat.matrix_at, inner)
    span_at, span_of = _ranges(flat.span_at, free)
    usage_at, usage_of = _ranges(flat.usage_at, free)
    part = Flat(
        label_at=label_at,
        cost=cost[label_of],
        edge_a=edge_a,
        edge_b=edge_b,
        matrix_at=matrix_at,
        matrix=flat.matrix[matrix_of],
        near_at=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(ends, minlength=len(free)))]),
        near_edge=near % max(len(inner), 1),
        span_at=span_at,
        span_begin=flat.span_begin[span_of],
        span_end=flat.span_end[span_of],
        usage_at=usage_at,
        usage=flat.usage[usage_of],
        room=flat.room,
        forbidden=flat.forbidden,
    )
    load_of(part, labels[free], own)
    return part._replace(room=flat.room - (load - own)[:-1])


def _ranges(starts: Ints, chosen: Ints) -> tuple[Ints, Ints]:
    """The chosen pieces of a concatenation: where each begins in theirs, and their places in the whole."""
    sizes = starts[chosen + 1] - starts[chosen]
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return begins, np.arange(begins[-1]) + np.repeat(starts[chosen] - begins[:-1], sizes)


def likely(flat: Flat, record: Record, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Marks the labels that look best: so few that about ``pairs`` label pairs are left, or more, or all, by chance. By
    the messages' marginals, with memory at prices off by a random factor and all of it shaken.
    """
    density = max(FEWEST, (pairs / max(len(flat.edge_a), 1)) ** 0.5) * float(rng.choice(DENSITIES))
    said = record.marginals
    if said is None or density * (len(flat.label_at) - 1) >= len(said):
        return np.ones(len(flat.cost), dtype=np.bool_)
    unary = np.zeros(len(said))
    priced(flat, record.prices, unary)
    said = said + (np.exp(rng.normal(0.0, 1.0)) - 1.0) * (unary - flat.cost)
    least = np.minimum.reduceat(said, flat.label_at[:-1])
    above = (said - np.repeat(least, np.diff(flat.label_at))) * np.exp(rng.normal(0.0, 0.5, len(said)))
    count = int(density * len(least))
    return np.asarray(above <= np.partition(above, count)[count])


def narrowed(flat: Flat, stays: np.ndarray) -> Flat:
    """The problem with only the labels marked: at least one a node."""
    sizes, spans = np.diff(flat.label_at), np.diff(flat.span_at)
    counts = np.add.reduceat(stays.astype(np.int64), flat.label_at[:-1])
    edge = np.repeat(np.arange(len(flat.edge_a)), np.diff(flat.matrix_at))
    a, b = flat.edge_a[edge], flat.edge_b[edge]
    row, column = np.divmod(np.arange(len(edge)) - flat.matrix_at[edge], sizes[b])
    return flat._replace(
        label_at=_starts(counts),
        cost=flat.cost[stays],
        matrix_at=_starts(counts[flat.edge_a] * counts[flat.edge_b]),
        matrix=flat.matrix[stays[flat.label_at[a] + row] & stays[flat.label_at[b] + column]],
        usage_at=_starts(counts * spans),
        usage=flat.usage[np.repeat(stays, np.repeat(spans, sizes))],
    )


def _starts(sizes: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def relabel_region(
    flat: Flat, record: Record, labels: Ints, stays: np.ndarray, pairs: int, seconds: float, rng: np.random.Generator
) -> bool:
    """Offer ``labels``, which fit, with the best labels of a region that has about ``pairs`` label pairs left once only
    the labels that ``stays`` marks may be taken; whether those were proven best in ``seconds``.
    """
    stays = stays.copy()
    stays[flat.label_at[:-1] + labels] = True
    narrow = narrowed(flat, stays)
    position = (np.cumsum(stays) - 1)[flat.label_at[:-1] + labels] - narrow.label_at[:-1]
    found, proven = relabelled(narrow, position, grown(narrow, pairs, rng), min(seconds, record.seconds_left))
    record.offer(np.flatnonzero(stays)[narrow.label_at[:-1] + found] - flat.label_at[:-1])
    return proven


def relabelled(flat: Flat, labels: Ints, free: Ints, seconds: float) -> tuple[Ints, bool]:
    """``labels``, which fit, with the best found for ``free``, and whether those are proven best."""
    part = restricted(flat, labels, free)
    inner = Record(part, seconds, whole_numbers=False)
    inner.offer(labels[free])
    solve_exactly(part, inner)
    found = labels.copy()
    if inner.labels is not None:
        found[free] = inner.labels
    return found, inner.closed
