"""Ideals: the sets of blocks that may lie before a cut (downsets of the block graph), as bit masks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

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
    found = downsets(before, limit)
    return prefixes if found is None else tuple(sorted(found, key=lambda mask: (mask.bit_count(), mask)))


def downsets(before: Sequence[int], limit: int, end: float = math.inf) -> list[int] | None:
    """Every set of nodes that has, with a node, the nodes ``before`` it (masks); smaller ones first. None where there
    are more than ``limit``, or at the moment ``end`` (``time.perf_counter``).
    """
    after: list[list[int]] = [[] for _ in before]
    for node, mask in enumerate(before):
        for earlier in bits(mask):
            after[earlier].append(node)
    found: list[int] = []
    level = {0: sum(1 << node for node, mask in enumerate(before) if not mask)}
    while level:
        found += level
        larger: dict[int, int] = {}
        for mask, free in level.items():
            if len(found) + len(larger) > limit or time.perf_counter() > end:
                return None
            for node in bits(free):
                grown = mask | 1 << node
                if grown not in larger:
                    opened = sum(1 << later for later in after[node] if not before[later] & ~grown)
                    larger[grown] = (free & ~(1 << node)) | opened
        level = larger
    return found


def bits(mask: int) -> Iterable[int]:
    """Positions of the ones, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def topological_orders(count: int, pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Some orders of the nodes that the pairs follow: breadth and depth first, from the sources and from the sinks."""
    reverse = [(b, a) for a, b in pairs]
    return (
        *(_topological(count, pairs, deep=deep) for deep in (False, True)),
        *(_topological(count, reverse, deep=deep)[::-1] for deep in (False, True)),
    )


def _topological(count: int, pairs: Sequence[tuple[int, int]], *, deep: bool) -> tuple[int, ...]:
    after: list[list[int]] = [[] for _ in range(count)]
    waiting = [0] * count
    for a, b in pairs:
        after[a].append(b)
        waiting[b] += 1
    ready = [node for node in range(count) if not waiting[node]]
    order: list[int] = []
    while ready:
        node = ready.pop(-1 if deep else 0)
        order.append(node)
        for later in after[node]:
            waiting[later] -= 1
            if not waiting[later]:
                ready.append(later)
    return tuple(order)
