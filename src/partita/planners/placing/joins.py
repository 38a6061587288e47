"""Joins: units that no placement with a load up to a cap can part, so that they may be placed as one.

Whoever parts two units has both devices pay for every net that they share, unless one of them pays for none; so where
the shared nets cost more than the cap, they go together. Leaves go with their hosts where memory cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from partita.planners.placing.leaves import hosts
from partita.planners.placing.problem import Placement, components, contract

WIDE = 24


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """``small``: the problem of groups; ``groups``: the group of each unit; ``leaders``: a unit of each group, whose
    device the others can take.
    """

    small: Placement
    groups: tuple[int, ...]
    leaders: tuple[int, ...]

    def narrow(self, devices: tuple[int, ...]) -> tuple[int, ...]:
        """A placement of the units, of no more than the cap, as one of the groups."""
        return tuple(devices[leader] for leader in self.leaders)

    def widen(self, devices: tuple[int, ...]) -> tuple[int, ...]:
        """A placement of the groups as one of the units."""
        return tuple(devices[group] for group in self.groups)


def joined(problem: Placement, cap: float) -> Joined:
    """The problem with everything joined that can be, for placements of a load up to ``cap``."""
    room = min((kind.memory_bytes for kind in problem.kinds if kind.count), default=0.0)
    ample = bool(problem.nbytes.sum() <= room)
    result = Joined(problem, tuple(range(problem.num_units)), tuple(range(problem.num_units)))
    while True:
        before = result.small.num_units
        result = _through(result, _heavy(result.small, cap))
        if ample:
            result = _through(result, hosts(result.small))
        if result.small.num_units == before:
            return result


def _heavy(problem: Placement, cap: float) -> tuple[int, ...]:
    """The first unit of each group that shared nets hold together."""
    paying = [kind.transfer for kind in problem.kinds for _ in range(kind.count) if kind.transfer > 0]
    if len(problem.device_kinds) - len(paying) > 1 or not paying:
        return tuple(range(problem.num_units))
    shared: dict[tuple[int, int], float] = {}
    for net in problem.nets:
        if len(net.units) <= WIDE:
            for pair in combinations(sorted(net.units), 2):
                shared[pair] = shared.get(pair, 0.0) + net.seconds
        elif min(paying) * net.seconds > cap:
            shared.update(((net.units[0], other), np.inf) for other in net.units[1:])
    held = [pair for pair, seconds in shared.items() if min(paying) * seconds > cap * (1 + 1e-9)]
    found = components(problem.num_units, [*held, *((b, a) for a, b in held)])
    first: dict[int, int] = {}
    for unit, component in enumerate(found):
        first.setdefault(component, unit)
    return tuple(first[component] for component in found)


def _through(result: Joined, host: tuple[int, ...]) -> Joined:
    """Groups joined further: each with its host, itself a group."""
    leading = tuple(dict.fromkeys(host))
    number = {unit: i for i, unit in enumerate(leading)}
    onward = tuple(number[h] for h in host)
    if len(leading) == len(host):
        return result
    small = contract(result.small, onward)
    groups = tuple(onward[group] for group in result.groups)
    return Joined(small, groups, tuple(result.leaders[unit] for unit in leading))
