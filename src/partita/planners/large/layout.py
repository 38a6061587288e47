"""Layout: degrees of parallelism of a large model on a large cluster, and what they cost in closed form.

    stages x replicas x tensor degree x ZeRO level x recomputation x microbatches x interleaving

Step time is ``cost.pipeline``'s; memory is counted for the fullest device of every stage:

    weights, gradients, state    2 + 2 + 12 bytes a parameter in mixed precision with Adam (Rajbhandari et al., 2020),
                                 divided by the replicas from ZeRO level 1 (12), 2 (2 more), 3 (all)
    activations                  microbatches in flight x what each unit saves; of recomputed units what enters them
    working                      one unit's saved activations while it is recomputed, twice its largest results
    buffers                      two messages each way; a reserve for the driver and the communication library
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

import numpy as np
from numpy.typing import NDArray

from partita.cost.communication import Team, all_gather, all_reduce, reduce_scatter
from partita.cost.memory import in_flight, optimizer_factor
from partita.cost.pipeline import StageTime, step_seconds
from partita.cost.roofline import Assumptions
from partita.planners.large.prices import Pool, UnitPrice

Array = NDArray[np.float64]
TOLERANCE = 0.002


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
    ``recompute``: 'needed' (as little as fits) or 'all'.
    """

    groups: tuple[Group, ...]
    samples: int
    chunks: int = 1
    zero: int = 0
    sequence: bool = False
    recompute: str = "needed"

    @property
    def stages(self) -> int:
        return sum(g.stages for g in self.groups)

    @property
    def devices(self) -> int:
        return sum(g.stages * g.replicas * g.degree for g in self.groups)


@dataclass(frozen=True, slots=True)
class StageLayout:
    """``spans``: units [start, stop) of each chunk. ``recomputed``: units of each kind. Seconds are a microbatch's."""

    group: int
    spans: tuple[tuple[int, int], ...]
    recomputed: tuple[int, ...]
    forward: float
    backward: float
    memory: float
    tail: float
    transfer: float


@dataclass(frozen=True, slots=True)
class Layout:
    """``seconds``: of a step; ``bound``: the reason it is no faster: 'compute', 'bubble', 'exchange', 'reduction'."""

    degrees: Degrees
    stages: tuple[StageLayout, ...]
    microbatches: int
    seconds: float
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Prices of all units in order for one pool and degree: (kinds,) vectors; counts of each kind up to each unit."""

    counts: Array  # (kinds, units + 1)
    kinds: NDArray[np.int64]
    forward: Array
    backward: Array
    exchanged: Array
    saved: Array
    entry: Array
    working: Array
    sent: Array
    weights: Array
    trained: Array

    @staticmethod
    def of(kinds: NDArray[np.int64], prices: tuple[UnitPrice, ...]) -> Row:
        one = np.zeros((len(prices), len(kinds) + 1))
        one[kinds, np.arange(len(kinds)) + 1] = 1.0
        vectors = {f.name: np.array([getattr(p, f.name) for p in prices], dtype=float) for f in fields(UnitPrice)}
        return Row(np.cumsum(one, axis=1), kinds, **vectors)

    @property
    def all(self) -> Array:
        """How many units there are of each kind."""
        total: Array = self.counts[:, -1]
        return total


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes a parameter: of its ``weight``, ``gradient``, and ``optimizer`` (state and master copy)."""

    weight: float
    gradient: float
    optimizer: float

    @staticmethod
    def of(assume: Assumptions, optimizer: str, *, train: bool = True) -> StateBytes:
        """Mixed precision with Adam: 2 + 2 + 12 (master copy, two moments); full: 4 + 4 + 8."""
        if not train:
            return StateBytes(2.0 if assume.precision == "mixed" else 4.0, 0.0, 0.0)
        state = 4.0 * optimizer_factor(optimizer)
        if assume.precision == "mixed":
            return StateBytes(2.0, 2.0, state + 4.0)
        return StateBytes(4.0, 4.0, state)

    def held(self, weights: float, trained: float, replicas: int, zero: int) -> float:
        """Bytes on one of ``replicas`` devices."""
        w = self.weight * weights / (replicas if zero >= 3 else 1)
        g = self.gradient * trained / (replicas if zero >= 2 else 1)
        return w + g + self.optimizer * trained / (replicas if zero >= 1 else 1)


def replica_team(pool: Pool, group: Group) -> Team:
    """The replicas of one shard: neighbours in the node where the degree leaves room."""
    near = max(1, min(group.replicas, pool.per_node // max(group.degree, 1)))
    while group.replicas % near:
        near -= 1
    return Team(near, group.replicas // near, pool.inside, pool.across)


def tail_seconds(
    pool: Pool, group: Group, weights: float, trained: float, state: StateBytes, zero: int, assume: Assumptions
) -> float:
    """After the last microbatch: gradients reduced over the replicas, the optimizer's step, weights gathered."""
    team = replica_team(pool, group)
    nbytes = state.gradient * trained
    reduced = all_reduce(nbytes, team) if zero == 0 else reduce_scatter(nbytes, team) if zero < 3 else 0.0
    gathered = all_gather(state.weight * trained, team) if zero in (1, 2) else 0.0
    share = trained / (group.replicas if zero else 1)
    moved = share * (2.0 * state.optimizer + state.gradient + state.weight)
    return (reduced + gathered) * (1.0 - assume.hidden) + moved / (pool.device.memory_bandwidth * assume.memory)


def gathers_seconds(pool: Pool, group: Group, weights: float, state: StateBytes) -> float:
    """ZeRO level 3, each microbatch: weights gathered for forward and for backward, gradients scattered."""
    team = replica_team(pool, group)
    nbytes = state.weight * weights
    return 2.0 * all_gather(nbytes, team) + reduce_scatter(state.gradient * weights, team)


def send_seconds(pool: Pool, group: Group, nbytes: float, sequence: bool) -> float:
    """One way to the next stage: each device of a shard sends its part and the parts are joined over the node's links
    (Narayanan et al., 2021, section 4.1)."""
    near = group.degree * group.replicas < pool.per_node
    link = pool.inside if near else pool.across
    part = nbytes if sequence else nbytes / group.degree
    joined = 0.0
    if group.degree > 1 and not sequence:
        joined = all_gather(nbytes, Team(min(group.degree, pool.per_node), 1, pool.inside, pool.across))
    return link.seconds(part) + joined


class Pricer:
    """Finds the cuts of a layout and prices it."""

    def __init__(
        self,
        pools: tuple[Pool, ...],
        batch: int,
        assume: Assumptions,
        *,
        optimizer: str,
        headroom: float,
        train: bool = True,
        ties: tuple[tuple[int, int, float], ...] = (),
    ) -> None:
        self.pools, self.batch, self.assume, self.train = pools, batch, assume, train
        self.state = StateBytes.of(assume, optimizer, train=train)
        self.headroom, self.ties = headroom, ties

    def limit(self, pool: Pool) -> float:
        return self.headroom * pool.device.memory_bytes - self.assume.reserve_bytes

    def microbatches(self, degrees: Degrees) -> int:
        """Of the whole batch; each stage's replicas share them."""
        return max(1, ceil(self.batch / degrees.samples))

    def bound(self, degrees: Degrees, rows: tuple[Row, ...]) -> float:
        """No step of this layout is shorter: all stages equally long, nothing recomputed that need not be."""
        m = self.microbatches(degrees)
        rate, least = 0.0, np.inf
        for group, row in zip(degrees.groups, rows, strict=True):
            work = self._work(degrees, group, row)
            rate += group.stages * group.replicas / work
            least = min(least, work)
        if degrees.chunks > 1:
            mine = ceil(m / degrees.groups[0].replicas)
            return (mine + (degrees.stages - 1) / degrees.chunks) * least / degrees.stages
        return least + min((ceil(m / g.replicas) - 1) * g.replicas for g in degrees.groups) / rate

    def _work(self, degrees: Degrees, group: Group, row: Row) -> float:
        """Least seconds of a microbatch in all units, were they in one stage of the group."""
        busy = float(self._busy(row, degrees) @ row.all)
        if degrees.zero < 3 or group.replicas == 1 or not self.train:
            return busy
        return max(busy, float(self._gathers(group, row) @ row.all))

    def _gathers(self, group: Group, row: Row) -> Array:
        pool = self.pools[group.pool]
        return np.array([gathers_seconds(pool, group, float(w), self.state) for w in row.weights])

    def _busy(self, row: Row, degrees: Degrees) -> Array:
        forward = row.forward
        if not self.train:
            return forward
        again = forward if degrees.recompute == "all" else 0.0
        result: Array = forward + again + row.backward
        return result

    def price(self, degrees: Degrees, rows: tuple[Row, ...], best: float = np.inf) -> Layout | None:
        """The layout with the cuts that make its slowest stage fastest; None where none fits or none beats ``best``."""
        cuts = self._cuts(degrees, rows, best)
        if cuts is None:
            return None
        return self._priced(degrees, rows, cuts)

    # -- one device's load

    def _load(
        self, degrees: Degrees, stage: int, row: Row, counts: Array, flight: float
    ) -> tuple[Array, Array, Array, Array]:
        """For columns of unit counts: (forward, backward, bytes, recomputed units a kind); infinite where none fits.

        ``flight``: microbatches held at the peak, each with all of the units' activations.
        """
        group = degrees.groups[self._group_of(degrees, stage)]
        pool = self.pools[group.pool]
        forward, backward = row.forward @ counts, row.backward @ counts
        if not self.train:
            backward = np.zeros_like(forward)
        weights, trained = row.weights @ counts, row.trained @ counts
        state, r, z = self.state, group.replicas, degrees.zero
        held = (state.weight / (r if z >= 3 else 1)) * weights
        held = held + (state.gradient / (r if z >= 2 else 1) + state.optimizer / (r if z >= 1 else 1)) * trained
        there = counts > 0
        working = np.max(np.where(there, row.working[:, None], 0.0), axis=0)
        if z >= 3:
            working = working + 2 * state.weight * np.max(np.where(there, row.weights[:, None], 0.0), axis=0)
        buffers = 4.0 * np.max(np.where(there, row.sent[:, None], 0.0), axis=0)
        need = held + working + buffers
        again = np.zeros_like(counts)
        limit = self.limit(pool)
        if self.train:
            saved, entry = row.saved, row.entry
            largest = np.max(np.where(there, saved[:, None], 0.0), axis=0)
            if degrees.recompute == "all":
                again = counts.copy()
            plain = need + flight * (saved @ counts)
            short = plain - limit
            gains = flight * np.maximum(saved - entry, 0.0)
            ratio = gains / np.maximum(row.forward, 1e-30)
            if degrees.recompute != "all":
                deficit = np.where(short > 0, short + largest, 0.0)
                for kind in np.argsort(-ratio):
                    if gains[kind] <= 0:
                        continue
                    take = np.minimum(counts[kind], np.ceil(np.maximum(deficit, 0.0) / gains[kind]))
                    again[kind] = take
                    deficit = deficit - take * gains[kind]
            need = plain - gains @ again + np.where(again.sum(axis=0) > 0, largest, 0.0)
            backward = backward + row.forward @ again
        fits = need <= limit
        backward = np.where(fits, backward, np.inf)
        if z >= 3 and r > 1:
            extra = self._gathers(group, row) @ counts
            backward = np.maximum(forward + backward, extra) - forward
        return forward, backward, need, again

    def _group_of(self, degrees: Degrees, stage: int) -> int:
        for g, group in enumerate(degrees.groups):
            if stage < group.stages:
                return g
            stage -= group.stages
        raise IndexError(stage)

    def _flight(self, degrees: Degrees, stage: int, m: int) -> float:
        """Microbatches held at the peak by one device of the stage, in whole loads of the device."""
        g = self._group_of(degrees, stage)
        group = degrees.groups[g]
        mine = ceil(m / group.replicas)
        p, v = degrees.stages, degrees.chunks
        if v > 1:
            return min(mine * v, 2 * (p - stage - 1) + (v - 1) * p + 1) / v
        after = sum(degrees.groups[self._group_of(degrees, s)].replicas for s in range(stage, p))
        every = sum(x.stages * x.replicas for x in degrees.groups)
        return in_flight(
            "1f1b", microbatches=mine, replicas=group.replicas, devices_after=after, devices=every, joined=False
        )

    # -- cuts

    def _cuts(self, degrees: Degrees, rows: tuple[Row, ...], best: float) -> list[int] | None:
        """Ends of the stages (of all chunks, in model order) that make the slowest fastest, within memory."""
        m = self.microbatches(degrees)
        p, v = degrees.stages, degrees.chunks
        total = len(rows[0].kinds)
        if p * v > total:
            return None
        flights = [self._flight(degrees, s, m) for s in range(p)]
        loads: dict[tuple[int, int], Array] = {}

        def times(stage: int, stop: int) -> Array:
            """Busy seconds a microbatch, shared by the replicas, of a stage [i, stop) for every i < stop."""
            key = (0 if v > 1 else stage, stop)
            if key not in loads:
                g = self._group_of(degrees, key[0])
                row = rows[g]
                counts = row.counts[:, stop : stop + 1] - row.counts[:, :stop]
                if v > 1:
                    busy = self._busy(row, degrees) @ counts
                else:
                    forward, backward, _, _ = self._load(degrees, stage, row, counts, flights[stage])
                    busy = forward + backward
                loads[key] = busy / degrees.groups[g].replicas
            return loads[key]

        def cover(most: float) -> tuple[list[int], float] | None:
            """Ends of stages no longer than ``most``, filled from the last to the first; the longest of them."""
            stops, stop, longest = [], total, 0.0
            for stage in range(p * v - 1, -1, -1):
                if stop < stage + 1:
                    return None
                here = times(stage, stop)[stage:]
                ok = here <= most
                first = int(ok.argmax())
                if not ok[first] or (stage == 0 and first > 0):
                    return None
                longest = max(longest, float(here[first]))
                stops.append(stop)
                stop = first + stage
            return stops[::-1], longest

        work = [self._work(degrees, g, row) for g, row in zip(degrees.groups, rows, strict=True)]
        low = 1.0 / sum(g.stages * g.replicas / w for g, w in zip(degrees.groups, work, strict=True)) / v
        rest = v * min((ceil(m / g.replicas) - 1) * g.replicas for g in degrees.groups)
        ceiling = (best - (min(work) if v == 1 else 0.0)) / rest if rest else best
        found = cover(ceiling) if ceiling >= low else None
        if found is None:
            return None
        for _ in range(12):
            high = found[1]
            if high - low < TOLERANCE * high:
                break
            middle = low + 0.5 * (high - low) if high < 4 * low else 2.0 * low
            tried = cover(middle)
            if tried is None:
                low = middle
            else:
                found = tried
        return found[0]

    # -- the price

    def _priced(self, degrees: Degrees, rows: tuple[Row, ...], stops: list[int]) -> Layout | None:
        m = self.microbatches(degrees)
        p, v = degrees.stages, degrees.chunks
        starts = [0, *stops[:-1]]
        made: list[StageLayout] = []
        exchanged = 0.0
        for rank in range(p):
            g = self._group_of(degrees, rank)
            group, row = degrees.groups[g], rows[g]
            pool = self.pools[group.pool]
            spans = tuple((starts[s], stops[s]) for s in range(rank, p * v, p))
            counts = np.sum([row.counts[:, b : b + 1] - row.counts[:, a : a + 1] for a, b in spans], axis=0)
            forward, backward, need, again = self._load(degrees, rank, row, counts, self._flight(degrees, rank, m))
            if not np.isfinite(backward[0]):
                return None
            weights = float(row.weights @ counts[:, 0])
            trained = float(row.trained @ counts[:, 0])
            for i, j, elements in self.ties:
                if any(a <= i < b for a, b in spans) and any(a <= j < b for a, b in spans):
                    weights, trained = weights - elements / group.degree, trained - elements / group.degree
            entering = float(row.sent[row.kinds[starts[rank] - 1]]) if starts[rank] else 0.0
            tail = 0.0
            if self.train:
                tail = tail_seconds(pool, group, weights, trained, self.state, degrees.zero, self.assume)
            transfer = v * send_seconds(pool, group, entering, degrees.sequence)
            exchanged += float(row.exchanged @ counts[:, 0]) * ceil(m / group.replicas) / p
            made.append(
                StageLayout(g, spans, tuple(int(x) for x in again[:, 0]), float(forward[0]), float(backward[0]),
                            float(need[0]) + self.assume.reserve_bytes, tail, transfer)
            )  # fmt: skip
        return self._summed(degrees, tuple(made), m, exchanged)

    def _summed(self, degrees: Degrees, stages: tuple[StageLayout, ...], m: int, exchanged: float) -> Layout:
        times = [
            StageTime(s.forward, s.backward, 0.0, ceil(m / degrees.groups[s.group].replicas), s.transfer, 0.0, s.tail)
            for s in stages
        ]
        tail = max(s.tail for s in stages)
        mine = max(t.microbatches for t in times)
        slowest = max((t.forward + t.backward) * t.microbatches for t in times)
        if degrees.chunks > 1:
            p = len(stages)
            busy = [t.forward + t.backward + 2.0 * t.transfer for t in times]
            mean = sum(busy) / p / degrees.chunks
            seconds = mine * max(busy) + (p - 1) * mean + tail
        else:
            seconds = step_seconds("1f1b", times, train=self.train)
        sending = 2.0 * max(t.transfer for t in times) * mine
        parts = (
            ("compute", slowest - exchanged),
            ("tensor exchange", exchanged),
            ("messages", sending),
            ("bubble", max(seconds - slowest - sending - tail, 0.0)),
            ("reduction and optimizer", tail),
        )
        return Layout(degrees, stages, m, seconds, parts)
