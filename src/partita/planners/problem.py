"""Problem: what a planner decides about, as numbers only: blocks, devices, transfers, limits. No names of a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from partita.planners.constraints import Constraints as Constraints

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pool:
    """Devices that are alike for the search: same kind, same memory, same constraints.

    ``shared``: they live in one memory, so replicas hold parameters once. ``members`` > 1: each of ``devices`` stands
    for a team of so many, which divide every op between them; ``memory_bytes`` is one member's. ``host``: seconds a
    byte to the host's memory, each way (0: nothing is gained there).
    """

    name: str
    devices: tuple[str, ...]
    memory_bytes: float
    shared: bool = False
    members: int = 1
    host: float = 0.0


@dataclass(frozen=True, slots=True)
class Edge:
    """A value made by block ``producer`` and used by later blocks ``consumers``; bytes of a microbatch of n samples:
    ``fixed + per_sample * n``.
    """

    producer: int
    consumers: tuple[int, ...]
    fixed: float
    per_sample: float


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters and buffers that exactly these blocks take; ``trained``: the bytes that get gradients. ``given``: not
    parameters but the whole batch of inputs and noise, where the device shares the caller's memory.
    """

    blocks: tuple[int, ...]
    nbytes: float
    trained: float
    given: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """Arrays (pools, blocks, 2) of seconds, fixed and per sample; ``whole`` (pools, blocks): once a step, on the joined
    batch. ``saved``, ``kept``, ``transient`` (blocks, 2): bytes kept to backward, bytes still kept where the block is
    recomputed, bytes while it runs; ``whole_saved`` (blocks): of the joined part. ``owed`` (blocks, 2): bytes kept from
    backward to the weights' gradients where these are put off. ``gone`` (blocks, 2): of ``saved``, what leaves the
    device where the block's activations are offloaded (empty where none may be).
    """

    forward: Array
    backward: Array
    weight: Array
    whole: Array
    saved: Array
    kept: Array
    transient: Array
    whole_saved: Array
    owed: Array
    gone: Array = field(default_factory=lambda: np.zeros((0, 2)))

    def gone_at(self, samples: int) -> Array:
        """Of each block."""
        rows = self.gone if len(self.gone) else np.zeros_like(self.saved)
        result: Array = rows[:, 0] + rows[:, 1] * samples
        return result

    def waits(self, samples: int, pool: int, copies: Array, *, train: bool = True) -> Array:
        """Seconds for which each block's ``copies`` (seconds, in forward and again in backward) hold up the computing,
        where the blocks beside it take as long as it does."""
        forward, backward = (
            rows[pool, :, 0] + rows[pool, :, 1] * samples for rows in (self.forward, self.backward + self.weight)
        )
        result: Array = np.maximum(copies - forward, 0.0) + (np.maximum(copies - backward, 0.0) if train else 0.0)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """The blocks run by teams of ``members`` devices: the team's seconds, with its collectives, and one member's bytes.

    Arrays as in ``Problem``; their rows of pools with other teams are not looked at.
    """

    members: int
    single: Times
    split: Times
    weights: tuple[Weights, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """``single``: with one microbatch; ``split``: with more. ``together``: sets of blocks of one stage.

    ``breaks``: a stage begins at these blocks. ``pools_of``: pools a block may use (absent: any). ``recompute``: blocks
    that must be; ``may_recompute``: blocks that can be. ``offload``, ``may_offload``: the same of activations that wait
    in host memory; a block is one or the other. ``lend``, ``may_lend``: the same of parameters that live there, with
    their gradients and state: of a block that is kept, or whose activations may be offloaded. ``lendable`` (blocks, 2):
    bytes of the parameters that are a block's alone, and of those that train; ``update``: seconds that the optimizer
    takes more for each trained byte that lives there.
    ``num_stages``, ``num_replicas``: exactly so many (0: open).
    ``sync``: a single stage with as many replicas as microbatches runs whole-batch ops in step: nothing is joined.
    ``shares``: of each number of ``members`` above 1 that a pool has. ``zero``: ZeRO's level, over the replicas of
    every stage whose pool is not ``shared``; ``gathered``: bytes of parameters that level 3 has whole at a time.
    """

    batch: int
    pools: tuple[Pool, ...]
    single: Times
    split: Times
    edges: tuple[Edge, ...]
    weights: tuple[Weights, ...]
    microbatches: tuple[int, ...] = (1,)
    schedules: tuple[str, ...] = ("1f1b",)
    optimizer_factor: float = 0.0
    train: bool = True
    replicas: bool = True
    joined: bool = False
    sync: bool = False
    latency: float = 0.0
    seconds_per_byte: float = 0.0
    reduce_seconds_per_byte: float = 0.0
    together: tuple[tuple[int, ...], ...] = ()
    breaks: tuple[int, ...] = ()
    pools_of: tuple[tuple[int, tuple[int, ...]], ...] = ()
    recompute: tuple[int, ...] = ()
    may_recompute: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()
    may_offload: tuple[int, ...] = ()
    lend: tuple[int, ...] = ()
    may_lend: tuple[int, ...] = ()
    lendable: Array = field(default_factory=lambda: np.zeros((0, 2)))
    update: float = 0.0
    max_stages: int = 0
    num_stages: int = 0
    num_replicas: int = 0
    shares: tuple[Shares, ...] = ()
    zero: int = 0
    gathered: float = 0.0

    def on(self, pool: int) -> Problem:
        """The same, its times and weights being those of the pool's teams."""
        members = self.pools[pool].members
        if members == 1:
            return self
        found = next(s for s in self.shares if s.members == members)
        return replace(self, single=found.single, split=found.split, weights=found.weights)

    @property
    def num_blocks(self) -> int:
        return int(self.single.forward.shape[1])

    @property
    def num_devices(self) -> int:
        return sum(len(pool.devices) for pool in self.pools)

    def lends(self, pool: int) -> bool:
        """Whether parameters of stages there may live in host memory: each device has all of them, and a host."""
        there = self.pools[pool]
        return there.host > 0 and there.members == 1 and not self.zero

    def times(self, microbatches: int, *, synced: bool = False) -> Times:
        return self.single if microbatches == 1 or synced else self.split

    def samples(self, microbatches: int) -> int:
        """Of the largest microbatch."""
        return -(-self.batch // microbatches) if self.batch else 1


@dataclass(frozen=True, slots=True)
class StageChoice:
    """``blocks`` on ``replicas`` devices of pool ``pool``; ``recompute``, ``offload`` (activations), ``lend``
    (parameters): which of them, beyond the forced ones."""

    blocks: tuple[int, ...]
    pool: int
    replicas: int = 1
    recompute: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()
    lend: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete choice. ``seconds``: by the closed form."""

    stages: tuple[StageChoice, ...]
    microbatches: int
    schedule: str
    seconds: float = field(default=float("inf"), compare=False)


@dataclass(frozen=True, slots=True)
class Optimal:
    """No plan of the searched space is faster. ``others``: runners-up, best first."""

    best: Candidate
    others: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Feasible:
    """A plan that fits; the best possible is at most ``gap`` (a ratio) faster."""

    best: Candidate
    gap: float
    others: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No plan of the searched space fits."""

    reason: str
    remedies: tuple[str, ...] = ()


Outcome = Optimal | Feasible | Infeasible
