"""Leaves: units of no work that may as well lie with their only neighbour, so that fewer cuts are to be looked at.

Moving such a unit to its neighbour's device adds to no load: all its nets are its neighbour's too. Only memory can
tell the difference; Tarnawski et al. (NeurIPS 2020) merge such inputs in their program whatever the memory.
"""

from __future__ import annotations

from partita.planners.placing.problem import Placement


def hosts(problem: Placement) -> tuple[int, ...]:
    """The unit that each unit lies with: itself, or (through others, perhaps) its only neighbour."""
    n = problem.num_units
    beside: list[set[int]] = [set() for _ in range(n)]
    for a, b in problem.order:
        beside[a].add(b)
        beside[b].add(a)
    nets = [set(net.units) for net in problem.nets]
    nets_of: list[list[set[int]]] = [[] for _ in range(n)]
    for net in nets:
        for unit in net:
            nets_of[unit].append(net)
    idle = [all(kind.seconds[unit] == 0 for kind in problem.kinds) for unit in range(n)]
    host = list(range(n))
    waiting = [unit for unit in range(n) if idle[unit]]
    while waiting:
        unit = waiting.pop()
        if host[unit] != unit or len(beside[unit]) != 1:
            continue
        (neighbour,) = beside[unit]
        if all(neighbour in net for net in nets_of[unit]):
            host[unit] = neighbour
            beside[neighbour].discard(unit)
            for net in nets_of[unit]:
                net.discard(unit)
            if idle[neighbour]:
                waiting.append(neighbour)
    for unit in range(n):
        while host[unit] != host[host[unit]]:
            host[unit] = host[host[unit]]
    return tuple(host)
