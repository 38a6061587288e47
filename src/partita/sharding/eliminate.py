"""Eliminate: the cheapest labelling of a graph of choices, variable by variable (nonserial dynamic programming,
Bertele and Brioschi 1972; bucket elimination, Dechter 1999).

    minimise   sum of one(v)[x_v]  +  sum of two(u, v)[x_u, x_v]

Exact as long as no table grows beyond ``limit`` entries: chains with skips, the shape of models, stay far below. Where
one would, the variable with most neighbours is settled first, at its own cheapest choice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Key = TypeVar("Key", bound=Hashable)
Table = NDArray[np.float64]


def cheapest(
    one: Mapping[Key, Table], two: Mapping[tuple[Key, Key], Table], *, limit: int = 1 << 20
) -> tuple[dict[Key, int], float]:
    """The choice of each variable, and what all cost together. Ties go to the earlier choice."""
    factors: dict[int, tuple[tuple[Key, ...], Table]] = {}
    at: dict[Key, set[int]] = {v: set() for v in one}

    numbers = count()

    def enter(variables: tuple[Key, ...], table: Table) -> None:
        number = next(numbers)
        factors[number] = (variables, table)
        for v in variables:
            at[v].add(number)

    for v, costs in one.items():
        enter((v,), np.asarray(costs, dtype=np.float64))
    for (u, v), costs in two.items():
        enter((u, v), np.asarray(costs, dtype=np.float64))
    size = {v: len(costs) for v, costs in one.items()}
    left = dict.fromkeys(one)
    undo: list[tuple[Key, tuple[Key, ...], NDArray[np.intp]]] = []
    spread = {v: _spread(v, at, factors, size) for v in left}
    queue = [(spread[v], i, v) for i, v in enumerate(left)]
    place = {v: i for i, v in enumerate(left)}
    heapify(queue)
    while left:
        entries, _, v = heappop(queue)
        if v not in left or entries != spread[v]:
            continue
        if entries > limit:
            heappush(queue, (entries, place[v], v))
            v = max(left, key=lambda x: len(_near(x, at, factors)))
        touched = _near(v, at, factors)
        tables = [factors[n] for n in sorted(at[v])]
        if entries > limit:
            choice = int(_joined((v,), [t for t in tables if t[0] == (v,)], size).argmin())
            new = _settled(v, choice, tables)
            undo.append((v, (), np.asarray(choice)))
        else:
            others = tuple(touched)
            total = _joined((*others, v), tables, size)
            undo.append((v, others, total.argmin(axis=-1)))
            new = [(others, total.min(axis=-1))]
        for n in sorted(at[v]):
            for u in factors.pop(n)[0]:
                if u != v:
                    at[u].discard(n)
        del left[v]
        for names, table in new:
            enter(names, table)
        for u in touched:
            now = _spread(u, at, factors, size)
            if now != spread[u]:
                spread[u] = now
                heappush(queue, (now, place[u], u))
    found: dict[Key, int] = {}
    for v, others, best in reversed(undo):
        found[v] = int(best[tuple(found[u] for u in others)])
    return found, sum(float(table) for variables, table in factors.values() if not variables)


def _near(v: Key, at: Mapping[Key, set[int]], factors: Mapping[int, tuple[tuple[Key, ...], Table]]) -> dict[Key, None]:
    """The variables that share a table with ``v``, in a fixed order."""
    return dict.fromkeys(u for n in sorted(at[v]) for u in factors[n][0] if u != v)


def _spread(
    v: Key, at: Mapping[Key, set[int]], factors: Mapping[int, tuple[tuple[Key, ...], Table]], size: Mapping[Key, int]
) -> int:
    """Entries of the table that eliminating ``v`` takes."""
    entries, dims = size[v], 1
    for u in _near(v, at, factors):
        entries *= size[u]
        dims += 1
    return entries if dims < 30 else 1 << 62


def _joined(variables: tuple[Key, ...], tables: list[tuple[tuple[Key, ...], Table]], size: Mapping[Key, int]) -> Table:
    total = np.zeros(tuple(size[v] for v in variables))
    for names, table in tables:
        order = [v for v in variables if v in names]
        shape = tuple(size[v] if v in names else 1 for v in variables)
        total = total + table.transpose([names.index(v) for v in order]).reshape(shape)
    return total


def _settled(v: Key, choice: int, tables: list[tuple[tuple[Key, ...], Table]]) -> list[tuple[tuple[Key, ...], Table]]:
    """The tables with ``v`` at its choice."""
    return [(tuple(u for u in names if u != v), np.asarray(t.take(choice, axis=names.index(v)))) for names, t in tables]
