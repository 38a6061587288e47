"""Stages: the fastest division into pipeline stages with replicas and recomputation, by dynamic programming.

Over chains of ideals (Tarnawski et al., 2020; contiguous runs where the block graph is a chain or large):
value[used, a] is the least sum of ``fill`` over stages covering everything after ideal a with the devices ``used``,
where no stage's ``steady`` exceeds a cap. The step time is sum + max, so the cap is searched by branch and bound
between the least possible maximum and the one of the least sum: exact, since a cap interval is dropped only when its
bound (sum at its upper end + its lower end) is no better than a plan in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from partita.cost.memory import alive
from partita.planners.cover import EXACT_BLOCKS, cover, cover_spans
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
from partita.planners.spans import Bools, Sized, Spans, sized, spans, with_weights

Used = tuple[int, ...]
NEARBY = 1.15


@dataclass(frozen=True, slots=True, eq=False)
class _Move:
    """A stage of ``replicas`` devices of ``pool`` put before stages on ``used`` devices; fill and steady per span."""

    pool: int
    replicas: int
    fill: Array
    steady: Array


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
    for m in problem.microbatches:
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
        self.bases: dict[tuple[int, int], _Move] = {}
        self.start, self.end = 0, len(self.s.ideals) - 1

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
        key = (pool, replicas, reach if limited else 0)
        if key not in self.moves:
            base = self._base(pool, replicas)
            self.moves[key] = self._within(base, pool, replicas, reach) if limited else base
        return self.moves[key]

    def _base(self, pool: int, replicas: int) -> _Move:
        """Without a look at memory (but for parameters and buffers where nothing is trained)."""
        key = (pool, replicas)
        if key not in self.bases:
            problem = self.problem
            s, at = self.of[pool]
            ok = s.allowed[pool]
            if not problem.train:
                ok = ok & (s.weight_bytes + at.received + at.transient <= problem.pools[pool].memory_bytes)
            fill, steady = self._seconds(pool, replicas, 0.0)
            self.bases[key] = _Move(pool, replicas, np.where(ok, fill, np.inf), np.where(ok, steady, np.inf))
        return self.bases[key]

    def _within(self, base: _Move, pool: int, replicas: int, reach: int) -> _Move:
        """The move where memory allows it, with the recomputation it takes."""
        problem, m = self.problem, self.m
        s, at = self.of[pool]
        joined = is_joined(problem, 1 if self.synced else 2, replicas, m)
        limit, mine = problem.pools[pool].memory_bytes, -(-m // replicas)
        living = alive(
            self.schedule, microbatches=mine, replicas=replicas, devices_after=reach,
            devices=problem.num_devices, joined=joined,
        )  # fmt: skip
        static = static_bytes(problem, s.weight_bytes, s.trained_bytes, replicas, problem.pools[pool].shared, mine)
        static = static + at.whole_saved + at.received + at.transient
        held, owed = at.held + at.received, at.owed + at.received
        need = static + living.peak(held, owed)
        if at.forced.any():
            again = static + living.peak(held, owed, again=True) + at.largest_saved
            need = np.where(at.forced, again, need)
        short = s.allowed[pool] & (need > limit)
        if not short.any():
            return base
        useful = short & (base.fill + base.steady < self.ceiling)
        again = static + living.peak(held, owed, again=True) + at.largest_saved
        extra = self._recompute(pool, again - limit, living.before, useful)
        bought = short & np.isfinite(extra)
        if not bought.any():
            return _Move(pool, replicas, np.where(short, np.inf, base.fill), np.where(short, np.inf, base.steady))
        fill, steady = self._seconds(pool, replicas, np.where(bought, extra, 0.0))
        ok = s.allowed[pool] & (~short | bought)
        return _Move(pool, replicas, np.where(ok, fill, np.inf), np.where(ok, steady, np.inf))

    def _seconds(self, pool: int, replicas: int, extra: Array | float) -> tuple[Array, Array]:
        """(fill, steady) of each span, as ``cost.pipeline`` has them for one stage."""
        problem = self.problem
        s, at = self.of[pool]
        mine = -(-self.m // replicas)
        seconds, transfer = at.pools[pool], at.transfer
        tail = tail_seconds(problem, s.trained_bytes, replicas, problem.pools[pool].shared, mine)
        if not problem.train:
            fill = seconds.forward + transfer + seconds.whole
            return fill, (mine - 1) * np.maximum(seconds.forward, transfer) + tail
        rest = seconds.forward + seconds.backward + extra
        busy = rest + seconds.weight
        if self.schedule == "zero_bubble":
            own = np.maximum(rest - seconds.weight, 0.0)
            steady = mine * busy - own + (mine - 1) * 2.0 * transfer + tail
            return own + 2.0 * transfer + seconds.whole, steady
        fill = busy + 2.0 * transfer + seconds.whole
        if self.schedule == "gpipe":
            return fill, (mine - 1) * np.maximum(busy, 2.0 * transfer) + tail
        return fill, (mine - 1) * (busy + 2.0 * transfer) + tail

    def _recompute(self, pool: int, wanted: Array, before: int, short: Bools) -> Array:
        """Least extra seconds so that a span holds as much less as ``wanted``. ``before``: microbatches that do."""
        s, at = self.of[pool]
        extra = np.full(wanted.shape, np.inf)
        gains = at.again_bytes * before
        open_ = s.total(gains)
        where = short & (open_ >= wanted)
        forced_enough = short & (wanted <= 0)
        extra[forced_enough] = 0.0
        where &= ~forced_enough
        if not where.any():
            return extra
        if s.before.shape[1] > EXACT_BLOCKS and s.is_chain:
            self.exact = False
            found = cover_spans(at.again_seconds[pool], gains, wanted, where)
            return np.where(where, found, extra)
        for a, b in np.argwhere(where):
            members = np.nonzero(s.before[b] & ~s.before[a])[0]
            if np.count_nonzero(gains[members] > 0) > EXACT_BLOCKS:
                self.exact = False
            found_one = cover(list(at.again_seconds[pool][members]), list(gains[members]), float(wanted[a, b]))
            if found_one is not None:
                extra[a, b] = found_one[0]
        return extra

    # -- the dynamic programme

    def _layers(self) -> int:
        limit, exactly = self.problem.max_stages, self.problem.num_stages
        if exactly:
            return exactly
        return limit if 0 < limit < sum(self.counts) else 0

    def _states(self) -> list[Used]:
        every = product(*(range(c + 1) for c in self.counts))
        return sorted(every, key=sum)

    def run(self, cap: float, *, minimax: bool = False) -> tuple[float, list[tuple[_Move, int, int]]]:
        """Least sum of fills (or least maximum of steadies) with no steady above ``cap``; its stages as
        (move, from ideal, to ideal)."""
        limit, exactly = self.problem.max_stages, self.problem.num_stages
        if 0 < limit < exactly:
            return np.inf, []
        layers = self._layers()
        depth = layers if layers else 1
        size = len(self.s.ideals)
        nothing: Used = tuple(0 for _ in self.counts)
        value: dict[tuple[Used, int], Array] = {}
        back: dict[tuple[Used, int], tuple[Array, Array, list[tuple[_Move, tuple[Used, int]]]]] = {}
        base = np.full(size, np.inf)
        base[self.end] = 0.0
        value[nothing, 0] = base
        for used in self._states():
            if used == nothing:
                continue
            for layer in range(1, depth + 1) if layers else (0,):
                here = np.full(size, np.inf)
                which = np.full(size, -1)
                target = np.full(size, -1)
                options: list[tuple[_Move, tuple[Used, int]]] = []
                for move, rest in self.steps(used):
                    key = (rest, layer - 1 if layers else 0)
                    after = value.get(key)
                    if after is None or not np.isfinite(after).any():
                        continue
                    if minimax:
                        total = np.maximum(move.steady, after[None, :])
                    else:
                        total = np.where(move.steady <= cap, move.fill, np.inf) + after[None, :]
                    to = total.argmin(axis=1)
                    got = total[np.arange(size), to]
                    better = got < here
                    if better.any():
                        here[better], target[better], which[better] = got[better], to[better], len(options)
                        options.append((move, key))
                value[used, layer] = here
                back[used, layer] = (which, target, options)
        finals = [
            (float(v[self.start]), key)
            for key, v in value.items()
            if np.isfinite(v[self.start]) and exactly in (0, key[1])
        ]
        if not finals or self.end == self.start:
            return np.inf, []
        best, key = min(finals, key=lambda f: (f[0], sum(f[1][0])))
        path: list[tuple[_Move, int, int]] = []
        a = self.start
        while a != self.end:
            which, target, options = back[key]
            move, rest_key = options[int(which[a])]
            b = int(target[a])
            path.append((move, a, b))
            a, key = b, rest_key
        return best, path

    def quick_bound(self) -> float:
        """No plan is faster: all work, each block's where it takes least, perfectly shared by all devices."""
        times = [at.pools[pool] for pool, (_, at) in enumerate(self.of)]
        train, first, last = self.problem.train, np.arange(self.end), np.arange(1, self.end + 1)
        rows = [(t.forward + t.backward + t.weight if train else t.forward) for t in times]
        if len(rows) == 1 or not self.s.is_chain:
            least = min(row[self.start, self.end] for row in rows) if len(rows) == 1 else 0.0
        else:
            least = np.min([row[first, last] for row in rows], axis=0).sum()
        return float(least) * self.m / sum(self.counts)

    def best(self, ceiling: float, slack: float) -> Candidate | None:
        """The best candidate faster than ``ceiling``; sets ``bound``."""
        self.bound, self.ceiling = self.quick_bound(), ceiling
        if self.bound >= ceiling:
            return None
        low, path = self.run(np.inf, minimax=True)
        if not path:
            self.bound = np.inf
            return None
        top_sum, top_path = self.run(np.inf)
        self.bound = top_sum + low
        if self.bound >= ceiling * (1 - slack):
            return None
        winner: list[tuple[_Move, int, int]] | None = None
        winning = ceiling

        def consider(found: list[tuple[_Move, int, int]], total: float) -> float:
            nonlocal winner, winning
            high = max(float(move.steady[a, b]) for move, a, b in found)
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

    def _candidate(self, path: list[tuple[_Move, int, int]]) -> Candidate:
        problem, s = self.problem, self.s
        after = sum(move.replicas for move, _, _ in path)
        chosen: list[StageChoice] = []
        for move, a, b in path:
            blocks = tuple(int(x) for x in np.nonzero(s.before[b] & ~s.before[a])[0])
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
        mine = -(-self.m // choice.replicas)
        living = alive(
            self.schedule, microbatches=mine, replicas=choice.replicas, devices_after=after,
            devices=problem.num_devices, joined=joined,
        )  # fmt: skip
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
