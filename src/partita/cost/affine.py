"""Affine: a number that is a fixed part plus a part per sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Affine:
    """``fixed + per_sample * samples``; seconds or bytes."""

    fixed: float = 0.0
    per_sample: float = 0.0

    def at(self, samples: float) -> float:
        return self.fixed + self.per_sample * samples

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.fixed + other.fixed, self.per_sample + other.per_sample)

    def scaled(self, factor: float) -> Affine:
        return Affine(self.fixed * factor, self.per_sample * factor)


def total(parts: Iterable[Affine]) -> Affine:
    """The sum."""
    fixed = per_sample = 0.0
    for part in parts:
        fixed += part.fixed
        per_sample += part.per_sample
    return Affine(fixed, per_sample)


def through(x1: float, y1: float, x2: float, y2: float) -> Affine:
    """The line through two points; constant where they stand at the same x. Never negative at or above min(x1, x2)."""
    if x1 == x2:
        return Affine(y1, 0.0)
    slope = max((y2 - y1) / (x2 - x1), 0.0)
    return Affine(y1 - slope * x1, slope)
