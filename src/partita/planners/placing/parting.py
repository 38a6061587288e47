"""Parting: the least load of a device that runs one unit and not another, so that what cannot be parted is joined.

A minimum cut of the units' seconds and the nets, for all pairs of units that share a net: along a frontier, least loads
from the start to each state and from each state to the end, and a walk between the two units.
"""

from __future__ import annotations

import numpy as np

from partita.planners.labelling.kernel import kernel
from partita.planners.placing.frontier import Ints, frontier
from partita.planners.placing.problem import Placement
from partita.planners.problem import Array


@kernel
def _tables(first: Ints, onward: Ints, weight: Array, ahead: Array, behind: Array) -> None:
    """Least seconds from the start to each state, and from it to the end."""
    ahead[:] = np.inf
    behind[:] = np.inf
    ahead[0] = 0.0
    behind[first[-2]] = 0.0
    for step in range(len(first) - 2):
        for state in range(first[step], first[step + 1]):
            for side in range(2):
                to = first[step + 1] + onward[state, side]
                ahead[to] = min(ahead[to], ahead[state] + weight[state, side])
    for step in range(len(first) - 3, -1, -1):
        for state in range(first[step], first[step + 1]):
            for side in range(2):
                to = first[step + 1] + onward[state, side]
                behind[state] = min(behind[state], behind[to] + weight[state, side])


@kernel
def _parted(
    first: Ints, onward: Ints, weight: Array, ahead: Array, behind: Array, pairs: Ints, found: Array, row: Array
) -> None:
    """``found`` (pairs, 2): least seconds with the one step's unit inside and the other's outside; steps ascending."""
    for pair in range(len(pairs)):
        one, two = pairs[pair]
        for way in range(2):
            for state in range(first[one], first[one + 1]):
                row[0, state - first[one]] = ahead[state]
            side = 0
            for step in range(one, two + 1):
                begin, end = first[step], first[step + 1]
                row[1 - side, : first[step + 2] - end] = np.inf
                for state in range(begin, end):
                    for with_ in range(2):
                        if (step == one and with_ == way) or (step == two and with_ != way):
                            continue
                        to = onward[state, with_]
                        row[1 - side, to] = min(row[1 - side, to], row[side, state - begin] + weight[state, with_])
                side = 1 - side
            least = np.inf
            for state in range(first[two + 1], first[two + 2]):
                least = min(least, row[side, state - first[two + 1]] + behind[state])
            found[pair, way] = least


def parted(problem: Placement, seconds: Array, transfer: float) -> tuple[Ints, Array]:
    """(pairs of units that share a net, least load with the first and without the second, and the other way round).

    ``seconds``: of each unit, finite; ``transfer``: multiplies the nets.
    """
    line = frontier(problem)
    place = np.empty(problem.num_units, dtype=np.int64)
    place[line.order] = np.arange(problem.num_units)
    pairs = {
        (min(a, b), max(a, b))
        for at in (place[list(net.units)].tolist() for net in problem.nets)
        for at_ in (sorted(at),)
        for a, b in zip(at_, at_[1:], strict=False)
    }
    steps = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    weight = transfer * line.cut
    weight[:, 1] += np.repeat(seconds[line.order], np.diff(line.first)[:-1])
    count = int(line.first[-1])
    ahead, behind, found = np.empty(count), np.empty(count), np.empty((len(steps), 2))
    _tables(line.first, line.onward, weight, ahead, behind)
    _parted(line.first, line.onward, weight, ahead, behind, steps, found, np.empty((2, line.widest)))
    return line.order[steps], found
