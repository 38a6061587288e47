"""Exhaustive: every plan of a tiny problem, priced one by one; the oracle the other planners are tested against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from partita.planners.ideals import ideals
from partita.planners.objective import allowed_stage, candidate_seconds, fits
from partita.planners.problem import Candidate, Infeasible, Optimal, Outcome, Problem, StageChoice


def candidates(problem: Problem, *, anywhere: bool = False) -> Iterator[Candidate]:
    """Every candidate the constraints allow, fitting or not. ``anywhere``: stages are differences of downsets of the
    block graph, not only runs of blocks.
    """
    downs = ideals(problem, anywhere=anywhere)
    whole = downs[-1]
    for m in problem.microbatches:
        schedules = problem.schedules if problem.train else problem.schedules[:1]
        for schedule in schedules:
            for stages in _chains(problem, downs, downs[0], whole, tuple(len(p.devices) for p in problem.pools), m):
                most = problem.max_stages or len(stages)
                if len(stages) <= most and problem.num_stages in (0, len(stages)):
                    yield Candidate(stages, m, schedule)


def _chains(
    problem: Problem, downs: tuple[int, ...], start: int, end: int, free: tuple[int, ...], m: int
) -> Iterator[tuple[StageChoice, ...]]:
    if start == end:
        yield ()
        return
    for stop in downs:
        if stop == start or stop & start != start:
            continue
        blocks = tuple(b for b in range(problem.num_blocks) if (stop & ~start) >> b & 1)
        for pool, count in enumerate(free):
            if not allowed_stage(problem, blocks, pool):
                continue
            for replicas in range(1, (min(count, m) if problem.replicas else min(count, 1)) + 1):
                if problem.num_replicas not in (0, replicas):
                    continue
                left = (*free[:pool], count - replicas, *free[pool + 1 :])
                for rest in _chains(problem, downs, stop, end, left, m):
                    for ways in _subsets(problem, blocks, pool):
                        yield (StageChoice(blocks, pool, replicas, *ways), *rest)


def _subsets(problem: Problem, blocks: tuple[int, ...], pool: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """(blocks to recompute, to offload, to lend the parameters of): every way."""
    fixed = {*problem.recompute, *problem.offload, *problem.lend}
    open_ = [b for b in blocks if b not in fixed]
    again = problem.may_recompute if problem.train else ()
    hosted = problem.may_offload if problem.train and problem.pools[pool].host else ()
    lent = problem.may_lend if problem.lends(pool) else ()
    ways = [
        ("", *["r"] * (b in again), *["o"] * (b in hosted), *["p"] * (b in lent), *["op"] * (b in hosted and b in lent))
        for b in open_
    ]
    for chosen in product(*ways):
        yield tuple(tuple(b for b, way in zip(open_, chosen, strict=True) if word in way) for word in "rop")


def exhaustive(problem: Problem, *, anywhere: bool = False) -> Outcome:
    """The best candidate that fits, by trying all of them."""
    best: Candidate | None = None
    for candidate in candidates(problem, anywhere=anywhere):
        seconds = candidate_seconds(problem, candidate)
        if (best is None or seconds < best.seconds) and fits(problem, candidate):
            best = replace(candidate, seconds=seconds)
    return Optimal(best) if best is not None else Infeasible("no plan fits")
