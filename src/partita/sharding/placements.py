"""Placements: how the members of a group hold one tensor (GSPMD, Xu et al. 2021; DTensor's words).

    Replicate     everybody holds all of it, and its gradient
    Shard         everybody holds some rows of one dim, and the gradient of those
    Partial       the tensor is the sum of what they hold; everybody holds all of its gradient
    Copied        as Replicate, but each has a part of the gradient, which is their sum: what a divided op leaves

A ``Cut`` says which rows. A fused ``(3 heads d)`` weight divided by heads goes round three times:

    rounds  ((2d, 1d), (2d, 1d), (2d, 1d))        member 0: rows 0 1 . | 3 4 . | 6 7 .      (in units of d, three heads)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from partita.errors import UsageError
from partita.graph import Dim, Size

MAX_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """Of a dim: in each round, in order, how many rows each member holds. All rounds are gone through ``outer`` times
    (a number that follows the batch: heads inside of a merged (batch heads) dim).
    """

    rounds: tuple[tuple[int, ...], ...]
    outer: Dim = 1

    @property
    def total(self) -> int:
        """Rows of all members in one pass."""
        return sum(map(sum, self.rounds))

    def mine(self, rank: int) -> int:
        """Rows of one member in one pass."""
        return sum(r[rank] for r in self.rounds)


@dataclass(frozen=True, slots=True)
class Replicate:
    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Copied:
    def __str__(self) -> str:
        return "Copied"


@dataclass(frozen=True, slots=True)
class Partial:
    def __str__(self) -> str:
        return "Partial"


@dataclass(frozen=True, slots=True)
class Shard:
    dim: int
    cut: Cut

    def __str__(self) -> str:
        return f"Shard({self.dim})"


Placement = Replicate | Copied | Partial | Shard
REPLICATE, COPIED, PARTIAL = Replicate(), Copied(), Partial()

_SHARD = re.compile(r"Shard\((-?\d+)\)")


def parse_placement(text: str) -> int | str:
    """``Shard(1)`` -> 1, ``Replicate`` and ``Partial`` as they are. Raises UsageError for anything else."""
    found = _SHARD.fullmatch(text.strip())
    if found:
        return int(found.group(1))
    if text.strip() in ("Replicate", "Replicate()", "Partial", "Partial()"):
        return text.strip().removesuffix("()")
    raise UsageError(f"{text!r} is no placement; write Shard(0) (the dim to divide), Replicate or Partial")


def even(size: int, members: int) -> Cut | None:
    """Near-equal rows, the larger parts first; None where somebody would have none."""
    if size < members:
        return None
    return Cut((tuple(size // members + (i < size % members) for i in range(members)),))


def times(dim: Dim, number: int) -> Dim:
    return Size(dim.fixed * number, dim.per_sample * number) if isinstance(dim, Size) else dim * number


def inside(cut: Cut, labels: Sequence[Dim], at: int) -> Cut | None:
    """The cut of a merged dim of which label ``at`` (sizes in ``labels``, outermost first) is cut so."""
    before, after = list(labels[:at]), list(labels[at + 1 :])
    if any(isinstance(d, Size) for d in after):
        return None
    inner = prod(d for d in after if isinstance(d, int))
    rounds = tuple(tuple(n * inner for n in r) for r in cut.rounds)
    if cut.outer != 1:
        return Cut(rounds, cut.outer) if all(d == 1 for d in before) else None
    follows = [d for d in before if isinstance(d, Size)]
    again = prod(d for d in before if isinstance(d, int))
    if len(follows) > 1 or again * len(rounds) > MAX_ROUNDS or (follows and before[0] != follows[0] and again != 1):
        return None
    return Cut(rounds * again, follows[0] if follows else 1)


def apart(cut: Cut, labels: Sequence[Dim]) -> tuple[int, Cut] | None:
    """Which label of a merged dim is cut, and how, where the dim is cut so; None where the cut goes across labels."""
    for at, size in enumerate(labels):
        if size == 1 or isinstance(size, Size) and cut.outer == 1:
            continue
        before, after = labels[:at], labels[at + 1 :]
        if any(isinstance(d, Size) for d in after):
            continue
        inner = prod(d for d in after if isinstance(d, int))
        again, follows = prod(d for d in before if isinstance(d, int)), [d for d in before if isinstance(d, Size)]
        if len(cut.rounds) % again or any(n % inner for r in cut.rounds for n in r):
            continue
        once = cut.rounds[: len(cut.rounds) // again]
        if once * again != cut.rounds:
            continue
        rounds = tuple(tuple(n // inner for n in r) for r in once)
        own = Cut(rounds, 1)
        if isinstance(size, Size):
            own = Cut(rounds, cut.outer)
            if not follows and again == 1 and times(cut.outer, own.total) == size:
                return at, own
            continue
        outer = follows[0] if len(follows) == 1 else 1
        if len(follows) <= 1 and outer == cut.outer and own.total == size and (again == 1 or not follows):
            return at, own
    return None


def local(size: Dim, cut: Cut, rank: int) -> Dim:
    """Rows of a dim that one member holds."""
    return times(cut.outer, cut.mine(rank))


def local_shape(shape: tuple[Dim, ...], placement: Placement, rank: int) -> tuple[Dim, ...]:
    """Shape of what one member holds."""
    if not isinstance(placement, Shard):
        return shape
    return tuple(local(d, placement.cut, rank) if i == placement.dim else d for i, d in enumerate(shape))
