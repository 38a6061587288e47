"""Spans: what every possible stage needs, as matrices: entry [a, b] is the stage between ideal a and ideal b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from partita.planners.problem import Array, Problem, Times

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """``inside[a, b]``: a lies within b and they differ. ``before``: (ideals, blocks) membership."""

    ideals: tuple[int, ...]
    before: Bools
    inside: Bools
    allowed: tuple[Bools, ...]
    weight_bytes: Array
    trained_bytes: Array
    received_fixed: Array
    received_per_sample: Array
    gets: Bools

    def total(self, values: Array) -> Array:
        """Sum of a per-block value over each span (where ``inside``)."""
        reach: Array = np.matmul(self.before, values)
        result: Array = reach[None, :] - reach[:, None]
        return result

    def largest(self, values: Array) -> Array:
        """Maximum of a per-block value over each span."""
        n = len(self.ideals)
        result = np.zeros((n, n))
        if self.is_chain:
            for a in range(n - 1):
                result[a, a + 1 :] = np.maximum.accumulate(values[a:])
            return result
        for b in range(self.before.shape[1]):
            has = ~self.before[:, b][:, None] & self.before[:, b][None, :]
            np.maximum(result, np.where(has, values[b], 0.0), out=result)
        return result

    @property
    def is_chain(self) -> bool:
        """Whether the ideals are the prefixes of the block order."""
        return bool(len(self.ideals) == self.before.shape[1] + 1)


def spans(problem: Problem, ideals: Sequence[int]) -> Spans:
    """Everything about the spans that does not depend on microbatches, schedule or replicas."""
    n = problem.num_blocks
    before = np.array([[bool(mask >> b & 1) for b in range(n)] for mask in ideals], dtype=np.bool_)
    member = before.astype(np.float64)
    if len(ideals) == n + 1:
        inside = np.triu(np.ones((n + 1, n + 1), dtype=np.bool_), 1)
    else:
        inside = np.array([[a != b and b & a == a for b in ideals] for a in ideals], dtype=np.bool_)

    fixed, per_sample, gets = _received(problem, member, inside)
    return Spans(
        tuple(ideals), before, inside,
        tuple(_allowed(problem, member, inside, pool) for pool in range(len(problem.pools))),
        _union(member, inside, [(w.blocks, w.nbytes) for w in problem.weights]),
        _union(member, inside, [(w.blocks, w.trained) for w in problem.weights]),
        fixed, per_sample, gets,
    )  # fmt: skip


def with_weights(s: Spans, problem: Problem) -> Spans:
    """The same spans with the weights of this problem."""
    member = s.before.astype(np.float64)
    total, trained = (
        _union(member, s.inside, [(w.blocks, value) for w, value in zip(problem.weights, values, strict=True)])
        for values in ([w.nbytes for w in problem.weights], [w.trained for w in problem.weights])
    )
    return replace(s, weight_bytes=total, trained_bytes=trained)


def _union(member: Array, inside: Bools, items: Sequence[tuple[tuple[int, ...], float]]) -> Array:
    """Sum over each span of the values of items that have a block in it."""
    alone = np.zeros(member.shape[1])
    shared: dict[tuple[int, ...], float] = {}
    for blocks, value in items:
        if len(set(blocks)) == 1:
            alone[blocks[0]] += value
        elif blocks:
            key = tuple(sorted(set(blocks)))
            shared[key] = shared.get(key, 0.0) + value
    reach = member @ alone
    result: Array = np.where(inside, reach[None, :] - reach[:, None], 0.0)
    for blocks, value in shared.items():
        count = member[:, list(blocks)].sum(axis=1)
        result += value * (count[None, :] > count[:, None]) * inside
    return result


def _received(problem: Problem, member: Array, inside: Bools) -> tuple[Array, Array, Bools]:
    size = len(member)
    fixed, per_sample = np.zeros((size, size)), np.zeros((size, size))
    merged: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
    for e in problem.edges:
        consumers = tuple(sorted(set(e.consumers) - {e.producer}))
        if consumers:
            f, p = merged.get((e.producer, consumers), (0.0, 0.0))
            merged[e.producer, consumers] = (f + e.fixed, p + e.per_sample)
    single = [(p, c[0], v) for (p, c), v in merged.items() if len(c) == 1]
    if single:
        producers, consumers_ = [s[0] for s in single], [s[1] for s in single]
        left = member[:, producers] * (1.0 - member[:, consumers_])
        right = member[:, consumers_]
        fixed += (left * np.array([s[2][0] for s in single])) @ right.T
        per_sample += (left * np.array([s[2][1] for s in single])) @ right.T
    for (producer, consumers), (f, p) in merged.items():
        if len(consumers) > 1:
            count = member[:, list(consumers)].sum(axis=1)
            takes = member[:, producer][:, None] * (count[None, :] > count[:, None])
            fixed += f * takes
            per_sample += p * takes
    gets = inside & ((fixed > 0) | (per_sample > 0))
    return np.where(inside, fixed, 0.0), np.where(inside, per_sample, 0.0), gets


def _allowed(problem: Problem, member: Array, inside: Bools, pool: int) -> Bools:
    ok: Bools = inside.copy()
    for group in problem.together:
        unique = sorted(set(group))
        count = member[:, unique].sum(axis=1)
        got = count[None, :] - count[:, None]
        ok &= (got == 0) | (got == len(unique))
    for b in problem.breaks:
        early, late = member[:, :b].sum(axis=1), member[:, b:].sum(axis=1)
        ok &= ~((early[None, :] > early[:, None]) & (late[None, :] > late[:, None]))
    for block, pools in problem.pools_of:
        if pool not in pools:
            ok &= member[:, block][None, :] == member[:, block][:, None]
    return ok


@dataclass(frozen=True, slots=True, eq=False)
class PoolSpans:
    """Seconds of each span on one pool, for a microbatch."""

    forward: Array
    backward: Array
    weight: Array
    whole: Array


@dataclass(frozen=True, slots=True, eq=False)
class Sized:
    """The spans' numbers at one number of microbatches. ``again_seconds``, ``again_bytes``: (pools, blocks) and
    (blocks), what recomputing a block costs and saves; 0 bytes where it may not be.
    """

    pools: tuple[PoolSpans, ...]
    held: Array
    owed: Array
    received: Array
    transfer: Array
    transient: Array
    largest_saved: Array
    whole_saved: Array
    again_seconds: Array
    again_bytes: Array
    forced: Bools


def sized(problem: Problem, s: Spans, microbatches: int, *, synced: bool = False) -> Sized:
    """The matrices for this number of microbatches."""
    times: Times = problem.times(microbatches, synced=synced)
    n = problem.samples(microbatches)

    def at(rows: Array) -> Array:
        result: Array = rows[..., 0] + rows[..., 1] * n
        return result

    must = np.zeros(problem.num_blocks, dtype=np.bool_)
    may = np.zeros(problem.num_blocks, dtype=np.bool_)
    if problem.train:
        must[list(problem.recompute)] = True
        may[list(problem.may_recompute)] = True
    saved, kept = at(times.saved), at(times.kept)
    pools = []
    for p in range(len(problem.pools)):
        forward = at(times.forward[p])
        again = np.where(must, forward, 0.0)
        pools.append(
            PoolSpans(
                s.total(forward), s.total(at(times.backward[p]) + again), s.total(at(times.weight[p])),
                s.total(times.whole[p]),
            )
        )  # fmt: skip
    received = s.received_fixed + s.received_per_sample * n
    open_ = may & ~must
    return Sized(
        tuple(pools),
        s.total(np.where(must, kept, saved)),
        s.total(at(times.owed)),
        received,
        np.where(s.gets & (received > 0), problem.latency + received * problem.seconds_per_byte, 0.0),
        s.largest(at(times.transient)),
        s.largest(saved),
        s.total(times.whole_saved),
        np.stack([np.where(open_, at(times.forward[p]), 0.0) for p in range(len(problem.pools))]),
        np.where(open_, np.maximum(saved - kept, 0.0), 0.0),
        s.total(must.astype(np.float64)) > 0,
    )  # fmt: skip
