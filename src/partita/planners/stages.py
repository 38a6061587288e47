"""Stages: the fastest division into pipeline stages with replicas and recomputation, by dynamic programming.

Over chains of ideals (Tarnawski et al., 2020; contiguous runs where the block graph is a chain or large):
value[used, a] is the least sum of ``fill`` over stages covering everything after ideal a with the devices ``used``,
where no stage's ``steady`` exceeds a cap. The step time is sum + max, so the cap is searched by branch and bound
between the least possible maximum and the one of the least sum: exact, since a cap interval is dropped only when its
bound (sum at its upper end + its lower end) is no better than a plan in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from partita.planners.cover import spare
from partita.planners.ideals import ideals
from partita.planners.moves import Move, Moves
from partita.planners.objective import candidate_seconds, fits, is_joined, stage_bytes
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
from partita.planners.relief import PLAIN, How, Way, hows
from partita.planners.spans import Spans, sized, spans, with_weights

Used = tuple[int, ...]
NEARBY = 1.15


def stages(
    problem: Problem, *, anywhere: bool = False, keep: int = 6, slack: float = 0.0, best: float = np.inf,
    first: bool = False,
) -> Outcome:  # fmt: skip
    """The best candidate, and up to ``keep`` others: the best of other microbatch counts and schedules.

    ``slack``: a ratio; search stops when nothing can be better than what is in hand by more. ``best``: seconds of a
    plan in hand; nothing slower is looked for. ``first``: any plan will do.
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
                limit = ceiling if keep <= 1 else ceiling * NEARBY
                search = _Search(problem, Moves(problem, weights, sizes, m, schedule, synced, limit), weights[1])
                candidate = search.best(slack)
                exact = exact and search.moves.exact
                bound = min(bound, search.bound)
                if candidate is not None and first:
                    return Feasible(candidate, np.inf)
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
    most = slack / (1.0 - slack)  # a plan in hand of 1 is kept where nothing is below 1 - slack
    return Feasible(winner, min(gap, most) if exact else gap, others)


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

    def __init__(self, problem: Problem, moves: Moves, s: Spans) -> None:
        self.problem, self.moves, self.s = problem, moves, s
        self.m, self.schedule, self.synced = moves.m, moves.schedule, moves.synced
        self.counts = tuple(len(pool.devices) for pool in problem.pools)
        self.bound = np.inf
        self.start, self.end = 0, len(s.ideals) - 1

    def steps(self, used: Used) -> Iterator[tuple[Move, Used]]:
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
                yield self.moves.move(pool, replicas, total), (*used[:pool], count - replicas, *used[pool + 1 :])

    # -- the dynamic programme

    def _layers(self) -> int:
        limit, exactly = self.problem.max_stages, self.problem.num_stages
        if exactly:
            return exactly
        return limit if 0 < limit < sum(self.counts) else 0

    def _states(self) -> list[Used]:
        every = product(*(range(c + 1) for c in self.counts))
        return sorted(every, key=sum)

    def run(self, cap: float, *, minimax: bool = False) -> tuple[float, list[tuple[Move, int]]]:
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

        def options(used: Used, layer: int) -> Iterator[tuple[Move, tuple[Used, int]]]:
            for move, rest in self.steps(used):
                key = (rest, layer - 1 if layers else 0)
                if key in value:
                    yield move, key

        def totals(move: Move, after: Array, where: slice = slice(None)) -> Array:
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
        path: list[tuple[Move, int]] = []
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
        return float(self.moves.least.work[self.end]) * self.m / sum(self.counts)

    def best(self, slack: float) -> Candidate | None:
        """The best candidate faster than the moves' ``ceiling``; sets ``bound``."""
        self.bound, ceiling = self.quick_bound(), self.moves.ceiling
        if self.bound >= ceiling:
            return None
        low, path = self.run(np.inf, minimax=True)
        if not path:
            self.bound = ceiling  # infinite: nothing fits
            return None
        self.bound = max(self.bound, float(self.moves.least.fill[self.end]) + low)
        if self.bound >= ceiling * (1 - slack):
            return None
        top_sum, top_path = self.run(np.inf)
        self.bound = top_sum + low
        if self.bound >= ceiling * (1 - slack):
            return None
        winner: list[tuple[Move, int]] | None = None
        winning = ceiling

        def consider(found: list[tuple[Move, int]], total: float) -> float:
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

    def _candidate(self, path: list[tuple[Move, int]]) -> Candidate:
        problem, s = self.problem, self.s
        after = sum(move.replicas for move, _ in path)
        chosen: list[StageChoice] = []
        for move, k in path:
            within = s.before[move.spans.last[k]] & ~s.before[move.spans.first[k]]
            blocks = tuple(int(x) for x in np.flatnonzero(within))
            choice = StageChoice(blocks, move.pool, move.replicas)
            chosen.append(self._within(choice, after))
            after -= move.replicas
        candidate = Candidate(tuple(chosen), self.m, self.schedule)
        return replace(candidate, seconds=candidate_seconds(problem, candidate))

    def _within(self, choice: StageChoice, after: int) -> StageChoice:
        """With what is recomputed, offloaded or lent to fit, at the least cost."""
        problem = self.problem
        limit = problem.pools[choice.pool].memory_bytes
        joined = is_joined(problem, 1 if self.synced else 2, choice.replicas, self.m)

        def need(c: StageChoice) -> float:
            return stage_bytes(
                problem, c, self.m, self.schedule, devices_after=after, joined=joined,
                synced=problem.joined and not joined,
            )  # fmt: skip

        if need(choice) <= limit:
            return choice
        blocks = np.array(choice.blocks)
        at = self.moves.of[choice.pool][1]
        before, mine = self.moves.alive(choice.replicas, after).before, -(-self.m // choice.replicas)
        must = (
            problem.lendable[[b for b in choice.blocks if b in problem.lend], 0] if at.lent.pools[choice.pool] else ()
        )
        total, largest = np.array([sum(must)]), np.array([max(must, default=0.0)])
        plain = PLAIN.copies(total, largest)
        best, least = choice, np.inf
        for how in hows(problem, at, choice.pool)[0]:
            ways = [(seconds[blocks], gains[blocks]) for seconds, gains in how.ways(at, choice.pool, mine, before)]
            probe = self._probe(choice, how, ways)
            if probe is None:
                continue
            made, gained = probe
            room = float((how.copies(total, largest) - plain)[0])
            found = spare([(list(s), list(g)) for s, g in ways], need(made) + gained + room - limit)
            if found is not None and found[0] < least:
                best, least = _relieved(choice, how, found[1]), found[0]
        return best

    def _probe(self, choice: StageChoice, how: How, ways: Sequence[Way]) -> tuple[StageChoice, float] | None:
        """The stage with the block that gains least recomputed, or offloaded, or one of each; what that gains."""
        taken: list[int] = []
        gained = 0.0
        for way in ways[: how.again + how.away]:
            gains = [g if g > 0 and i not in taken else np.inf for i, g in enumerate(way[1])]
            smallest = int(np.argmin(gains))
            if not np.isfinite(gains[smallest]):
                return None
            taken.append(smallest)
            gained += float(gains[smallest])
        return _relieved(choice, how, [[i] for i in taken]), gained


def _relieved(choice: StageChoice, how: How, positions: Sequence[Sequence[int]]) -> StageChoice:
    """The stage with the blocks at these positions of each way."""
    named: dict[str, set[int]] = {"recompute": set(), "offload": set(), "lend": set()}
    for fields, where in zip(how.named, positions, strict=False):
        for field in fields:
            named[field].update(choice.blocks[i] for i in where)
    recompute, offload, lend = (tuple(sorted(blocks)) for blocks in named.values())
    return replace(choice, recompute=recompute, offload=offload, lend=lend)


def check_candidate(problem: Problem, candidate: Candidate) -> bool:
    """Whether it covers every block once, on devices there are, within memory."""
    blocks = sorted(b for stage in candidate.stages for b in stage.blocks)
    used = [0] * len(problem.pools)
    for stage in candidate.stages:
        used[stage.pool] += stage.replicas
    enough = all(u <= len(pool.devices) for u, pool in zip(used, problem.pools, strict=True))
    return blocks == list(range(problem.num_blocks)) and enough and fits(problem, candidate)
