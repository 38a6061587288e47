"""Searching: the fastest candidates of a task in closed form, without teams and with them.

single devices   ample memory, then tight: fine parts near what coarse ones found
teams, ZeRO      where nothing else fits, or where their bound beats what is in hand (``joint``)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from partita.apart import several_nodes
from partita.cost.memory import host_update, optimizer_factor
from partita.planners.build import Built, usable_bytes
from partita.planners.joint import Later, joint
from partita.planners.objective import fits
from partita.planners.problem import Candidate, Feasible, Infeasible, Optimal, Outcome, Pool, Problem, StageChoice
from partita.planners.stages import stages
from partita.planners.task import Task, Variant

IDEALS_BLOCKS = 40
QUICK_OPS = 200
EXACT_BLOCKS = 120
SLACK = 0.002
TIGHT_SLACK = 0.01
TEAM_SLACK = 0.02
TEAM_PARTS = 64
MOST_NEARLY = 2
ZERO_LEVELS = (2, 3)  # level 1 sends more than 2 and holds as much or more


@dataclass(frozen=True, slots=True)
class Searched:
    """``outcome`` of ``built``'s problem; the best possible is at most ``gap`` (a ratio) faster. ``nearly``: faster
    candidates that exceed the memory in closed form, but not so far that simulation may not find them within it."""

    built: Built
    outcome: Outcome
    gap: float
    nearly: tuple[tuple[Built, Candidate], ...] = ()

    def gap_of(self, candidate: Candidate) -> float:
        """By how much (a ratio) the best possible may be faster than this candidate, by the closed form."""
        assert not isinstance(self.outcome, Infeasible)
        return max(0.0, (1.0 + self.gap) * candidate.seconds / self.outcome.best.seconds - 1.0)


def search(task: Task) -> Searched:
    """The fastest plans on single devices and their replicas."""
    fine = _keeping(task.build())
    anywhere = fine.problem.num_blocks <= IDEALS_BLOCKS
    unlimited = replace(
        fine.problem,
        may_recompute=(),
        may_offload=(),
        may_lend=(),
        pools=tuple(replace(p, memory_bytes=float("inf")) for p in fine.problem.pools),
    )
    free = stages(unlimited, anywhere=anywhere, slack=SLACK if fine.problem.num_blocks > EXACT_BLOCKS else 0.0)
    if isinstance(free, Infeasible):
        return Searched(fine, free, 0.0)
    if fits(fine.problem, free.best):
        others = tuple(c for c in free.others if fits(fine.problem, c))
        gap = 0.0 if isinstance(free, Optimal) else free.gap
        return Searched(fine, replace(free, others=others), gap)
    coarse = _keeping(task.coarse())
    if not (task.holds_all or task.resolved.lent):
        return Searched(coarse, Infeasible("no division of the model fits the devices' memory"), 0.0)
    rough = stages(coarse.problem, anywhere=coarse.problem.num_blocks <= IDEALS_BLOCKS, slack=TIGHT_SLACK)
    near = fine.problem
    in_hand = float("inf")
    if not isinstance(rough, Infeasible):
        tops = (rough.best, *rough.others[:1])
        in_hand = rough.best.seconds
        near = replace(
            near,
            microbatches=tuple(sorted({c.microbatches for c in tops})),
            schedules=tuple(dict.fromkeys(c.schedule for c in tops)),
        )
    tight: Outcome = Infeasible("")
    if coarse.blocks != fine.blocks:
        tight = stages(near, anywhere=anywhere, slack=TIGHT_SLACK, best=in_hand)
    pairs = [(b, o) for b, o in ((fine, tight), (coarse, rough)) if not isinstance(o, Infeasible)]
    if not pairs:
        return Searched(coarse, Infeasible("no division of the model fits the devices' memory"), 0.0)
    built, outcome = min(pairs, key=lambda pair: pair[1].best.seconds)
    assert not isinstance(outcome, Infeasible)
    better = (c for c in (free.best, *free.others) if c.seconds < outcome.best.seconds)
    nearly = tuple((fine, c) for c in better if fits(fine.problem, c, least=True))[:MOST_NEARLY]
    return Searched(built, outcome, max(0.0, outcome.best.seconds / free.best.seconds - 1.0), nearly)


def _keeping(built: Built) -> Built:
    """The same with no parameters in host memory but those that a person wants there."""
    return replace(built, problem=replace(built.problem, may_lend=()))


def lending(task: Task, best: float) -> tuple[list[tuple[Built, Candidate]], float]:
    """The fastest plans of less than ``best`` seconds with parameters in host memory, the optimizer's time there
    counted; the best possible is at most so much (a ratio) faster than the first."""
    parts = [task.lending(), *([task.build()] if len(task.graph.ops) <= QUICK_OPS else [])]
    found: list[tuple[Built, Candidate]] = []
    gaps: list[tuple[float, float]] = []
    for built in parts:
        anywhere = built.problem.num_blocks <= IDEALS_BLOCKS
        outcome = stages(built.problem, anywhere=anywhere, slack=TIGHT_SLACK, keep=2, best=best)
        if not isinstance(outcome, Infeasible):
            found += [(built, c) for c in (outcome.best, *outcome.others)]
            gaps.append((outcome.best.seconds, outcome.gap if isinstance(outcome, Feasible) else 0.0))
    return sorted(found, key=lambda pair: pair[1].seconds), min(gaps, default=(0.0, 0.0))[1]


def beside(task: Task, found: Searched) -> list[Candidate]:
    """The winner and what simulation may like better: runners-up, a pipeline, unequal replicas, two stages a device."""
    built, outcome = found.built, found.outcome
    assert not isinstance(outcome, Infeasible)
    every = [
        outcome.best, *_pipeline(built.problem, outcome.best), *_plain(task, built.problem), *outcome.others,
        *_mixed(task, built.problem),
        *_doubled(task, built.problem),
    ]  # fmt: skip
    alike: dict[tuple[tuple[StageChoice, ...], int, str], Candidate] = {}
    for candidate in every:  # one stage has nothing to schedule
        schedule = candidate.schedule if len(candidate.stages) > 1 else ""
        alike.setdefault((candidate.stages, candidate.microbatches, schedule), candidate)
    return list(alike.values())


def _pipeline(problem: Problem, best: Candidate) -> list[Candidate]:
    """Where replicas of the whole model win: the best pipeline of single devices, to compare."""
    if len(best.stages) > 1 or best.stages[0].replicas < 2 or problem.max_stages == 1:
        return []
    if problem.num_replicas or problem.num_stages:
        return []
    counts = tuple(m for m in problem.microbatches if m > 1)[-3:]
    alone = replace(problem, replicas=False, microbatches=counts, may_recompute=(), may_offload=(), may_lend=())
    found = stages(alone, slack=0.02, keep=1)
    return [] if isinstance(found, Infeasible) or len(found.best.stages) < 2 else [found.best]


def _plain(task: Task, problem: Problem) -> list[Candidate]:
    """Between hosts, where links decide: one device, and a replica of the whole model on each, to compare."""
    count = problem.num_devices
    apart = several_nodes(task.cluster) and len(problem.pools) == 1 and not problem.joined
    if (
        not apart
        or problem.num_stages > 1
        or problem.breaks
        or problem.pools_of
        or problem.recompute
        or problem.offload
        or problem.lend
    ):
        return []
    alone = Candidate((StageChoice(tuple(range(problem.num_blocks)), 0),), 1, "1f1b")
    both = replace(alone, stages=(replace(alone.stages[0], replicas=count),), microbatches=count)
    wanted = [(alone, 1)] + ([(both, count)] if problem.replicas and count <= problem.batch else [])
    return [
        c for c, n in wanted
        if n in problem.microbatches and problem.num_replicas in (0, n) and fits(problem, c)
    ]  # fmt: skip


def _mixed(task: Task, problem: Problem) -> list[Candidate]:
    """Whole-model replicas on devices of unequal speed; ``to_plan`` sizes the microbatches by speed."""
    count = problem.num_devices
    ok = problem.replicas and (not problem.joined or problem.sync) and count <= problem.batch
    ok = ok and len(problem.pools) > 1 and not problem.pools_of and not problem.breaks
    if not ok or task.constraints.microbatches not in (0, count):
        return []
    if problem.num_replicas not in (0, count) or problem.num_stages > 1:
        return []
    stage = StageChoice(tuple(range(problem.num_blocks)), -1, count)
    return [Candidate((stage,), count, "1f1b")]


def _doubled(task: Task, problem: Problem) -> list[Candidate]:
    """Twice as many stages as devices, dealt round (interleaved) or in a V (zero_bubble), where devices are equal and
    it was not forbidden."""
    count, asked = problem.num_devices, task.constraints.schedule
    schedules = [s for s in ("interleaved", "zero_bubble") if asked in ("", s)]
    wanted = bool(schedules) and not problem.joined and problem.train
    fits_count = not problem.max_stages or problem.max_stages >= 2 * count
    fits_count = fits_count and not problem.num_stages and problem.num_replicas < 2
    if not wanted or not fits_count or count < 2 or len(problem.pools) > 1 or problem.num_blocks < 2 * count:
        return []
    options = [m for m in problem.microbatches if m % count == 0 and m >= count]
    if not options:
        return []
    doubled = replace(
        problem,
        pools=(Pool("dealt", tuple(map(str, range(2 * count))), float("inf")),),
        microbatches=tuple(options[-2:]), schedules=("1f1b",), replicas=False, may_recompute=(), may_offload=(),
        may_lend=(),
    )  # fmt: skip
    found = stages(doubled, slack=0.02, keep=1)
    if isinstance(found, Infeasible) or len(found.best.stages) != 2 * count:
        return []
    return [replace(found.best, schedule=s) for s in schedules]


# -- teams and ZeRO ------------------------------------------------------------------------------------------------


def variants(task: Task) -> Iterator[Variant]:
    """Problems with teams or with ZeRO, in the parts that recomputation likes; those of single devices first."""
    wanted = task.constraints
    levels = (0, *ZERO_LEVELS) if wanted.zero < 0 and task.processes and task.train else (max(wanted.zero, 0),)
    if wanted.tensor < 2 and not wanted.shard:
        alone = Variant(task.coarse())
        yield from (alone.levelled(level) for level in levels if level and level != wanted.zero)
    small = len(task.graph.ops) <= QUICK_OPS
    for found in task.divided(coarse=0 if small else TEAM_PARTS):
        problem = found.relaxed.problem
        replicas = problem.replicas and any(len(p.devices) > 1 for p in problem.pools)
        yield from (found.levelled(level) for level in (levels if replicas else levels[:1]))


@dataclass(frozen=True, slots=True)
class Widened:
    """``found``: (problem, candidate) with teams or ZeRO, fastest first. ``tried``: how many problems."""

    found: tuple[tuple[Built, Candidate], ...]
    tried: int


def widen(task: Task, best: float, *, teams: bool = False) -> Widened:
    """The fastest plans with teams or ZeRO (``teams``: with teams) of less than ``best`` seconds."""
    every = [found for found in variants(task) if found.relaxed.teams or not teams]
    anywhere = all(v.relaxed.problem.num_blocks <= IDEALS_BLOCKS for v in every)
    problems = [v.relaxed.problem if v.price is None else Later(v.relaxed.problem, v.problem) for v in every]
    answer = joint(problems, anywhere=anywhere, slack=TEAM_SLACK, keep=2, best=best)
    if isinstance(answer.outcome, Infeasible):
        return Widened((), len(every))
    mine = [(every[answer.index].exact(), c) for c in (answer.outcome.best, *answer.outcome.others)]
    rest = [(every[i].exact(), c) for i, c in answer.others]
    return Widened((*mine[:1], *rest[:1], *mine[1:], *rest[1:]), len(every))


def fitting(task: Task, built: Built, *, lends: bool = False) -> bool:
    """Whether any plan fits, in closed form."""
    return not isinstance(closed(task, built, 1.0, first=True, lends=lends)[1], Infeasible)


def closed(
    task: Task, built: Built, room: float, *, first: bool = False, lends: bool = False
) -> tuple[Problem, Outcome]:
    """The best plan under the schedule that holds least (``first``: any), with ``room`` of the memory; for the problem
    it solves. ``lends``: parameters may live in host memory.
    """
    limit = {d.name: usable_bytes(d, processes=task.processes) for d in task.cluster.devices}
    pools = tuple(
        replace(p, memory_bytes=room * min(limit[d] for d in built.teams.get(p.devices[0], p.devices[:1])))
        for p in built.problem.pools
    )
    problem = replace(
        built.problem,
        pools=pools,
        schedules=built.problem.schedules[:1],
        optimizer_factor=float(optimizer_factor(task.optimizer)) if task.train else 0.0,
        update=host_update(task.optimizer) if task.train else 0.0,
        may_lend=built.problem.may_lend if lends else (),
    )
    anywhere = problem.num_blocks <= IDEALS_BLOCKS
    return problem, stages(problem, anywhere=anywhere, keep=1, slack=0.02, first=first)
