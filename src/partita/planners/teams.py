"""Teams: the ways to group equal devices so that each group divides its ops between its members.

Of 4 devices: 1 1 1 1, 2 2, 2 1 1, 3 1, 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from partita.cluster import Cluster, Device

FEW = 5  # devices up to which every degree is worth a look
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


@dataclass(frozen=True, slots=True)
class Teaming:
    """``cluster``: each team as one device, known by its first member. ``teams``: the devices of those of several."""

    cluster: Cluster
    teams: Mapping[str, tuple[str, ...]]

    @property
    def degrees(self) -> tuple[int, ...]:
        """Numbers of members above 1."""
        return tuple(sorted({len(team) for team in self.teams.values()}))

    def leader(self, device: str) -> str:
        return next((leader for leader, team in self.teams.items() if device in team), device)


def teams_of(cluster: Cluster, *, degree: int = 0, within_node: bool = False, every: bool = False,
    alone: Collection[str] = (),
) -> Iterator[Teaming]:  # fmt: skip
    """Ways to make teams of a cluster's alike devices, neighbours first; never of single devices only.

    ``degree``: teams of so many only (0: any). ``within_node``: no team over two nodes. ``every``: teams of different
    sizes beside each other too; else all of one size, and what they leave over. ``alone``: devices in no team.
    """
    alike: dict[tuple[object, ...], list[Device]] = {}
    for device in cluster.devices:
        where = device.name if device.name in alone else device.node if within_node else 0
        alike.setdefault((device.kind, device.memory_bytes, device.flops, where), []).append(device)
    pools = [sorted(members, key=lambda d: d.node) for members in alike.values()]
    counts = [len(pool) for pool in pools]
    if degree:
        chosen: list[tuple[Teams, ...]] = [tuple(_uniform(count, degree) for count in counts)]
    else:
        chosen = [tuple(_rest(count, size) for count in counts) for size in _sizes(max(counts))]
        if every:
            chosen += list(teamings(counts, range(1, max(counts) + 1)))
    for made in dict.fromkeys(chosen):
        if any(members > 1 for teams in made for members, _ in teams):
            yield _teaming(cluster, pools, made)


def _sizes(most: int) -> Sequence[int]:
    """Degrees worth a look: all of few devices, powers of two and divisors of many."""
    few = range(2, most + 1)
    return few if most <= FEW else [t for t in few if t & (t - 1) == 0 or most % t == 0]


def _uniform(count: int, size: int) -> Teams:
    return ((size, count // size),) if count >= size else ()


def _rest(count: int, size: int) -> Teams:
    """Teams of one size, and one of what is left."""
    left = count % size
    return (*_uniform(count, size), *([(left, 1)] if left else []))


def _teaming(cluster: Cluster, pools: Sequence[Sequence[Device]], made: Sequence[Teams]) -> Teaming:
    devices, teams = [], {}
    for pool, chosen in zip(pools, made, strict=True):
        left = list(pool)
        for members, count in chosen:
            for _ in range(count):
                team, left = left[:members], left[members:]
                first = team[0]
                devices.append(replace(first, flops=sum(d.flops for d in team)))
                if members > 1:
                    teams[first.name] = tuple(d.name for d in team)
    return Teaming(replace(cluster, devices=tuple(devices)), teams)
