"""Choice: one of several (cost, weight) per item at the least total cost within a limit on weight.

The multiple-choice knapsack (Kellerer, Pferschy and Pisinger, *Knapsack Problems*, 2004, chapter 11), exactly: partial
choices that another one beats in both cost and weight are dropped, and so are those that no completion makes good.
"""

from __future__ import annotations

import numpy as np

from partita.planners.problem import Array

Choices = tuple[Array, ...]
"""Per item, an array (ways, 2) of cost and weight."""


def cheapest(choices: Choices, limit: float) -> tuple[float, tuple[int, ...]] | None:
    """(least cost, way of each item) with a total weight up to ``limit``; None where there is none."""
    if any(not len(rows) for rows in choices):
        return None
    fastest = tuple(int(np.lexsort((rows[:, 1], rows[:, 0]))[0]) for rows in choices)
    if sum(float(rows[way, 1]) for rows, way in zip(choices, fastest, strict=True)) <= limit:
        return sum(float(rows[way, 0]) for rows, way in zip(choices, fastest, strict=True)), fastest
    lightest = np.array([rows[:, 1].min() for rows in choices])
    least = np.array([rows[:, 0].min() for rows in choices])
    if lightest.sum() > limit:
        return None
    lighter, faster = _behind(lightest), _behind(least)
    highest = _greedy(choices, limit)
    front = np.zeros((1, 2))
    steps: list[tuple[Array, Array]] = []
    for item, rows in enumerate(choices):
        total = (front[:, None, :] + rows[None, :, :]).reshape(-1, 2)
        able = (total[:, 1] + lighter[item + 1] <= limit) & (total[:, 0] + faster[item + 1] <= highest)
        kept = np.nonzero(able)[0]
        kept = kept[np.lexsort((total[kept, 1], total[kept, 0]))]
        lowest = np.minimum.accumulate(total[kept, 1])
        kept = kept[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
        steps.append((kept // len(rows), kept % len(rows)))
        front = total[kept]
    at = 0
    ways: list[int] = []
    for parent, way in reversed(steps):
        ways.append(int(way[at]))
        at = int(parent[at])
    return float(front[0, 0]), tuple(reversed(ways))


def _behind(values: Array) -> Array:
    """Sums of the values from each position on."""
    result: Array = np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
    return result


def _greedy(choices: Choices, limit: float) -> float:
    """The cost of a choice within the limit: from the fastest, the exchange of the least cost per weight first."""
    cost = sum(float(rows[:, 0].min()) for rows in choices)
    picked = [int(np.lexsort((rows[:, 1], rows[:, 0]))[0]) for rows in choices]
    weight = sum(float(rows[way, 1]) for rows, way in zip(choices, picked, strict=True))
    exchanges = sorted(
        ((row[0] - rows[way, 0]) / (rows[way, 1] - row[1]), item, other)
        for item, (rows, way) in enumerate(zip(choices, picked, strict=True))
        for other, row in enumerate(rows)
        if row[1] < rows[way, 1]
    )
    for _, item, other in exchanges:
        if weight <= limit:
            break
        now, new = choices[item][picked[item]], choices[item][other]
        if new[1] < now[1]:
            cost, weight, picked[item] = cost + float(new[0] - now[0]), weight + float(new[1] - now[1]), other
    return cost * (1 + 1e-12) if weight <= limit else float("inf")
