"""Joins: units that no placement with a load up to a cap can part, so that they may be placed as one.

A device that runs one unit and not another is busy for at least a minimum cut between them; where that is over the cap
for whoever could run them apart, they go together. Leaves go with their hosts where memory cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partita.planners.placing.leaves import hosts
from partita.planners.placing.parting import parted
from partita.planners.placing.problem import Placement, components, contract


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
        result = _through(result, _held(result.small, cap))
        if ample:
            result = _through(result, hosts(result.small))
        if result.small.num_units == before:
            return result


def _held(problem: Placement, cap: float) -> tuple[int, ...]:
    """The first unit of each group that no placement up to the cap parts."""
    paying = [kind for kind in problem.kinds if kind.count and kind.transfer > 0]
    free = [kind for kind in problem.kinds if kind.count and not kind.transfer > 0]
    if not paying or not problem.nets or not np.isfinite(cap):
        return tuple(range(problem.num_units))
    fast = np.min([kind.seconds for kind in paying], axis=0)
    pairs, apart = parted(problem, np.where(np.isfinite(fast), fast, 0.0), min(kind.transfer for kind in paying))
    most = cap * (1 + 1e-9)
    pays = (apart <= most) & np.isfinite(fast)[pairs]  # whether a device that pays may have this one and not the other
    idle = sum((kind.count * (kind.seconds <= most) for kind in free), np.zeros(problem.num_units))[pairs]
    one, other = pays.T
    parts = (one & other) | (one & (idle[:, 1] > 0)) | (other & (idle[:, 0] > 0))
    parts |= (idle.min(axis=1, initial=np.inf) > 0) & (sum(kind.count for kind in free) > 1)
    held = [(int(a), int(b)) for a, b in pairs[~parts]]
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
