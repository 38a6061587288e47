"""A core as flat arrays, and the sums every search needs over them: cost, usage per moment, prices per label."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from partita.planners.labelling.contract import Core
from partita.planners.labelling.kernel import kernel
from partita.planners.labelling.moments import Memory
from partita.planners.labelling.problem import Floats, Ints


class Flat(NamedTuple):
    """Node ``i``'s labels stand at ``label_at[i] : label_at[i + 1]``; edge ``e``'s costs, row by row, at
    ``matrix_at[e]``; node ``i``'s edges at ``near_at[i]`` in ``near_edge``; its spans at ``span_at[i]``, with the usage
    of label ``l`` in span ``k`` at ``usage_at[i] + l * spans + k``. ``forbidden`` stands for infinite costs.
    """

    label_at: Ints
    cost: Floats
    edge_a: Ints
    edge_b: Ints
    matrix_at: Ints
    matrix: Floats
    near_at: Ints
    near_edge: Ints
    span_at: Ints
    span_begin: Ints
    span_end: Ints
    usage_at: Ints
    usage: Floats
    room: Floats
    forbidden: float


def flatten(core: Core, memory: Memory) -> Flat:
    """``core`` under ``memory`` in one set of arrays."""
    n, num_edges = len(core.nodes), len(core.edges)
    ends = np.array([(a, b) for a, b, _ in core.edges], dtype=np.int64).reshape(num_edges, 2)
    edge_a, edge_b = np.ascontiguousarray(ends[:, 0]), np.ascontiguousarray(ends[:, 1])
    matrix = _joined([cost for _, _, cost in core.edges])
    near = np.argsort(np.concatenate([edge_a, edge_b]), kind="stable")
    degree = np.bincount(np.concatenate([edge_a, edge_b]), minlength=n)
    cost = _joined(core.costs)
    largest = [float(np.abs(m[np.isfinite(m)]).max(initial=0.0)) for _, _, m in core.edges]
    forbidden = 4.0 * (float(sum(np.abs(c).max() for c in core.costs)) + sum(largest)) + 1.0
    return Flat(
        label_at=_starts([len(c) for c in core.costs]),
        cost=cost,
        edge_a=edge_a,
        edge_b=edge_b,
        matrix_at=_starts([c.size for _, _, c in core.edges]),
        matrix=np.where(np.isfinite(matrix), matrix, forbidden),
        near_at=_starts(degree),
        near_edge=near % num_edges if num_edges else near,
        span_at=_starts([len(s.begin) for s in memory.spans]),
        span_begin=np.concatenate([np.zeros(0, np.int64), *(s.begin for s in memory.spans)]),
        span_end=np.concatenate([np.zeros(0, np.int64), *(s.end for s in memory.spans)]),
        usage_at=_starts([s.usage.size for s in memory.spans]),
        usage=_joined([s.usage for s in memory.spans]),
        room=memory.room,
        forbidden=forbidden,
    )


def _starts(sizes: object) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(sizes, dtype=np.int64))])


def _joined(parts: object) -> Floats:
    return np.concatenate([np.zeros(0), *(np.asarray(p, dtype=np.float64).ravel() for p in parts)])  # type: ignore[attr-defined]


@kernel
def cost_of(flat: Flat, labels: Ints) -> float:
    """Node and edge costs of ``labels``; ``flat.forbidden`` or more with a forbidden pair."""
    total = 0.0
    for i in range(len(labels)):
        total += flat.cost[flat.label_at[i] + labels[i]]
    for e in range(len(flat.edge_a)):
        a, b = flat.edge_a[e], flat.edge_b[e]
        total += flat.matrix[flat.matrix_at[e] + labels[a] * (flat.label_at[b + 1] - flat.label_at[b]) + labels[b]]
    return total


@kernel
def load_of(flat: Flat, labels: Ints, load: Floats) -> None:
    """Usage above the smallest at each moment, into ``load`` (one entry more than moments, the last one scratch)."""
    load[:] = 0.0
    for i in range(len(labels)):
        spans = flat.span_at[i + 1] - flat.span_at[i]
        row = flat.usage_at[i] + labels[i] * spans
        for k in range(spans):
            used = flat.usage[row + k]
            load[flat.span_begin[flat.span_at[i] + k]] += used
            load[flat.span_end[flat.span_at[i] + k]] -= used
    total = 0.0
    for t in range(len(flat.room)):
        total += load[t]
        load[t] = total


def smallest(flat: Flat) -> Ints:
    """Of each node the label that uses least, summed over time; the cheapest of several."""
    labels = np.zeros(len(flat.label_at) - 1, dtype=np.int64)
    for i in range(len(labels)):
        own = flat.cost[flat.label_at[i] : flat.label_at[i + 1]]
        at, to = flat.span_at[i], flat.span_at[i + 1]
        usage = flat.usage[flat.usage_at[i] : flat.usage_at[i + 1]].reshape(len(own), to - at)
        labels[i] = np.lexsort((own, usage @ (flat.span_end[at:to] - flat.span_begin[at:to])))[0]
    return labels


@kernel
def priced(flat: Flat, prices: Floats, unary: Floats) -> None:
    """Node costs with usage at ``prices`` per moment, into ``unary``."""
    upto = np.zeros(len(prices) + 1)
    for t in range(len(prices)):
        upto[t + 1] = upto[t] + prices[t]
    for i in range(len(flat.label_at) - 1):
        spans = flat.span_at[i + 1] - flat.span_at[i]
        for label in range(flat.label_at[i + 1] - flat.label_at[i]):
            total = flat.cost[flat.label_at[i] + label]
            row = flat.usage_at[i] + label * spans
            for k in range(spans):
                at = flat.span_at[i] + k
                total += flat.usage[row + k] * (upto[flat.span_end[at]] - upto[flat.span_begin[at]])
            unary[flat.label_at[i] + label] = total
