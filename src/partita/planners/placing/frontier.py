"""Frontier: units in a line, and what matters at each step of the nets to a set of units that is chosen along it.

A net matters from its first unit to its last: its units so far are all outside the set, all inside, or it is cut and
paid for. Graphs of models are long and narrow, so few nets matter at once and few combinations occur: a path
decomposition of the hypergraph, walked as in Bodlaender, *Dynamic programming on graphs with bounded treewidth* (1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.planners.ideals import topological_orders
from partita.planners.placing.problem import Net, Placement
from partita.planners.problem import Array

Ints = NDArray[np.int64]

MAX_STATES = 1024
CUT = 3


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """``order``: the units. ``first``: of each step, the number of its first state; one more step stands for the end.

    ``onward`` (states, 2): the place among the next step's states, without the unit and with it. ``cut`` (states, 2):
    seconds of the nets that are then cut. ``whole``: whether every net counts; else those that made the line too wide
    are free, and seconds are too few.
    """

    order: Ints
    first: Ints
    onward: Ints
    cut: Array
    whole: bool

    @property
    def widest(self) -> int:
        return int(np.diff(self.first).max(initial=1))


def frontier(problem: Placement, *, most: int = MAX_STATES) -> Frontier:
    """Of the narrowest of a few lines. Where one has over ``most`` states, the cheapest net there is left out."""
    nets = [net for net in problem.nets if len(net.units) > 1 and net.seconds > 0]
    lines = {_narrow(nets, problem.num_units), *topological_orders(problem.num_units, problem.order)}
    line = min((line for line in lines if len(line) == problem.num_units), key=lambda line: (_states(line, nets), line))
    place = {unit: i for i, unit in enumerate(line)}
    whole = True
    while True:
        steps = _walk(line, nets, most)
        if len(steps) == len(line):
            break
        at, whole = len(steps), False
        ends = [(net, [place[unit] for unit in net.units]) for net in nets]
        nets.remove(min((net for net, at_ in ends if min(at_) <= at < max(at_)), key=lambda net: net.seconds))
    first = np.cumsum([0, *(len(step) for step in steps), 1], dtype=np.int64)
    rows = [row for step in steps for row in step]
    onward = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
    cut = np.array([row[2:] for row in rows], dtype=np.float64).reshape(-1, 2)
    return Frontier(np.array(line, dtype=np.int64), first, onward, cut, whole)


def _narrow(nets: Sequence[Net], count: int) -> tuple[int, ...]:
    """Always the unit that opens the fewest nets and closes the most, beside those that are open."""
    nets_of: list[list[int]] = [[] for _ in range(count)]
    for i, net in enumerate(nets):
        for unit in net.units:
            nets_of[unit].append(i)
    left = [len(net.units) for net in nets]
    waiting, beside, line = dict.fromkeys(range(count)), dict[int, None](), list[int]()

    def opened(unit: int) -> int:
        return sum((left[i] == len(nets[i].units)) - (left[i] == 1) for i in nets_of[unit])

    while waiting:
        unit = min(beside or waiting, key=opened)
        line.append(unit)
        del waiting[unit]
        beside.pop(unit, None)
        for i in nets_of[unit]:
            left[i] -= 1
            beside.update((other, None) for other in nets[i].units if other in waiting)
    return tuple(line)


def _states(line: Sequence[int], nets: Sequence[Net]) -> float:
    """About how many states a line has: two or three for every open net."""
    place = {unit: i for i, unit in enumerate(line)}
    steps = np.zeros(len(line) + 1)
    for net in nets:
        at = sorted(place[unit] for unit in net.units)
        steps[at[0]] += 1.0
        steps[at[-1]] -= 1.0
        if len(at) > 2:
            steps[at[1]] += 0.585
            steps[at[-1]] -= 0.585
    return float(np.exp2(np.minimum(np.cumsum(steps), 60.0)).sum())


def _walk(line: Sequence[int], nets: Sequence[Net], most: int) -> list[list[tuple[int, int, float, float]]]:
    """Of every step, (onward without, with; cut without, with) of each state; shorter where there are over ``most``."""
    nets_of: dict[int, list[int]] = {unit: [] for unit in line}
    for i, net in enumerate(nets):
        for unit in net.units:
            nets_of[unit].append(i)
    left = [len(net.units) for net in nets]
    place: dict[int, int] = {}
    states: dict[int, int] = {0: 0}
    steps: list[list[tuple[int, int, float, float]]] = []
    for unit in line:
        touched = []
        for i in nets_of[unit]:
            if i not in place:
                place[i] = next(shift for shift in range(0, 2 * len(nets), 2) if shift not in place.values())
            left[i] -= 1
            touched.append((place[i] if left[i] else place.pop(i), left[i] == 0, nets[i].seconds))
        onward: dict[int, int] = {}
        rows = []
        for state in states:
            ends = [_after(state, side, touched) for side in (1, 2)]
            to = [onward.setdefault(after, len(onward)) for after, _ in ends]
            rows.append((to[0], to[1], ends[0][1], ends[1][1]))
        if len(onward) > most:
            return steps
        steps.append(rows)
        states = onward
    return steps


def _after(state: int, side: int, touched: Sequence[tuple[int, bool, float]]) -> tuple[int, float]:
    """(state, seconds of the nets now cut) with one more unit of the nets at these places; 1: outside, 2: inside."""
    paid = 0.0
    for shift, last, seconds in touched:
        before = state >> shift & 3
        now = side if before in (0, side) else CUT
        if now == CUT and before != CUT:
            paid += seconds
        state = state & ~(3 << shift) | (0 if last else now << shift)
    return state, paid
