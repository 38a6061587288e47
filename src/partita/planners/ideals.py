"""Ideals: the sets of blocks that may lie before a cut (downsets of the block graph), as bit masks."""

from __future__ import annotations

from partita.planners.problem import Problem

MAX_IDEALS = 400


def ideals(problem: Problem, *, anywhere: bool = True, limit: int = MAX_IDEALS) -> tuple[int, ...]:
    """Downsets from the empty one to all, smallest first; the prefixes of the block order where ``anywhere`` is False
    or there are more than ``limit``.
    """
    n = problem.num_blocks
    prefixes = tuple((1 << i) - 1 for i in range(n + 1))
    if not anywhere:
        return prefixes
    before = [0] * n
    for edge in problem.edges:
        for consumer in edge.consumers:
            before[consumer] |= 1 << edge.producer
    found, frontier = {0}, [0]
    while frontier:
        new: set[int] = set()
        for mask in frontier:
            for b in range(n):
                if not mask >> b & 1 and before[b] & ~mask == 0:
                    new.add(mask | 1 << b)
        found |= new
        if len(found) > limit:
            return prefixes
        frontier = list(new)
    return tuple(sorted(found, key=lambda mask: (mask.bit_count(), mask)))
