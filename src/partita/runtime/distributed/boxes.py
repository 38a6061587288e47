"""Boxes: which ranks have the same part of a parameter, and so sum their gradients among themselves.

two stages, stage 1 of two replicas of two members     rank 0 | 1 2 | 3 4
a weight of stage 0                                     (0)
a weight of stage 1 cut by rows                         (1 3) (2 4)     the first rows, the last rows
a weight of stage 1 that is whole on its members        (1 3) (2 4)     both members of a group have the same gradient
one whose gradient is a sum over the members            (1 2 3 4)
a tied weight of both                                   (0 1 2 3 4)     2 and 4 stay silent: 1 and 3 speak for them
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partita.divide import Division
from partita.program import Program
from partita.runtime.distributed.messages import rank_of

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Boxes:
    """One parameter's. ``sets``: ranks with the same part, which sum among themselves. ``silent``: ranks whose gradient
    another one of the set speaks for. ``groups``: the members, in order, that together have all of it where it is cut.
    """

    sets: tuple[Ranks, ...]
    silent: frozenset[int] = frozenset()
    groups: tuple[Ranks, ...] = ()

    @property
    def ranks(self) -> Ranks:
        return tuple(sorted({r for found in self.sets for r in found}))

    def of(self, rank: int) -> Ranks:
        """The set this rank is in; () where it has no part."""
        return next((found for found in self.sets if rank in found), ())


def boxes(program: Program, names: Iterable[str], size: int, division: Division | None) -> dict[str, Boxes]:
    """By graph name, of the parameters that the program uses; all ranks have those of its batch-independent part.
    Their order is the same on every rank."""
    wanted, everyone = set(names), tuple(range(size))
    users: dict[str, set[Ranks]] = {}
    whole: set[str] = set()
    for segment, places in zip(program.segments, program.placement, strict=True):
        used = sorted({use.tensor for use in segment.uses} & wanted)
        if segment.phase == "once":
            whole.update(used)
            for name in used:
                users.setdefault(name, set())
            continue
        groups = {tuple(rank_of(d) for d in program.members(place)) for place in places}
        for name in used:
            users.setdefault(name, set()).update(groups)
    shards = division.members[0].shards if division is not None else {}
    partial = division.members[0].partial if division is not None else frozenset()
    found = {}
    for name, groups in users.items():
        lengths = {len(g) for g in groups}
        union = tuple(sorted({r for g in groups for r in g}))
        if name in whole:
            found[name] = Boxes((everyone,), _second(groups) if name not in partial else frozenset())
        elif name in partial or lengths == {1}:
            found[name] = Boxes((union,))
        elif len(lengths) == 1:
            (length,) = lengths
            sets = tuple(tuple(sorted({g[i] for g in groups})) for i in range(length))
            found[name] = Boxes(sets, groups=tuple(sorted(groups)) if name in shards else ())
        else:
            found[name] = Boxes((union,), _second(groups))
    return found


def _second(groups: set[Ranks]) -> frozenset[int]:
    return frozenset(r for g in groups for r in g[1:])
