"""Loads: what units cost one device of a stage, in seconds and bytes; recomputed or offloaded as memory asks.

weights, gradients, state    2 + 2 + 12 bytes a parameter in mixed precision with Adam (Rajbhandari et al., 2020),
                             divided by the replicas from ZeRO level 1 (12), 2 (2 more), 3 (all)
activations                  microbatches in flight x what each unit saves; of recomputed and offloaded ones what enters
working                      one unit's saved activations while it is recomputed, two units' that are copied to the host
                             and back, twice its largest results
buffers                      two messages each way; a reserve for the driver and the communication library
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil

import numpy as np
from numpy.typing import NDArray

from partita.cost.roofline import Assumptions
from partita.planners.large.degrees import Degrees, Group
from partita.planners.large.exchange import Gathers, StateBytes, together
from partita.planners.large.prices import Pool, UnitPrice

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all units together. ``price``: least seconds that free a byte by recomputing or offload, ``rate``: most bytes
    kept a second of work."""

    forward: float
    backward: float
    late: float
    fixed: float
    saved: float
    weights: float
    trained: float
    price: float
    rate: float

    @staticmethod
    def of(vectors: Mapping[str, Array], relief: Array, counts: Array, fixed: Array) -> Totals:
        sums = {k: float(vectors[k] @ counts) for k in ("forward", "backward", "late", "saved", "weights", "trained")}
        freed, there = np.maximum(vectors["saved"] - vectors["entry"], 0.0), counts > 0
        some = (freed > 0) & there
        price = float(np.min(relief[some] / freed[some])) if some.any() else np.inf
        busy = np.maximum(vectors["forward"] + vectors["backward"], 1e-30)
        rate = float(np.max(vectors["saved"][there] / busy[there]))
        return Totals(**sums, fixed=float(relief @ fixed), price=price, rate=rate)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Prices of all units in order for one pool and degree: (kinds,) vectors; counts of each kind up to each unit.

    ``fixed``: the same counts of the units that are relieved because a person said so. To relieve a unit of what it
    saved, its activations are made again or, where ``leaves`` says so, wait in host memory: ``relief`` seconds, and
    ``peak`` bytes while any is. A kind of unit has one way: the quicker, or the one that a person named.
    """

    counts: Array  # (kinds, units + 1)
    fixed: Array
    kinds: NDArray[np.int64]
    forward: Array
    backward: Array
    late: Array
    exchanged: Array
    saved: Array
    entry: Array
    working: Array
    sent: Array
    weights: Array
    trained: Array
    relief: Array
    leaves: NDArray[np.bool_]
    peak: Array
    total: Totals

    @staticmethod
    def of(
        kinds: NDArray[np.int64], prices: tuple[UnitPrice, ...], again: NDArray[np.bool_],
        away: NDArray[np.bool_] | None = None, host: float = 0.0,
    ) -> Row:  # fmt: skip
        """``again``, ``away``: units that a person named. ``host``: seconds a byte to the host's memory (0: not)."""
        one = np.zeros((len(prices), len(kinds) + 1))
        one[kinds, np.arange(len(kinds)) + 1] = 1.0
        vectors = {f.name: np.array([getattr(p, f.name) for p in prices], dtype=float) for f in fields(UnitPrice)}
        fixed = np.cumsum(one * np.concatenate(([False], again)), axis=1)
        counts = np.cumsum(one, axis=1)
        named = away if away is not None else np.zeros(len(kinds), dtype=bool)
        freed = np.maximum(vectors["saved"] - vectors["entry"], 0.0)
        copies = freed * host if host else np.full(len(freed), np.inf)
        waits = sum(np.maximum(copies - vectors[step], 0.0) for step in ("forward", "backward"))
        leaves = waits < vectors["forward"]
        leaves[kinds[again & ~named]] = False
        leaves[kinds[named]] = True
        relief, peak = np.where(leaves, waits, vectors["forward"]), np.where(leaves, 2.0 * freed, vectors["saved"])
        total = Totals.of(vectors, relief, counts[:, -1], fixed[:, -1])
        return Row(counts, fixed, kinds, **vectors, relief=relief, leaves=leaves, peak=peak, total=total)

    @property
    def all(self) -> Array:
        """How many units there are of each kind."""
        total: Array = self.counts[:, -1]
        return total


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Of columns of unit counts: seconds and bytes, and relieved units of each kind; infinite where none fits."""

    forward: Array
    backward: Array
    late: Array
    memory: Array
    again: Array

    @property
    def busy(self) -> Array:
        total: Array = self.forward + self.backward
        return total


class Loads:
    """What every stage of a layout takes on its devices."""

    def __init__(
        self,
        pools: tuple[Pool, ...],
        batch: int,
        assume: Assumptions,
        *,
        optimizer: str,
        headroom: float,
        train: bool = True,
        microbatches: int = 0,
    ) -> None:
        self.pools, self.batch, self.assume, self.train = pools, batch, assume, train
        self.state = StateBytes.of(assume, optimizer, train=train)
        self.headroom, self.fixed = headroom, microbatches
        self.forget()

    def forget(self) -> None:
        """What was looked up for these pools."""
        self._gathers: dict[tuple[Group, int], tuple[Array, Array]] = {}
        self._least: dict[tuple[Group, int], float] = {}

    def limit(self, pool: Pool) -> float:
        return self.headroom * pool.device.memory_bytes - self.assume.reserve_bytes

    def microbatches(self, degrees: Degrees) -> int:
        """Of the whole batch; each stage's replicas share them."""
        return self.fixed or max(1, ceil(self.batch / degrees.samples))

    def gathers(self, group: Group, row: Row) -> tuple[Array, Array]:
        """ZeRO level 3: seconds of each unit's gather, and of its gather and scatter in backward."""
        key = (group, id(row))
        if key not in self._gathers:
            self._gathers[key] = self._gathers_of(group, row)
        return self._gathers[key]

    def _gathers_of(self, group: Group, row: Row) -> tuple[Array, Array]:
        pool = self.pools[group.pool]
        made = [Gathers.of(pool, group, float(w), self.state) for w in row.weights]
        gather, scatter = np.array([g.gather for g in made]), np.array([g.scatter for g in made])
        return gather, gather + scatter

    def gathering(self, degrees: Degrees, group: Group) -> bool:
        return degrees.zero >= 3 and group.replicas > 1

    def least(self, degrees: Degrees, group: Group, row: Row) -> float:
        """Least seconds of a microbatch in all units, were they in one stage of the group."""
        total = row.total
        everything = degrees.recompute == "all"
        if self.gathering(degrees, group):
            key = (group, id(row))
            if key not in self._least:
                again = row.relief if everything else 0.0
                self._least[key] = float(self._beside(group, row, row.forward, row.backward + again) @ row.all)
            return self._least[key]
        if not self.train:
            return total.forward
        return total.forward + total.backward + (float(row.relief @ row.all) if everything else total.fixed)

    def _beside(self, group: Group, row: Row, forward: Array, backward: Array) -> Array:
        """Seconds of each unit with its gathers beside it: the next unit's weights come while this one runs."""
        there, back = self.gathers(group, row)
        lost = self.assume.contention
        total = np.array([together(f, g, lost) for f, g in zip(forward, there, strict=True)])
        if self.train:
            total = total + np.array([together(b, g, lost) for b, g in zip(backward, back, strict=True)])
        return total

    def busy(self, degrees: Degrees, row: Row) -> Array:
        """Seconds of each unit in one microbatch, nothing recomputed that need not be."""
        if not self.train:
            return row.forward
        again = row.relief if degrees.recompute == "all" else 0.0
        result: Array = row.forward + again + row.backward
        return result

    def load(self, degrees: Degrees, stage: int, row: Row, counts: Array, fixed: Array, flight: float) -> Load:
        """``flight``: microbatches held at the peak, each with all of the units' activations. ``fixed``: of the counts,
        units that are relieved in any case.
        """
        group = degrees.groups[degrees.group_of(stage)]
        forward, backward = row.forward @ counts, row.backward @ counts
        late = row.late @ counts if self.train else np.zeros_like(forward)
        if not self.train:
            backward = np.zeros_like(forward)
        need, again = self._memory(degrees, group, row, counts, fixed, flight)
        if self.train:
            backward = backward + row.relief @ again
        fits = need <= self.limit(self.pools[group.pool])
        if degrees.schedule == "zero_bubble":  # what is made again would have to stay until the weights' turn
            fits &= again.sum(axis=0) == 0
        if self.gathering(degrees, group):
            backward = self._gathered(group, row, counts, again) - forward
        return Load(forward, np.where(fits, backward, np.inf), late, need, again)

    def _gathered(self, group: Group, row: Row, counts: Array, again: Array) -> Array:
        """Forward and backward with the gathers beside each unit; the first gather and the last scatter stand alone."""
        there, back = self.gathers(group, row)
        lost = self.assume.contention

        def beside(work: Array, collective: Array) -> Array:
            return np.maximum(work, collective) + lost * np.minimum(work, collective)

        total = beside(row.forward, there) @ counts + np.max(np.where(counts > 0, there[:, None], 0.0), axis=0)
        if self.train:
            plain, twice = beside(row.backward, back), beside(row.backward + row.relief, back)
            total = total + plain @ (counts - again) + twice @ again
            total = total + np.max(np.where(counts > 0, (back - there)[:, None], 0.0), axis=0)
        result: Array = total
        return result

    def _memory(
        self, degrees: Degrees, group: Group, row: Row, counts: Array, fixed: Array, flight: float
    ) -> tuple[Array, Array]:
        """(bytes, relieved units a kind): as few as fits."""
        state, r, z = self.state, group.replicas, degrees.zero
        held = (state.weight / (r if z >= 3 else 1)) * (row.weights @ counts)
        share = state.gradient / (r if z >= 2 else 1) + state.optimizer / (r if z >= 1 else 1)
        held = held + share * (row.trained @ counts)
        there = counts > 0
        working = np.max(np.where(there, row.working[:, None], 0.0), axis=0)
        if z >= 3:
            working = working + 2 * state.weight * np.max(np.where(there, row.weights[:, None], 0.0), axis=0)
        buffers = 4.0 * np.max(np.where(there, row.sent[:, None], 0.0), axis=0)
        need = held + working + buffers
        again = np.zeros_like(counts)
        if not self.train:
            return need, again
        saved, entry = row.saved, row.entry
        largest = np.max(np.where(there, row.peak[:, None], 0.0), axis=0)
        plain = need + flight * (saved @ counts)
        gains = flight * np.maximum(saved - entry, 0.0)
        again = counts.copy() if degrees.recompute == "all" else fixed.copy()
        if degrees.recompute != "all":
            short = plain - gains @ again - self.limit(self.pools[group.pool])
            some = again.sum(axis=0) > 0
            deficit = np.where(short + np.where(some, largest, 0.0) > 0, short + largest, 0.0)
            for kind in np.argsort(-gains / np.maximum(row.relief, 1e-30), kind="stable"):
                if gains[kind] <= 0:
                    continue
                take = np.minimum(counts[kind] - again[kind], np.ceil(np.maximum(deficit, 0.0) / gains[kind]))
                again[kind] += take
                deficit = deficit - take * gains[kind]
        return plain - gains @ again + np.where(again.sum(axis=0) > 0, largest, 0.0), again

    def breakdown(
        self, degrees: Degrees, stage: int, row: Row, spans: Sequence[tuple[int, int]], again: Sequence[int]
    ) -> tuple[tuple[str, float], ...]:
        """(what, bytes) on one device of a stage, in sum what ``load`` counts, with the reserve."""
        group, state, z = degrees.groups[degrees.group_of(stage)], self.state, degrees.zero
        counts = np.sum([row.counts[:, b] - row.counts[:, a] for a, b in spans], axis=0)
        twice = np.array(again, dtype=float)
        weights, trained = float(row.weights @ counts), float(row.trained @ counts)
        r, there = group.replicas, counts > 0
        working = float(np.max(row.working[there])) + (float(np.max(row.peak[there])) if twice.any() else 0.0)
        if z >= 3:
            working += 2.0 * state.weight * float(np.max(row.weights[there]))
        flight = float(self.flights(degrees, self.microbatches(degrees))[stage]) if self.train else 0.0
        kept = float(row.saved @ counts - np.maximum(row.saved - row.entry, 0.0) @ twice)
        return (
            ("weights", state.weight * weights / (r if z >= 3 else 1)),
            ("gradients", state.gradient * trained / (r if z >= 2 else 1)),
            ("optimizer", state.optimizer * trained / (r if z >= 1 else 1)),
            (f"activations of {flight:.3g} microbatch{'es' * (flight != 1)}", flight * kept),
            ("working", working),
            ("messages", 4.0 * float(np.max(row.sent[there]))),
            ("driver and libraries", self.assume.reserve_bytes),
        )

    def flights(self, degrees: Degrees, m: int) -> Array:
        """Of each stage, microbatches held at the peak by one of its devices, in whole loads of the device."""
        p, v = degrees.stages, degrees.chunks
        replicas = np.array([g.replicas for g in degrees.groups for _ in range(g.stages)])
        mine: Array = np.ceil(m / replicas)
        if v > 1:
            dealt: Array = np.minimum(mine * v, 2 * (p - np.arange(p) - 1) + (v - 1) * p + 1) / v
            return dealt
        if degrees.schedule == "gpipe":
            return mine
        after = np.cumsum(replicas[::-1])[::-1]
        reach = np.full(p, replicas.sum()) if degrees.schedule == "zero_bubble" else after
        held: Array = np.maximum(1.0, np.minimum(mine, np.ceil(reach / replicas - 1e-9)))
        return held
