"""Teams: the ways to group equal devices so that each group divides its ops between its members.

4 devices      1 1 1 1      2 2      2 1 1      3 1      4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

Teams = tuple[tuple[int, int], ...]
"""(members, how many such teams), largest first."""


def partitions(count: int, degrees: Sequence[int]) -> Iterator[Teams]:
    """Every way to make teams of these sizes of at most ``count`` devices, leaving over fewer than the smallest."""
    sizes = sorted(set(degrees), reverse=True)

    def rest(left: int, which: int) -> Iterator[Teams]:
        if which == len(sizes):
            if left < sizes[-1]:
                yield ()
            return
        for number in range(left // sizes[which], -1, -1):
            for more in rest(left - number * sizes[which], which + 1):
                yield ((sizes[which], number), *more) if number else more

    yield from rest(count, 0) if sizes else iter([()])


def teamings(counts: Sequence[int], degrees: Sequence[int]) -> Iterator[tuple[Teams, ...]]:
    """For pools of so many devices: every combination of their partitions, single devices first where they are among
    the degrees."""
    each = [sorted(partitions(count, degrees), key=lambda teams: sum(m * n * m for m, n in teams)) for count in counts]
    yield from product(*each)
