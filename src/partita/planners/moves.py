"""Moves: spans as stages: what each takes on so many devices of a pool, with the recomputation that memory asks for.

Spans that no plan faster than one in hand has, and those that fit at no position, are left out (``Least``; decision
0024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partita.cost.memory import Alive, alive
from partita.planners.cover import EXACT_BLOCKS, Thresholds, spare
from partita.planners.objective import is_joined, static_bytes, tail_seconds
from partita.planners.problem import Array, Problem
from partita.planners.relief import PLAIN, How, Way, hows
from partita.planners.spans import Bools, Indices, Sized, Spans


@dataclass(frozen=True, slots=True, eq=False)
class Some:
    """Some of the spans: from ideal ``first`` to ideal ``last``, in rows of one ``first`` each (``rows``: which) that
    begin at ``starts``."""

    first: Indices
    last: Indices
    rows: Indices
    starts: Indices

    @staticmethod
    def of(first: Indices, last: Indices) -> Some:
        starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]])) if len(first) else first
        return Some(first, last, first[starts], starts)

    def least(self, values: Array, size: int) -> Array:
        """For each ideal the least value of its row; infinite where it has none."""
        result = np.full(size, np.inf)
        if len(self.first):
            result[self.rows] = np.minimum.reduceat(values, self.starts)
        return result

    def row(self, ideal: int) -> slice:
        """Where the spans from this ideal stand."""
        return slice(*np.searchsorted(self.first, [ideal, ideal + 1]))


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A stage of ``replicas`` devices of ``pool`` put before stages on the devices used; seconds of each span that can
    be one."""

    pool: int
    replicas: int
    spans: Some
    fill: Array
    steady: Array


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The spans (``index``) that may be a stage of ``replicas`` devices of ``pool`` somewhere, whatever the others are:
    seconds without recomputation, and bytes: what stays (``static``), what each microbatch holds and owes. ``lent``,
    ``lent_largest``: copies of parameters that must be lent; ``lent_gains``: of all that may be besides (none:
    nothing is lent there).
    """

    pool: int
    replicas: int
    index: Indices
    spans: Some
    fill: Array
    steady: Array
    static: Array
    held: Array
    owed: Array
    largest: Array
    forced: Bools
    gains: Array
    buffers: Array
    sent_away: Bools
    away_gains: Array
    both_gains: Array
    lent: Array
    lent_largest: Array
    lent_gains: Array

    def kept(self, which: Bools) -> Base:
        if which.all():
            return self
        return Base(
            self.pool, self.replicas, self.index[which],
            Some.of(self.spans.first[which], self.spans.last[which]), self.fill[which], self.steady[which],
            self.static[which], self.held[which], self.owed[which], self.largest[which], self.forced[which],
            self.gains[which], self.buffers[which], self.sent_away[which], self.away_gains[which],
            self.both_gains[which],
            *(row[which] if len(row) else row for row in (self.lent, self.lent_largest, self.lent_gains)),
        )  # fmt: skip

    def need(self, living: Alive, how: How = PLAIN) -> Array:
        """Bytes with what is forced; where blocks hold less in some way (``how``) besides, what that gains not taken
        off."""
        static = self.static
        if len(self.lent):
            static = static + how.copies(self.lent, self.lent_largest)
        plain: Array = static + living.peak(self.held, self.owed)
        recomputes, offloads = self.forced | how.again, self.sent_away | how.away
        if not (recomputes.any() or offloads.any()):
            return plain
        with_either = static + living.peak(self.held, self.owed, again=True)
        with_either = with_either + np.where(recomputes, self.largest, 0.0) + np.where(offloads, self.buffers, 0.0)
        return np.where(recomputes | offloads, with_either, plain)

    def least(self, living: Alive, *, hosted: bool) -> Array:
        """Bytes that no choice of what is recomputed, offloaded and lent goes below."""
        before = living.before
        found = np.minimum(self.need(living), self.need(living, How(again=True)) - self.gains * before)
        if hosted:
            found = np.minimum(found, self.need(living, How(away=True)) - self.away_gains * before)
            found = np.minimum(found, self.need(living, How(again=True, away=True)) - self.both_gains * before)
        return found - self.lent_gains if len(self.lent) else found


@dataclass(frozen=True, slots=True, eq=False)
class Least:
    """What no plan goes below, each block where it takes least, nothing sent or recomputed. Per ideal: ``fill``, sums
    of fills; ``positive``: the most that a part of it adds to them; ``work``: seconds of one microbatch.

    A stage of r devices has r (fill + steady) of at least m times its work. So of blocks with the work w on d devices
    some stage has m w / d or more, and the step takes that and the fills of all other stages.
    """

    fill: Array
    positive: Array
    work: Array

    @staticmethod
    def of(s: Spans, blocks: Sequence[Array], schedule: str, problem: Problem) -> Least:
        """``blocks``: on each pool, as in ``Sized``."""
        signs = np.array([1.0, 1.0, -1.0 if schedule == "zero_bubble" else 1.0, 1.0])
        used = np.array([1.0, 1.0, 1.0, 0.0])
        if not problem.train:
            signs, used = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 0.0])
        fill = np.min([signs @ rows for rows in blocks], axis=0)
        work = np.min([used @ rows for rows in blocks], axis=0)
        return Least(s.reach(fill), s.reach(np.maximum(fill, 0.0)), s.reach(work))

    def with_span(self, s: Spans, both: Array) -> Array:
        """Seconds of a step with a stage that is this span. ``both``: its fill and steady."""
        result: Array = self.fill[-1] - (self.fill[s.last] - self.fill[s.first]) + both
        return result

    def before(self, m: int, devices: int) -> Array:
        """Seconds of a step whose blocks before the ideal are on so many devices."""
        return self._on(self.positive, self.work, m, devices)

    def behind(self, m: int, devices: int) -> Array:
        """The same of those that are not in the ideal."""
        return self._on(self.positive[-1] - self.positive, self.work[-1] - self.work, m, devices)

    def _on(self, positive: Array, work: Array, m: int, devices: int) -> Array:
        tiny = 1e-12 * self.work[-1]
        share = m * work / devices if devices else np.where(work > tiny, np.inf, 0.0)
        return np.where(work > tiny, self.fill[-1] - positive + share, 0.0)


class Moves:
    """The stages of one number of microbatches, one schedule, one ``ceiling``: seconds of a plan in hand.

    ``weights``, ``sizes``: the spans by number of members. ``exact``: whether recomputation was chosen exactly.
    """

    def __init__(
        self, problem: Problem, weights: Mapping[int, Spans], sizes: Mapping[int, Sized], m: int, schedule: str,
        synced: bool, ceiling: float,
    ) -> None:  # fmt: skip
        self.problem, self.m, self.schedule, self.synced, self.ceiling = problem, m, schedule, synced, ceiling
        self.of = tuple((weights[pool.members], sizes[pool.members]) for pool in problem.pools)
        self.least = Least.of(weights[1], [at.blocks[pool] for pool, (_, at) in enumerate(self.of)], schedule, problem)
        self.exact = True
        self.known: dict[tuple[int, int, int], Move] = {}
        self.bases: dict[tuple[int, int], Base] = {}
        self.cheapest: dict[tuple[int, How, int, int], tuple[Thresholds, ...]] = {}

    def move(self, pool: int, replicas: int, reach: int) -> Move:
        limited = self.problem.pools[pool].memory_bytes < np.inf
        key = (pool, replicas, reach)
        if key not in self.known:
            base = self._base(pool, replicas)
            early = self.least.before(self.m, self.problem.num_devices - reach) < self.ceiling
            late = self.least.behind(self.m, reach - replicas) < self.ceiling
            base = base.kept(early[base.spans.first] & late[base.spans.last])
            within = Move(pool, replicas, base.spans, base.fill, base.steady)
            self.known[key] = self._within(base, reach) if limited else within
        return self.known[key]

    def _base(self, pool: int, replicas: int) -> Base:
        """Without spans that no plan faster than ``ceiling`` has, or that fit at no position."""
        key = (pool, replicas)
        if key not in self.bases:
            problem, limit = self.problem, self.problem.pools[pool].memory_bytes
            s, at = self.of[pool]
            fill, steady = self._seconds(pool, replicas)
            ok = s.allowed[pool] & (self.least.with_span(s, fill + steady) < self.ceiling)
            mine = -(-self.m // replicas)
            static = static_bytes(problem, s.weight_bytes, s.trained_bytes, replicas, problem.pools[pool].shared, mine)
            static = static + at.whole_saved * problem.train + at.received + at.transient
            held, owed = ((row + at.received) * problem.train for row in (at.held, at.owed))
            lends, none = at.lent.pools[pool], np.zeros(0)
            if lends:
                static = static - at.lent.gained
            base = Base(
                pool, replicas, np.arange(len(fill)), Some.of(s.first, s.last), fill, steady, static,
                held, owed, at.largest_saved, at.forced, at.gains, 2.0 * at.largest_gone, at.sent_away,
                *self._away(pool), at.lent.total if lends else none, at.lent.largest if lends else none,
                s.total(at.lent.gains) if lends else none,
            ).kept(ok)  # fmt: skip
            if limit < np.inf:
                ends = [self.alive(replicas, reach) for reach in (replicas, problem.num_devices)]
                need = [base.least(end, hosted=self._hosted(pool)) for end in ends]
                base = base.kept(np.minimum(*need) <= limit)
            self.bases[key] = base
        return self.bases[key]

    def alive(self, replicas: int, reach: int) -> Alive:
        return alive(
            self.schedule, microbatches=-(-self.m // replicas), replicas=replicas, devices_after=reach,
            devices=self.problem.num_devices, joined=is_joined(self.problem, 1 if self.synced else 2, replicas, self.m),
        )  # fmt: skip

    def _within(self, base: Base, reach: int) -> Move:
        """The move where memory allows it, with the recomputation it takes."""
        pool, replicas, limit = base.pool, base.replicas, self.problem.pools[base.pool].memory_bytes
        living = self.alive(replicas, reach)
        short = base.need(living) > limit
        if not short.any():
            return Move(pool, replicas, base.spans, base.fill, base.steady)
        extra = np.zeros(len(short))
        extra[short] = self._spare(base, np.flatnonzero(short), living, limit)
        ok = np.isfinite(extra)
        found = Some.of(base.spans.first[ok], base.spans.last[ok])
        if not (short & ok).any():
            return Move(pool, replicas, found, base.fill[ok], base.steady[ok])
        fill, steady = self._seconds(pool, replicas, base.index[ok], extra[ok])
        return Move(pool, replicas, found, fill, steady)

    def _seconds(
        self, pool: int, replicas: int, index: Indices | slice = slice(None), extra: Array | float = 0.0
    ) -> tuple[Array, Array]:
        """(fill, steady) of the spans, as ``cost.pipeline`` has them for one stage."""
        problem = self.problem
        s, at = self.of[pool]
        mine = -(-self.m // replicas)
        seconds, transfer, whole = at.pools[pool], at.transfer[index], at.pools[pool].whole[index]
        tail = tail_seconds(problem, s.trained_bytes[index], replicas, problem.pools[pool].shared, mine)
        forward = seconds.forward[index]
        if problem.lend and at.lent.pools[pool]:
            extra = extra + at.lent.updates[index] / mine
        if not problem.train:
            forward = forward + extra
            return forward + transfer + whole, (mine - 1) * np.maximum(forward, transfer) + tail
        rest = forward + seconds.backward[index] + extra
        busy = rest + seconds.weight[index]
        if self.schedule == "zero_bubble":
            own = np.maximum(rest - seconds.weight[index], 0.0)
            steady = mine * busy - own + (mine - 1) * 2.0 * transfer + tail
            return own + 2.0 * transfer + whole, steady
        fill = busy + 2.0 * transfer + whole
        if self.schedule == "gpipe":
            return fill, (mine - 1) * np.maximum(busy, 2.0 * transfer) + tail
        return fill, (mine - 1) * (busy + 2.0 * transfer) + tail

    def _hosted(self, pool: int) -> bool:
        """Whether anything may be offloaded there."""
        return bool(self.problem.may_offload) and self.problem.pools[pool].host > 0

    def _away(self, pool: int) -> tuple[Array, Array]:
        """Of each span, what all of it gains when it is offloaded, or the better way for each block."""
        s, at = self.of[pool]
        if not self._hosted(pool):
            return at.gains, at.gains
        away = at.away_bytes[pool]
        return s.total(away), s.total(np.maximum(away, at.again_bytes))

    def _spare(self, base: Base, short: Indices, living: Alive, limit: float) -> Array:
        """Least extra seconds so that each of the spans ``short`` of ``base`` stays within ``limit``, in any way."""
        extra = np.full(len(short), np.inf)
        open_, every = hows(self.problem, self.of[base.pool][1], base.pool)
        self.exact = self.exact and every
        for how in open_:
            wanted = base.need(living, how)[short] - limit
            extra = np.minimum(extra, self._least(base, short, wanted, how, living.before))
        return extra

    def _least(self, base: Base, short: Indices, wanted: Array, how: How, before: int) -> Array:
        """Least extra seconds so that each of the spans holds as much less as ``wanted``. ``before``: microbatches held
        at once."""
        extra = np.full(wanted.shape, np.inf)
        extra[wanted <= 0] = 0.0
        s = self.of[base.pool][0]
        mine = -(-self.m // base.replicas)
        if not how.level:  # all that is gained is gained a microbatch
            wanted, mine, before = wanted / before, 1, 1
        key = base.pool, how, mine, before
        where = (wanted > 0) & (self._most(base, short, key) >= wanted)
        if not where.any():
            return extra
        first, last, wanted = base.spans.first[short][where], base.spans.last[short][where], wanted[where]
        if s.before.shape[1] > EXACT_BLOCKS and s.is_chain:
            self.exact = False
            extra[where] = np.minimum.reduce([t.least(first, last, wanted) for t in self._thresholds(key)])
            return extra
        found = []
        ways = self._ways(key)
        for a, b, need_ in zip(first, last, wanted, strict=True):
            members = np.nonzero(s.before[b] & ~s.before[a])[0]
            here = [(list(seconds[members]), list(gains[members])) for seconds, gains in ways]
            if np.count_nonzero(np.any([np.array(gains) > 0 for _, gains in here], axis=0)) > EXACT_BLOCKS:
                self.exact = False
            one = spare(here, float(need_))
            found.append(np.inf if one is None else one[0])
        extra[where] = found
        return extra

    def _ways(self, key: tuple[int, How, int, int]) -> tuple[Way, ...]:
        pool, how, mine, before = key
        return how.ways(self.of[pool][1], pool, mine, before)

    def _most(self, base: Base, short: Indices, key: tuple[int, How, int, int]) -> Array:
        """Bytes that each of the spans can hold less at most."""
        how = key[1]
        if not how.level:
            return (base.both_gains if how.again and how.away else base.away_gains if how.away else base.gains)[short]
        reach = self.of[base.pool][0].reach(np.max([gains for _, gains in self._ways(key)], axis=0))
        result: Array = reach[base.spans.last[short]] - reach[base.spans.first[short]]
        return result * (1 + 1e-12)

    def _thresholds(self, key: tuple[int, How, int, int]) -> tuple[Thresholds, ...]:
        """Of several ways for a block: the one that gains most a second, and the one that gains most."""
        if key not in self.cheapest:
            rows = list(self._ways(key))
            if len(rows) > 1:
                seconds, gains = (np.array(part) for part in zip(*rows, strict=True))
                ratio = np.where(gains > 0, seconds / np.where(gains > 0, gains, 1.0), np.inf)
                at, rows = np.arange(seconds.shape[1]), []
                for pick in (ratio.argmin(axis=0), gains.argmax(axis=0)):
                    rows.append((seconds[pick, at], gains[pick, at]))
            self.cheapest[key] = tuple(Thresholds.of(*row) for row in rows)
        return self.cheapest[key]
