"""Medians and their ratios, with bootstrap intervals over rounds (all contestants of a round are drawn together)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """``value``: median of one over median of the other; ``low`` to ``high``: 95 % of the resampled rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(over: Sequence[float], under: Sequence[float], *, draws: int = 1000) -> Ratio:
    """Median of ``over`` / median of ``under``; both hold one figure a round, in the same order."""
    rounds = len(over)
    generator = random.Random(0)
    values = []
    for _ in range(draws):
        picked = [generator.randrange(rounds) for _ in range(rounds)]
        values.append(median(over[i] for i in picked) / median(under[i] for i in picked))
    values.sort()
    return Ratio(median(over) / median(under), values[int(0.025 * draws)], values[int(0.975 * draws) - 1])
