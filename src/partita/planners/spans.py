"""Spans: what every possible stage needs: entry k is the stage between ideal ``first[k]`` and ideal ``last[k]``.

Spans stand in rows, by the ideal they begin at. Where the ideals are the prefixes of the block order, what a span takes
from outside is a sum over two prefixes; else it is counted for each pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from partita.planners.objective import lent_gains
from partita.planners.problem import Array, Problem, Times

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]
Entry = tuple[int, int, float]


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """``first``, ``last``: two ideals, one within the other. ``before``: (ideals, blocks) membership."""

    ideals: tuple[int, ...]
    before: Bools
    first: Indices
    last: Indices
    allowed: tuple[Bools, ...]
    weight_bytes: Array
    trained_bytes: Array
    received_fixed: Array
    received_per_sample: Array

    def total(self, values: Array) -> Array:
        """Sum of a per-block value over each span."""
        reach = self.reach(values)
        result: Array = reach[self.last] - reach[self.first]
        return result

    def reach(self, values: Array) -> Array:
        """Sum of a per-block value over each ideal."""
        if self.is_chain:
            return np.concatenate([[0.0], np.cumsum(values)])
        result: Array = np.matmul(self.before, values)
        return result

    def largest(self, values: Array) -> Array:
        """Maximum of a per-block value over each span."""
        if self.is_chain:
            n = self.before.shape[1]
            return np.concatenate([np.maximum.accumulate(values[a:]) for a in range(n)]) if n else np.zeros(0)
        result = np.zeros(len(self.first))
        for b in range(self.before.shape[1]):
            has = ~self.before[self.first, b] & self.before[self.last, b]
            np.maximum(result, np.where(has, values[b], 0.0), out=result)
        return result

    @property
    def is_chain(self) -> bool:
        """Whether the ideals are the prefixes of the block order."""
        return bool(len(self.ideals) == self.before.shape[1] + 1)


def spans(problem: Problem, ideals: Sequence[int]) -> Spans:
    """Everything about the spans that does not depend on microbatches, schedule or replicas."""
    n = problem.num_blocks
    if len(ideals) == n + 1:
        before = np.tri(n + 1, n, -1, dtype=np.bool_)
        first, last = np.triu_indices(n + 1, 1)
    else:
        before = np.array([[bool(mask >> b & 1) for b in range(n)] for mask in ideals], dtype=np.bool_)
        first, last = np.nonzero([[a != b and b & a == a for b in ideals] for a in ideals])
    none = np.zeros(len(first))
    bare = Spans(tuple(ideals), before, first, last, (), none, none, none, none)
    fixed, per_sample = _received(problem, bare)
    allowed = tuple(_allowed(problem, bare, pool) for pool in range(len(problem.pools)))
    found = replace(bare, allowed=allowed, received_fixed=fixed, received_per_sample=per_sample)
    return with_weights(found, problem)


def with_weights(s: Spans, problem: Problem) -> Spans:
    """The same spans with the weights of this problem."""
    total, trained = (
        _union(s, [(w.blocks, value) for w, value in zip(problem.weights, values, strict=True)])
        for values in ([w.nbytes for w in problem.weights], [w.trained for w in problem.weights])
    )
    return replace(s, weight_bytes=total, trained_bytes=trained)


def _union(s: Spans, items: Sequence[tuple[tuple[int, ...], float]]) -> Array:
    """Sum over each span of the values of items that have a block in it."""
    shared: dict[tuple[int, ...], float] = {}
    for blocks, value in items:
        if blocks:
            key = tuple(sorted(set(blocks)))
            shared[key] = shared.get(key, 0.0) + value
    if s.is_chain:
        return _touched(s, (entry for blocks, value in shared.items() for entry in _entries(-1, blocks, value)))
    result = np.zeros(len(s.first))
    for blocks, value in shared.items():
        result += value * _has(s, blocks)
    return result


def _received(problem: Problem, s: Spans) -> tuple[Array, Array]:
    merged: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
    for e in problem.edges:
        consumers = tuple(sorted(set(e.consumers) - {e.producer}))
        if consumers:
            f, p = merged.get((e.producer, consumers), (0.0, 0.0))
            merged[e.producer, consumers] = (f + e.fixed, p + e.per_sample)
    if s.is_chain:
        fixed, per_sample = (
            _touched(s, (entry for (made, taken), v in merged.items() for entry in _entries(made, taken, v[part])))
            for part in (0, 1)
        )
        return fixed, per_sample
    fixed, per_sample = np.zeros(len(s.first)), np.zeros(len(s.first))
    for (producer, consumers), (f, p) in merged.items():
        takes = s.before[s.first, producer] & _has(s, consumers)
        fixed += f * takes
        per_sample += p * takes
    return fixed, per_sample


def _has(s: Spans, blocks: Sequence[int]) -> Bools:
    """Which spans have any of the blocks."""
    count = s.before[:, list(blocks)].sum(axis=1)
    result: Bools = count[s.last] > count[s.first]
    return result


def _entries(after: int, blocks: Sequence[int], value: float) -> Iterable[Entry]:
    """For spans of a chain that begin behind block ``after`` and have any of the blocks: the first of them from there
    on counts, as (least beginning, block, value)."""
    for block in blocks:
        if block > after:
            yield after + 1, block, value
            after = block


def _touched(s: Spans, entries: Iterable[Entry]) -> Array:
    """Sum over each span of a chain of the entries whose block it has and whose beginning is not behind its own."""
    n = s.before.shape[1]
    table = np.zeros((n, n))
    rows, columns, values = [], [], []
    for row, column, value in entries:
        rows.append(row)
        columns.append(column)
        values.append(value)
    np.add.at(table, (rows, columns), values)
    reach = np.cumsum(np.triu(np.cumsum(table, axis=0)), axis=1)
    result: Array = reach[s.first, s.last - 1]
    return result


def _allowed(problem: Problem, s: Spans, pool: int) -> Bools:
    ok = np.ones(len(s.first), dtype=np.bool_)
    for group in problem.together:
        unique = sorted(set(group))
        count = s.before[:, unique].sum(axis=1)
        got = count[s.last] - count[s.first]
        ok &= (got == 0) | (got == len(unique))
    for b in problem.breaks:
        early, late = s.before[:, :b].sum(axis=1), s.before[:, b:].sum(axis=1)
        ok &= ~((early[s.last] > early[s.first]) & (late[s.last] > late[s.first]))
    for block, pools in problem.pools_of:
        if pool not in pools:
            ok &= s.before[s.last, block] == s.before[s.first, block]
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
    (blocks), what recomputing a block costs and saves; 0 bytes where it may not be. ``blocks``: (pools, 4, blocks)
    seconds of each block: forward, backward, weight, once a step. ``gains``: ``again_bytes`` of all blocks of a span.
    ``away_seconds``, ``away_bytes`` (pools, blocks): what offloading a block costs and frees there; ``sent_away``:
    spans with a block that must be; ``largest_gone``: of each span, what leaves at most of one block. ``lent``: what
    lending parameters comes to.
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
    blocks: Array
    gains: Array
    away_seconds: Array
    away_bytes: Array
    sent_away: Bools
    largest_gone: Array
    lent: LentSpans


@dataclass(frozen=True, slots=True, eq=False)
class LentSpans:
    """Of each block that may be lent: ``sizes`` (bytes of a copy, else 0), ``gains`` (bytes it frees on a device),
    ``update`` (seconds, once a step), and (pools, blocks) ``waits`` of a microbatch where it is lent, ``both`` where
    its activations are offloaded besides. Of each span, for what must be: ``total`` and ``largest`` copy, ``gained``,
    ``updates``. ``pools``: where any of it is done.
    """

    pools: tuple[bool, ...]
    sizes: Array
    gains: Array
    update: Array
    waits: Array
    both: Array
    total: Array
    largest: Array
    gained: Array
    updates: Array


def sized(problem: Problem, s: Spans, microbatches: int, *, synced: bool = False) -> Sized:
    """The numbers for this number of microbatches."""
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
    forward = at(times.forward)
    blocks = np.stack([forward, at(times.backward) + np.where(must, forward, 0.0), at(times.weight), times.whole], 1)
    received = s.received_fixed + s.received_per_sample * n
    hosts = np.array([pool.host for pool in problem.pools]) if problem.train else np.zeros(len(problem.pools))
    pools, gone = range(len(hosts)), np.zeros(problem.num_blocks)
    leave, leaves = np.zeros(problem.num_blocks, dtype=np.bool_), np.zeros(problem.num_blocks, dtype=np.bool_)
    waits = np.zeros((len(hosts), problem.num_blocks))
    if hosts.any() and (problem.may_offload or problem.offload):
        leave[list(problem.offload)] = True
        leaves[list(problem.may_offload)] = True
        gone = times.gone_at(n)
        waits = np.array([times.waits(n, p, gone * hosts[p]) for p in pools])
        blocks[:, 1] += np.where(leave, waits, 0.0)
    lends = np.zeros(problem.num_blocks, dtype=np.bool_)
    lends[list(problem.lend)] = True
    open_ = may & ~must & ~leave & ~lends
    sendable = leaves & ~must & ~leave & ~lends
    lent = _lent(problem, s, times, n, lends, must | leave, gone)
    if problem.lend:
        blocks[:, 1 if problem.train else 0] += np.where(lends, lent.waits, 0.0)
    again_bytes = np.where(open_, np.maximum(saved - kept, 0.0), 0.0)
    return Sized(
        tuple(PoolSpans(*(s.total(row) for row in rows)) for rows in blocks),
        s.total(np.where(must, kept, saved) - np.where(leave, gone, 0.0)),
        s.total(at(times.owed)),
        received,
        np.where(received > 0, problem.latency + received * problem.seconds_per_byte, 0.0),
        s.largest(at(times.transient)),
        s.largest(saved),
        s.total(times.whole_saved),
        np.where(open_, forward, 0.0),
        again_bytes,
        s.total(must.astype(np.float64)) > 0,
        blocks,
        s.total(again_bytes),
        waits,
        np.where(sendable, gone, 0.0) * (hosts > 0)[:, None],
        s.total(leave.astype(np.float64)) > 0 if leave.any() else np.zeros(len(s.first), dtype=np.bool_),
        s.largest(gone) if gone.any() else np.zeros(len(s.first)),
        lent,
    )


def _lent(problem: Problem, s: Spans, times: Times, n: int, lends: Bools, other: Bools, gone: Array) -> LentSpans:
    """``lends``: blocks that must be lent; ``other``: that are kept in another way; ``gone``: what offload moves."""
    pools = tuple(problem.lends(p) for p in range(len(problem.pools)))
    blocks, none = problem.num_blocks, np.zeros(len(s.first))
    zeros = np.zeros((len(pools), blocks))
    if not any(pools) or not (problem.lend or problem.may_lend):
        return LentSpans(
            (False,) * len(pools), zeros[0], zeros[0], zeros[0], zeros, zeros, none, none, none, none
        )  # fmt: skip
    size, trained = problem.lendable.T
    gains, update = lent_gains(problem), problem.update * trained * problem.train
    open_ = np.zeros(blocks, dtype=np.bool_)
    open_[list(problem.may_lend)] = True
    open_ &= ~lends & ~other
    waits, both = zeros, zeros.copy()
    for p, pool in enumerate(problem.pools):
        if pools[p]:
            home = trained * pool.host * problem.train
            waits[p] = times.waits(n, p, size * pool.host, train=problem.train) + home
            both[p] = times.waits(n, p, (size + gone) * pool.host, train=problem.train) + home
    must = [np.where(lends, row, 0.0) for row in (size, gains, update)]
    return LentSpans(
        pools, np.where(open_, size, 0.0), np.where(open_, gains, 0.0), update, waits, both,
        s.total(must[0]), s.largest(must[0]), s.total(must[1]), s.total(must[2]),
    )  # fmt: skip
