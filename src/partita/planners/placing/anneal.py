"""Anneal: a better placement by random moves of units, pairs and neighbourhoods (Kirkpatrick et al., 1983).

The energy is the sum of a high power of the devices' loads, which ranks placements nearly as the maximum does and also
tells a move that helps from one that does not while the busiest device stays as it is. A move changes the loads of two
devices only: a net that a third one touches is cut before and after.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from partita.planners.placing.problem import Placement, loads

POWER = 8
HOT, COLD = 0.3, 1e-5
CHECK = 500
LARGEST = 24


def anneal(
    problem: Placement, start: Sequence[int], *, seconds: float, seed: int = 0, hot: float = HOT
) -> tuple[int, ...]:
    """The best placement met in about so many seconds from ``start``, which must fit; never worse than it.

    ``hot``: the first temperature; a low one stays near ``start``.
    """
    state = _State(problem, start)
    draw = random.Random(seed)
    began = time.perf_counter()
    best, found = max(state.load, default=0.0), tuple(start)
    if len(state.load) < 2 or not found or best <= 0.0:
        return found
    scale, heat, count = best, hot, 0
    while True:
        count += 1
        if count % CHECK == 0:
            passed = (time.perf_counter() - began) / seconds
            if passed >= 1.0:
                return found
            heat, scale = hot * (COLD / hot) ** passed, best
        moves = state.propose(draw)
        if not moves:
            continue
        here, there = state.device[moves[0][0]], moves[0][1]
        before = (state.load[here] / scale) ** POWER + (state.load[there] / scale) ** POWER
        alone = len(moves) == 1
        if alone:
            less, more = state.change(*moves[0])
            after = ((state.load[here] - less) / scale) ** POWER + ((state.load[there] + more) / scale) ** POWER
        else:
            for unit, to in moves:
                state.move(unit, to)
            after = (state.load[here] / scale) ** POWER + (state.load[there] / scale) ** POWER
        if after <= before or draw.random() < math.exp((before - after) / heat):
            if alone:
                state.move(*moves[0])
            highest = max(state.load)
            if highest < best * (1 - 1e-9):
                best, found = highest, tuple(state.device)
        elif not alone:
            for unit, to in moves:
                state.move(unit, here if to == there else there)


class _State:
    """A placement and its loads, changed unit by unit."""

    def __init__(self, problem: Placement, start: Sequence[int]) -> None:
        kinds = problem.device_kinds
        self.device = list(start)
        self.seconds = [kind.seconds.tolist() for kind in kinds]
        self.transfer = [kind.transfer for kind in kinds]
        self.nbytes = problem.nbytes.tolist()
        self.room = [kind.memory_bytes * (1 + 1e-12) for kind in kinds]
        self.cost = [net.seconds for net in problem.nets]
        self.pins = [len(net.units) for net in problem.nets]
        self.nets: list[list[int]] = [[] for _ in range(problem.num_units)]
        self.touched = [[0] * len(kinds) for _ in problem.nets]
        near: list[set[int]] = [set() for _ in range(problem.num_units)]
        for i, net in enumerate(problem.nets):
            for unit in net.units:
                self.nets[unit].append(i)
                self.touched[i][self.device[unit]] += 1
                near[unit].update(net.units)
        self.near = [sorted(others - {unit}) for unit, others in enumerate(near)]
        self.load = loads(problem, start).tolist()
        self.held = [0.0] * len(kinds)
        for unit, device in enumerate(start):
            self.held[device] += self.nbytes[unit]

    def propose(self, draw: random.Random) -> list[tuple[int, int]]:
        """A unit, two units changing places, or some neighbours, between two devices, that fits; empty where not."""
        unit = int(draw.random() * len(self.device))
        here, near = self.device[unit], self.near[unit]
        if near and draw.random() < 0.6:
            there = self.device[near[int(draw.random() * len(near))]]
        else:
            there = int(draw.random() * len(self.load))
        if here == there:
            return []
        chance = draw.random()
        moves = [(unit, there)]
        if 0.7 <= chance < 0.85:
            other = int(draw.random() * len(self.device))
            there = self.device[other]
            if there == here:
                return []
            moves = [(unit, there), (other, here)]
        elif chance >= 0.85:
            moves = [(one, there) for one in self._neighbours(unit, 1 + int(draw.random() * LARGEST), draw)]
        gained = lost = 0.0
        for one, to in moves:
            if self.seconds[to][one] == math.inf:
                return []
            if to == there:
                gained += self.nbytes[one]
            else:
                lost += self.nbytes[one]
        change = gained - lost
        fits = self.held[there] + change <= self.room[there] and self.held[here] - change <= self.room[here]
        return moves if fits else []

    def change(self, unit: int, there: int) -> tuple[float, float]:
        """(seconds less where the unit is, seconds more ``there``)."""
        here = self.device[unit]
        less, more = self.seconds[here][unit], self.seconds[there][unit]
        for net in self.nets[unit]:
            touched, pins, cost = self.touched[net], self.pins[net], self.cost[net]
            less += self.transfer[here] * cost * ((touched[here] < pins) - (touched[here] > 1))
            more += self.transfer[there] * cost * ((touched[there] + 1 < pins) - (touched[there] > 0))
        return less, more

    def move(self, unit: int, there: int) -> None:
        here = self.device[unit]
        less, more = self.change(unit, there)
        for net in self.nets[unit]:
            self.touched[net][here] -= 1
            self.touched[net][there] += 1
        self.load[here] -= less
        self.load[there] += more
        self.held[here] -= self.nbytes[unit]
        self.held[there] += self.nbytes[unit]
        self.device[unit] = there

    def _neighbours(self, unit: int, size: int, draw: random.Random) -> list[int]:
        """Up to ``size`` units of one device, connected by nets."""
        here = self.device[unit]
        found, seen, border = [unit], {unit}, [unit]
        while border and len(found) < size:
            at = border.pop(int(draw.random() * len(border)))
            for other in self.near[at]:
                if other not in seen and self.device[other] == here and len(found) < size:
                    seen.add(other)
                    found.append(other)
                    border.append(other)
        return found
