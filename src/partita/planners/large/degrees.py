"""Degrees: the nouns of a layout; what is chosen before the cuts, each stage's share, and what a step takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Stages in a row on one pool: ``stages`` of them, each on ``replicas`` x ``degree`` devices."""

    pool: int
    stages: int
    replicas: int
    degree: int


@dataclass(frozen=True, slots=True)
class Degrees:
    """What is chosen before the cuts. ``samples``: of a microbatch. ``chunks``: stages a device takes in turn.

    ``zero``: 0 to 3. ``sequence``: activations between products divided along the sequence.
    ``recompute``: 'needed' (as little as fits) or 'all'. ``order``: of the steps where a device has one stage.
    ``shares``: the groups are not one after another but hold the whole model side by side, with microbatches of so many
    samples; one stage.
    """

    groups: tuple[Group, ...]
    samples: int
    chunks: int = 1
    zero: int = 0
    sequence: bool = False
    recompute: str = "needed"
    order: str = "1f1b"
    shares: tuple[int, ...] = ()

    @property
    def stages(self) -> int:
        """In a row, one a device; the plan has ``chunks`` times as many."""
        return 1 if self.shares else sum(g.stages for g in self.groups)

    @property
    def devices(self) -> int:
        return sum(g.stages * g.replicas * g.degree for g in self.groups)

    @property
    def schedule(self) -> str:
        return "interleaved" if self.chunks > 1 else self.order

    def side(self, group: int) -> Degrees:
        """As one of the groups side by side sees it: a stage whose replicas are all there are, of all groups."""
        mine = self.groups[group]
        every = Group(mine.pool, 1, sum(g.replicas for g in self.groups), mine.degree)
        return Degrees((every,), self.shares[group], 1, self.zero, self.sequence, self.recompute)

    def group_of(self, stage: int) -> int:
        """Index of the group that holds a stage (of those in a row)."""
        for g, group in enumerate(self.groups):
            if stage < group.stages:
                return g
            stage -= group.stages
        raise IndexError(stage)


@dataclass(frozen=True, slots=True)
class StageLayout:
    """``spans``: units [start, stop) of each chunk. ``recomputed``: units of each kind that are, or are offloaded
    (``Row.leaves``). Seconds are a microbatch's.

    ``late``: part of ``backward`` that no other stage waits for (weight gradients). ``tail``: after the last
    microbatch. ``transfer``: one way, of what all its chunks receive.
    """

    group: int
    spans: tuple[tuple[int, int], ...]
    recomputed: tuple[int, ...]
    forward: float
    backward: float
    memory: float
    tail: float
    transfer: float
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """``seconds``: of a step; ``closed``: the same in closed form, where the schedule was played to get ``seconds``.

    ``parts``: where the time of the slowest stage goes: (name, seconds).
    """

    degrees: Degrees
    stages: tuple[StageLayout, ...]
    microbatches: int
    seconds: float
    parts: tuple[tuple[str, float], ...]
    closed: float = 0.0
