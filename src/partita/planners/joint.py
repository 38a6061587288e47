"""Joint: the best of several problems that differ in how devices form teams and in ZeRO's level.

Each is searched by ``stages`` with the fastest plan so far in hand: what its bound says cannot win is dropped at once.
A problem that is costly to price may come with a relaxation (``Later``): it is priced only if that could win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from partita.planners.problem import Candidate, Feasible, Infeasible, Optimal, Outcome, Problem
from partita.planners.stages import stages


@dataclass(frozen=True, slots=True)
class Joint:
    """``outcome``: of problem number ``index``, over all of them. ``others``: (index, best) of those that were slower.

    Where nothing fits, ``index`` is 0.
    """

    index: int
    outcome: Outcome
    others: tuple[tuple[int, Candidate], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Later:
    """A problem not priced yet. ``relaxed``: no plan of it is faster or holds less than this says."""

    relaxed: Problem
    exact: Callable[[], Problem]


def joint(
    problems: Sequence[Problem | Later], *, anywhere: bool = False, slack: float = 0.0, keep: int = 1,
    best: float = float("inf"),
) -> Joint:  # fmt: skip
    """The fastest plan of all the problems. ``slack``, ``keep``: as in ``stages``; ``best``: seconds of a plan in hand,
    nothing slower is looked for. Earlier problems are preferred where times are equal.
    """
    found: list[tuple[int, Candidate]] = []
    others: tuple[Candidate, ...] = ()
    least = float("inf")
    bounds: list[tuple[float, int]] = []
    for index, problem in enumerate(problems):
        bound = 0.0
        if isinstance(problem, Later):
            relaxed = stages(problem.relaxed, anywhere=anywhere, slack=slack, best=best)
            bound = best * (1.0 - slack) if isinstance(relaxed, Infeasible) else _bound(relaxed)
            if isinstance(relaxed, Infeasible):
                least = min(least, bound)
                continue
        bounds.append((bound, index))
    for bound, index in sorted(bounds):
        hand = found[0][1].seconds if found else best
        problem = problems[index]
        if isinstance(problem, Later):
            if bound >= hand:
                least = min(least, bound)
                continue
            problem = problem.exact()
        outcome = stages(problem, anywhere=anywhere, slack=slack, keep=keep, best=hand)
        if isinstance(outcome, Infeasible):
            least = min(least, hand * (1.0 - slack))  # it may hold a plan by so much faster than the one in hand
            continue
        least = min(least, _bound(outcome))
        if outcome.best.seconds < hand:
            found.insert(0, (index, outcome.best))
            others = outcome.others
        else:
            found.append((index, outcome.best))
    if not found:
        return Joint(0, Infeasible("no division of the model fits the devices' memory and the constraints"))
    index, winner = found[0]
    gap = max(0.0, winner.seconds / least - 1.0) if least > 0 else 0.0
    over_all = Optimal(winner, others) if gap <= 1e-12 else Feasible(winner, gap, others)
    return Joint(index, over_all, tuple(found[1:]))


def _bound(outcome: Optimal | Feasible) -> float:
    """No plan of its problem is faster."""
    return outcome.best.seconds / (1.0 + (outcome.gap if isinstance(outcome, Feasible) else 0.0))
