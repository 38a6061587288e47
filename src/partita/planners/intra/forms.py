"""Forms: how a tensor lies along the axes of a mesh, and the seconds it takes to hold it otherwise.

    value and gradient     Replicate: whole, whole     Copied: whole, partial sums     Partial: partial sums, whole
                           Shard: the same rows of both

    forward     value of the form it has  -> value of the form it is needed in        (table below)
    backward    gradient as it is needed  -> gradient of the form it has              (the same table)

    from \\ to   whole            partial        rows                 other rows
    whole       -                never          -                    -
    partial     all_reduce       -              reduce_scatter       reduce_scatter
    rows        all_gather       never          -                    all_to_all

A form has one placement an axis. Axes are changed one after another, in the cheaper order; a collective along one axis
moves what the other axes leave. Rows that two axes divide lie in the order that their changes need (strided shards).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from partita.cost.communication import Team, all_gather, all_reduce, all_to_all, reduce_scatter
from partita.planners.labelling.problem import Floats
from partita.sharding.placements import Copied, Partial, Placement, Replicate, Shard

Form = tuple[Placement, ...]
WHOLE, SUMS = "whole", "sums"
State = str | Shard


def share(placement: Placement) -> float:
    """The part of a tensor that the first member of an axis holds, who has most."""
    return placement.cut.mine(0) / placement.cut.total if isinstance(placement, Shard) else 1.0


def part(form: Form) -> float:
    """The part of a tensor that one device holds."""
    found = 1.0
    for placement in form:
        found *= share(placement)
    return found


def value(placement: Placement) -> State:
    return placement if isinstance(placement, Shard) else SUMS if isinstance(placement, Partial) else WHOLE


def gradient(placement: Placement) -> State:
    return placement if isinstance(placement, Shard) else SUMS if isinstance(placement, Copied) else WHOLE


def move(held: State, wanted: State, nbytes: float, team: Team) -> float:
    """Seconds along one axis. ``nbytes``: of the whole that this axis divides."""
    if held == wanted or (held == WHOLE and isinstance(wanted, Shard)):
        return 0.0
    if wanted == SUMS:
        return float("inf")
    if held == SUMS:
        return reduce_scatter(nbytes, team) if isinstance(wanted, Shard) else all_reduce(nbytes, team)
    return all_to_all(nbytes, team) if isinstance(wanted, Shard) else all_gather(nbytes, team)


@dataclass(frozen=True, slots=True)
class Moves:
    """Conversions of tensors over the axes of a mesh."""

    axes: tuple[Team, ...]

    def table(self, nbytes: float, made: tuple[Form, ...], needed: tuple[Form, ...], *, grad: bool) -> Floats:
        """``table[i, j]``: seconds, forward and backward, from form ``made[i]`` to form ``needed[j]``."""
        forward = self._one_way(nbytes, _states(made, value), _states(needed, value))
        if not grad:
            return forward
        return forward + self._one_way(nbytes, _states(needed, gradient), _states(made, gradient)).T

    def seconds(self, nbytes: float, made: Form, needed: Form, *, grad: bool) -> float:
        return float(self.table(nbytes, (made,), (needed,), grad=grad)[0, 0])

    def _one_way(self, nbytes: float, held: list[tuple[State, ...]], wanted: list[tuple[State, ...]]) -> Floats:
        best = np.full((len(held), len(wanted)), np.inf)
        shares = [[np.array([_share(s[a]) for s in side]) for a in range(len(self.axes))] for side in (held, wanted)]
        known: dict[tuple[int, float], Floats] = {}
        for order in permutations(range(len(self.axes))):
            total = np.zeros_like(best)
            left = np.ones_like(best)
            for other in order:
                left = left * shares[0][other][:, None]
            for axis in order:
                left = left / shares[0][axis][:, None]
                for fraction in np.unique(left):
                    if (axis, fraction) not in known:
                        known[axis, fraction] = self._along(axis, nbytes * float(fraction), held, wanted)
                    total = np.where(left == fraction, total + known[axis, fraction], total)
                left = left * shares[1][axis][None, :]
            best = np.minimum(best, total)
        return best

    def _along(
        self, axis: int, nbytes: float, held: list[tuple[State, ...]], wanted: list[tuple[State, ...]]
    ) -> Floats:
        rows, row = _numbered([s[axis] for s in held])
        columns, column = _numbered([s[axis] for s in wanted])
        small = np.array([[move(h, w, nbytes, self.axes[axis]) for w in columns] for h in rows])
        return small[np.ix_(row, column)]


def _states(forms: tuple[Form, ...], of: Callable[[Placement], State]) -> list[tuple[State, ...]]:
    return [tuple(of(p) for p in form) for form in forms]


def _share(state: State) -> float:
    return share(state) if isinstance(state, Shard) else 1.0


def _numbered(states: list[State]) -> tuple[list[State], list[int]]:
    numbers: dict[State, int] = {}
    at = [numbers.setdefault(s, len(numbers)) for s in states]
    return list(numbers), at


def spell(form: Form) -> str:
    """``Shard(0), Replicate``."""
    return ", ".join("Replicate" if isinstance(p, Replicate | Copied) else str(p) for p in form)
