"""Stages: the fastest division into pipeline stages with replicas and recomputation, by dynamic programming.

Over chains of ideals (Tarnawski et al., 2020; contiguous runs where the block graph is a chain or large):
value[used, a] is the least sum of ``fill`` over stages covering everything after ideal a with the devices ``used``,
where no stage's ``steady`` exceeds a cap. The step time is sum + max, so the cap is searched by branch and bound
between the least possible maximum and the one of the least sum: exact, since a cap interval is dropped only when its
bound (sum at its upper end + its lower end) is no better than a plan in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from partita.cost.memory import Alive, alive
from partita.planners.cover import EXACT_BLOCKS, Thresholds, cover
from partita.planners.ideals import ideals
from partita.planners.objective import candidate_seconds, fits, is_joined, stage_bytes, static_bytes, tail_seconds
from partita.planners.problem import (
    Array,
    Candidate,
    Feasible,
    Infeasible,
    Optimal,
    Outcome,
    Problem,
    StageChoice,
)
from partita.planners.spans import Bools, Indices, Sized, Spans, sized, spans, with_weights

Used = tuple[int, ...]
NEARBY = 1.15


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Some of the spans: from ideal ``first`` to ideal ``last``, in rows of one ``first`` each (``rows``: which) that
    begin at ``starts``."""

    first: Indices
    last: Indices
    rows: Indices
    starts: Indices

    @staticmethod
    def of(first: Indices, last: Indices) -> _Spans:
        starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]])) if len(first) else first
        return _Spans(first, last, first[starts], starts)

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
class _Move:
    """A stage of ``replicas`` devices of ``pool`` put before stages on the devices used; seconds of each span that can
    be one."""

    pool: int
    replicas: int
    spans: _Spans
    fill: Array
    steady: Array


@dataclass(frozen=True, slots=True, eq=False)
class _Base:
    """The spans (``index``) that may be a stage of ``replicas`` devices of ``pool`` somewhere, whatever the others are:
    seconds without recomputation, and bytes: what stays (``static``), what each microbatch holds and owes.
    """

    pool: int
    replicas: int
    index: Indices
    spans: _Spans
    fill: Array
    steady: Array
    static: Array
    held: Array
    owed: Array
    largest: Array
    forced: Bools
    gains: Array

    def kept(self, which: Bools) -> _Base:
        if which.all():
            return self
        return _Base(
            self.pool, self.replicas, self.index[which], _Spans.of(self.spans.first[which], self.spans.last[which]),
            self.fill[which], self.steady[which], self.static[which], self.held[which], self.owed[which],
            self.largest[which], self.forced[which], self.gains[which],
        )  # fmt: skip

    def need(self, living: Alive) -> Array:
        """Bytes without recomputation beyond what is forced."""
        need = self.static + living.peak(self.held, self.owed)
        return np.where(self.forced, self.again(living), need) if self.forced.any() else need

    def again(self, living: Alive) -> Array:
        """Bytes where something is recomputed, what that gains not taken off."""
        result: Array = self.static + living.peak(self.held, self.owed, again=True) + self.largest
        return result


@dataclass(frozen=True, slots=True, eq=False)
class _Least:
    """What no plan goes below, each block where it takes least, nothing sent or recomputed. Per ideal: ``fill``, sums
    of fills; ``positive``: the most that a part of it adds to them; ``work``: seconds of one microbatch.

    A stage of r devices has r (fill + steady) of at least m times its work. So of blocks with the work w on d devices
    some stage has m w / d or more, and the step takes that and the fills of all other stages.
    """

    fill: Array
    positive: Array
    work: Array

    @staticmethod
    def of(s: Spans, blocks: Sequence[Array], schedule: str, problem: Problem) -> _Least:
        """``blocks``: on each pool, as in ``Sized``."""
        signs = np.array([1.0, 1.0, -1.0 if schedule == "zero_bubble" else 1.0, 1.0])
        used = np.array([1.0, 1.0, 1.0, 0.0])
        if not problem.train:
            signs, used = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 0.0])
        fill = np.min([signs @ rows for rows in blocks], axis=0)
        work = np.min([used @ rows for rows in blocks], axis=0)
        return _Least(s.reach(fill), s.reach(np.maximum(fill, 0.0)), s.reach(work))

    def with_span(self, s: Spans, both: Array) -> Array:
        """Seconds of a step with a stage that is this span. ``both``: its fill and steady."""
        return self.fill[-1] - (self.fill[s.last] - self.fill[s.first]) + both

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


def stages(
    problem: Problem, *, anywhere: bool = False, keep: int = 6, slack: float = 0.0, best: float = np.inf
) -> Outcome:
    """The best candidate, and up to ``keep`` others: the best of other microbatch counts and schedules.

    ``slack``: a ratio; search stops when nothing can be better than what is in hand by more. ``best``: seconds of a
    plan in hand; nothing slower is looked for.
    """
    downs = ideals(problem, anywhere=anywhere)
    s = spans(problem, downs)
    teams = {pool.members: p for p, pool in enumerate(problem.pools) if pool.members > 1}
    weights = {1: s} | {members: with_weights(s, problem.on(p)) for members, p in teams.items()}
    found: list[Candidate] = []
    ceiling = best
    schedules = problem.schedules if problem.train else problem.schedules[:1]
    exact = True
    bound = np.inf
    for m in sorted(problem.microbatches, key=lambda m: _promise(problem, m)):
        modes = [False, True] if problem.joined and problem.sync and m > 1 else [False]
        for synced in modes:
            sizes = {1: sized(problem, s, m, synced=synced)}
            sizes |= {members: sized(problem.on(p), s, m, synced=synced) for members, p in teams.items()}
            for schedule in schedules:
                search = _Search(problem, weights, sizes, m, schedule, synced)
                limit = ceiling if keep <= 1 else ceiling * NEARBY
                candidate = search.best(limit, slack)
                exact = exact and search.exact
                bound = min(bound, search.bound)
                if candidate is not None and not any(_same(candidate, c) for c in found):
                    found.append(candidate)
                    ceiling = min(ceiling, candidate.seconds)
                if candidate is None and schedule == "1f1b" and limit == search.bound == np.inf:
                    break  # no schedule holds fewer microbatches: nothing fits under the others either
    found.sort(key=lambda c: (c.seconds, len(c.stages), c.microbatches))
    if not found:
        return Infeasible("no division of the model fits the devices' memory and the constraints")
    winner, others = found[0], tuple(found[1 : 1 + keep])
    gap = max(0.0, winner.seconds / bound - 1.0) if 0 < bound < np.inf else 0.0
    if exact and (slack == 0 or gap <= 1e-9):
        return Optimal(winner, others)
    return Feasible(winner, min(gap, slack) if exact else gap, others)


def _promise(problem: Problem, m: int) -> float:
    """Seconds about as few as a step of m microbatches takes: what looks best is searched first, to exclude more."""
    times, n, devices = problem.times(m), problem.samples(m), problem.num_devices
    rows = times.forward + times.backward + times.weight if problem.train else times.forward
    work = float((rows[..., 0] + rows[..., 1] * n).min(axis=0).sum())
    return work * min(1.0 + (m - 1) / devices, float(-(-m // devices)))


def _same(a: Candidate, b: Candidate) -> bool:
    """One stage runs alike under every schedule."""
    return a.stages == b.stages and a.microbatches == b.microbatches and len(a.stages) == 1 and a.seconds >= b.seconds


class _Search:
    """One number of microbatches, one schedule."""

    def __init__(
        self, problem: Problem, weights: Mapping[int, Spans], sizes: Mapping[int, Sized], m: int, schedule: str,
        synced: bool,
    ) -> None:  # fmt: skip
        self.problem, self.m, self.schedule, self.synced = problem, m, schedule, synced
        self.s = weights[1]
        self.of = tuple((weights[pool.members], sizes[pool.members]) for pool in problem.pools)
        self.counts = tuple(len(pool.devices) for pool in problem.pools)
        self.exact = True
        self.bound = self.ceiling = np.inf
        self.moves: dict[tuple[int, int, int], _Move] = {}
        self.bases: dict[tuple[int, int], _Base] = {}
        self.cheapest: dict[int, Thresholds] = {}
        self.start, self.end = 0, len(self.s.ideals) - 1
        self.least = _Least.of(self.s, [at.blocks[pool] for pool, (_, at) in enumerate(self.of)], schedule, problem)

    def steps(self, used: Used) -> Iterator[tuple[_Move, Used]]:
        """Stages that may be put in front when ``used`` devices come to be used; with those used after it."""
        total = sum(used)
        for pool, count in enumerate(used):
            most = min(count, self.m) if self.problem.replicas else min(count, 1)
            if self.synced:
                if total != self.m:
                    continue
                choices = range(self.m, self.m + 1) if most >= self.m else range(0)
            else:
                choices = range(1, most + 1)
            for replicas in choices:
                if self.problem.num_replicas not in (0, replicas):
                    continue
                yield self.move(pool, replicas, total), (*used[:pool], count - replicas, *used[pool + 1 :])

    def move(self, pool: int, replicas: int, reach: int) -> _Move:
        limited = self.problem.pools[pool].memory_bytes < np.inf and self.problem.train
        key = (pool, replicas, reach)
        if key not in self.moves:
            base, devices = self._base(pool, replicas), sum(self.counts)
            early = self.least.before(self.m, devices - reach) < self.ceiling
            late = self.least.behind(self.m, reach - replicas) < self.ceiling
            base = base.kept(early[base.spans.first] & late[base.spans.last])
            within = _Move(pool, replicas, base.spans, base.fill, base.steady)
            self.moves[key] = self._within(base, reach) if limited else within
        return self.moves[key]

    def _base(self, pool: int, replicas: int) -> _Base:
        """Without spans that no plan faster than ``ceiling`` has, or that fit at no position."""
        key = (pool, replicas)
        if key not in self.bases:
            problem, limit = self.problem, self.problem.pools[pool].memory_bytes
            s, at = self.of[pool]
            ok = s.allowed[pool]
            if not problem.train:
                ok = ok & (s.weight_bytes + at.received + at.transient <= limit)
            fill, steady = self._seconds(pool, replicas)
            ok = ok & (self.least.with_span(s, fill + steady) < self.ceiling)
            mine = -(-self.m // replicas)
            static = static_bytes(problem, s.weight_bytes, s.trained_bytes, replicas, problem.pools[pool].shared, mine)
            static = static + at.whole_saved + at.received + at.transient
            base = _Base(
                pool, replicas, np.arange(len(fill)), _Spans.of(s.first, s.last), fill, steady, static,
                at.held + at.received, at.owed + at.received, at.largest_saved, at.forced, at.gains,
            ).kept(ok)  # fmt: skip
            if limit < np.inf and problem.train:
                ends = [self._alive(replicas, reach) for reach in (replicas, problem.num_devices)]
                need = [(base.need(end), base.again(end) - base.gains * end.before) for end in ends]
                base = base.kept(np.minimum.reduce([row for pair in need for row in pair]) <= limit)
            self.bases[key] = base
        return self.bases[key]

    def _alive(self, replicas: int, reach: int) -> Alive:
        return alive(
            self.schedule, microbatches=-(-self.m // replicas), replicas=replicas, devices_after=reach,
            devices=self.problem.num_devices, joined=is_joined(self.problem, 1 if self.synced else 2, replicas, self.m),
        )  # fmt: skip

    def _within(self, base: _Base, reach: int) -> _Move:
        """The move where memory allows it, with the recomputation it takes."""
        pool, replicas, limit = base.pool, base.replicas, self.problem.pools[base.pool].memory_bytes
        living = self._alive(replicas, reach)
        short = base.need(living) > limit
        if not short.any():
            return _Move(pool, replicas, base.spans, base.fill, base.steady)
        wanted = base.again(living)[short] - limit
        extra = np.zeros(len(short))
        extra[short] = self._recompute(base, np.flatnonzero(short), wanted, living.before)
        ok = np.isfinite(extra)
        found = _Spans.of(base.spans.first[ok], base.spans.last[ok])
        if not (short & ok).any():
            return _Move(pool, replicas, found, base.fill[ok], base.steady[ok])
        fill, steady = self._seconds(pool, replicas, base.index[ok], extra[ok])
        return _Move(pool, replicas, found, fill, steady)

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
        if not problem.train:
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

    def _recompute(self, base: _Base, short: Indices, wanted: Array, before: int) -> Array:
        """Least extra seconds so that each of the spans ``short`` of ``base`` holds as much less as ``wanted``.
        ``before``: microbatches that do."""
        s, at = self.of[base.pool]
        extra = np.full(wanted.shape, np.inf)
        extra[wanted <= 0] = 0.0
        where = (wanted > 0) & (base.gains[short] * before >= wanted)
        if not where.any():
            return extra
        first, last = base.spans.first[short][where], base.spans.last[short][where]
        if s.before.shape[1] > EXACT_BLOCKS and s.is_chain:
            self.exact = False
            extra[where] = self._thresholds(base.pool).least(first, last, wanted[where] / before)
            return extra
        found = []
        gains = at.again_bytes * before
        for a, b, need in zip(first, last, wanted[where], strict=True):
            members = np.nonzero(s.before[b] & ~s.before[a])[0]
            if np.count_nonzero(gains[members] > 0) > EXACT_BLOCKS:
                self.exact = False
            one = cover(list(at.again_seconds[base.pool][members]), list(gains[members]), float(need))
            found.append(np.inf if one is None else one[0])
        extra[where] = found
        return extra

    def _thresholds(self, pool: int) -> Thresholds:
        if pool not in self.cheapest:
            at = self.of[pool][1]
            self.cheapest[pool] = Thresholds.of(at.again_seconds[pool], at.again_bytes)
        return self.cheapest[pool]

    # -- the dynamic programme

    def _layers(self) -> int:
        limit, exactly = self.problem.max_stages, self.problem.num_stages
        if exactly:
            return exactly
        return limit if 0 < limit < sum(self.counts) else 0

    def _states(self) -> list[Used]:
        every = product(*(range(c + 1) for c in self.counts))
        return sorted(every, key=sum)

    def run(self, cap: float, *, minimax: bool = False) -> tuple[float, list[tuple[_Move, int]]]:
        """Least sum of fills (or least maximum of steadies) with no steady above ``cap``; its stages as
        (move, which of its spans)."""
        limit, exactly = self.problem.max_stages, self.problem.num_stages
        if 0 < limit < exactly or self.end == self.start:
            return np.inf, []
        layers = self._layers()
        size = len(self.s.ideals)
        nothing: Used = tuple(0 for _ in self.counts)
        base = np.full(size, np.inf)
        base[self.end] = 0.0
        value: dict[tuple[Used, int], Array] = {(nothing, 0): base}

        def options(used: Used, layer: int) -> Iterator[tuple[_Move, tuple[Used, int]]]:
            for move, rest in self.steps(used):
                key = (rest, layer - 1 if layers else 0)
                if key in value:
                    yield move, key

        def totals(move: _Move, after: Array, where: slice = slice(None)) -> Array:
            beyond, steady = after[move.spans.last[where]], move.steady[where]
            if minimax:
                return np.maximum(steady, beyond)
            result: Array = move.fill[where] + beyond
            result[steady > cap] = np.inf
            return result

        for used in self._states():
            for layer in () if used == nothing else range(1, layers + 1) if layers else (0,):
                here = np.full(size, np.inf)
                for move, key in options(used, layer):
                    np.minimum(here, move.spans.least(totals(move, value[key]), size), out=here)
                if np.isfinite(here).any():
                    value[used, layer] = here
        finals = [
            (float(v[self.start]), key)
            for key, v in value.items()
            if np.isfinite(v[self.start]) and exactly in (0, key[1])
        ]
        if not finals:
            return np.inf, []
        best, key = min(finals, key=lambda f: (f[0], sum(f[1][0])))
        path: list[tuple[_Move, int]] = []
        a = self.start
        while a != self.end:
            least = value[key][a]
            for move, rest in options(*key):
                where = move.spans.row(a)
                here = totals(move, value[rest], where)
                if len(here) and here.min() == least:
                    path.append((move, where.start + int(here.argmin())))
                    a, key = int(move.spans.last[path[-1][1]]), rest
                    break
        return best, path

    def quick_bound(self) -> float:
        """No plan is faster: all work, each block's where it takes least, perfectly shared by all devices."""
        return float(self.least.work[self.end]) * self.m / sum(self.counts)

    def best(self, ceiling: float, slack: float) -> Candidate | None:
        """The best candidate faster than ``ceiling``; sets ``bound``."""
        self.bound, self.ceiling = self.quick_bound(), ceiling
        if self.bound >= ceiling:
            return None
        low, path = self.run(np.inf, minimax=True)
        if not path:
            self.bound = ceiling  # infinite: nothing fits
            return None
        self.bound = max(self.bound, float(self.least.fill[self.end]) + low)
        if self.bound >= ceiling * (1 - slack):
            return None
        top_sum, top_path = self.run(np.inf)
        self.bound = top_sum + low
        if self.bound >= ceiling * (1 - slack):
            return None
        winner: list[tuple[_Move, int]] | None = None
        winning = ceiling

        def consider(found: list[tuple[_Move, int]], total: float) -> float:
            nonlocal winner, winning
            high = max(float(move.steady[k]) for move, k in found)
            if total + high < winning:
                winner, winning = found, total + high
            return high

        high = consider(top_path, top_sum)
        low_sum, low_path = self.run(low)
        consider(low_path, low_sum)
        intervals = [(low, high, top_sum)]
        proven = np.inf
        while intervals:
            intervals.sort(key=lambda i: i[2] + i[0], reverse=True)
            lower, upper, least = intervals.pop()
            if least + lower >= winning * (1 - slack) or lower >= upper:
                proven = min(proven, least + lower)
                continue
            middle = lower + 0.5 * (upper - lower)
            middle = middle if middle < upper else lower
            if upper - lower <= 1e-12 * upper:
                middle = lower
            total, path = self.run(middle)
            if path:
                reached = consider(path, total)
                if reached > lower and middle > lower:
                    intervals.append((lower, min(reached, middle), total))
            if middle > lower:
                intervals.append((middle, upper, least))
        self.bound = min(winning, proven)
        return self._candidate(winner) if winner is not None else None

    def _candidate(self, path: list[tuple[_Move, int]]) -> Candidate:
        problem, s = self.problem, self.s
        after = sum(move.replicas for move, _ in path)
        chosen: list[StageChoice] = []
        for move, k in path:
            within = s.before[move.spans.last[k]] & ~s.before[move.spans.first[k]]
            blocks = tuple(int(x) for x in np.flatnonzero(within))
            choice = StageChoice(blocks, move.pool, move.replicas)
            chosen.append(self._with_recompute(choice, after))
            after -= move.replicas
        candidate = Candidate(tuple(chosen), self.m, self.schedule)
        return replace(candidate, seconds=candidate_seconds(problem, candidate))

    def _with_recompute(self, choice: StageChoice, after: int) -> StageChoice:
        problem = self.problem
        limit = problem.pools[choice.pool].memory_bytes
        joined = is_joined(problem, 1 if self.synced else 2, choice.replicas, self.m)

        def need(c: StageChoice) -> float:
            return stage_bytes(
                problem, c, self.m, self.schedule, devices_after=after, joined=joined,
                synced=problem.joined and not joined,
            )  # fmt: skip

        if not problem.train or need(choice) <= limit:
            return choice
        living = self._alive(choice.replicas, after)
        blocks = np.array(choice.blocks)
        at = self.of[choice.pool][1]
        gains = at.again_bytes[blocks] * living.before
        smallest = int(np.argmin(np.where(gains > 0, gains, np.inf)))
        probe = replace(choice, recompute=(choice.blocks[smallest],))
        wanted = need(probe) + float(gains[smallest]) - limit
        found = cover(list(at.again_seconds[choice.pool][blocks]), list(gains), wanted)
        return replace(choice, recompute=tuple(choice.blocks[i] for i in found[1])) if found is not None else choice


def check_candidate(problem: Problem, candidate: Candidate) -> bool:
    """Whether it covers every block once, on devices there are, within memory."""
    blocks = sorted(b for stage in candidate.stages for b in stage.blocks)
    used = [0] * len(problem.pools)
    for stage in candidate.stages:
        used[stage.pool] += stage.replicas
    enough = all(u <= len(pool.devices) for u, pool in zip(used, problem.pools, strict=True))
    return blocks == list(range(problem.num_blocks)) and enough and fits(problem, candidate)
