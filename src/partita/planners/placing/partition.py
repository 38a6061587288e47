"""Partition: the contiguous placement with the least maximum load, by dynamic programming over chains of ideals.

The recurrence is that of Tarnawski et al. (NeurIPS 2020), section 4: a placement whose devices can be put in an order
is a chain of downsets of the graph, and the busiest device of the best chain up to J is the least over I inside J of
max(best up to I, load of J without I). What makes it fast here is a cap on the load: an ideal is looked at only if the
work before it and behind it, with what its cut costs, fits the devices on that side; and loads are taken for blocks of
pairs at once, as load(I, J) = work(J) - work(I) + cut(I) + cut(J) - twice what crosses both.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from partita.planners.ideals import downsets, topological_orders
from partita.planners.placing.capacity import Capacity
from partita.planners.placing.leaves import hosts
from partita.planners.placing.problem import Placed, Placement, components, contract, fits, loads
from partita.planners.problem import Array, Infeasible

Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]
Used = tuple[int, ...]

MAX_IDEALS = 200_000
BLOCK = 128
TIGHTER = 1.0 - 1e-10
CAPS = (1.01, 1.05, 1.2, 1.5, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class _Limits:
    """``end``: the moment to stop at, by ``time.perf_counter``."""

    ideals: int
    end: float


def partition(problem: Placement, *, limit: int = MAX_IDEALS, seconds: float = 300.0) -> Placed | Infeasible:
    """The best placement whose devices follow ``order``; its gap is 0 unless the graph has over ``limit`` ideals or the
    search took over so many seconds (each is then a good placement with a bound).

    Units on a cycle of ``order`` share a device. Infeasible: no such placement fits (proven), or none was found within
    the limits (the reason says which).
    """
    if not problem.num_units:
        return Placed((), 0.0, 0.0)
    if not problem.device_kinds:
        return Infeasible("there are no devices")
    cycles = components(problem.num_units, problem.order)
    joined = contract(problem, cycles)
    found, bound = _with_leaves(joined, _Limits(limit, time.perf_counter() + seconds))
    if found is None and bound < np.inf:
        return Infeasible("no contiguous placement was found; the graph has too many ideals to try them all in time")
    if found is None:
        return Infeasible("no contiguous placement fits the devices' memory")
    devices = tuple(found[group] for group in cycles)
    seconds = _seconds(problem, devices)
    return Placed(devices, seconds, min(bound, seconds))


def _with_leaves(problem: Placement, limits: _Limits) -> tuple[tuple[int, ...] | None, float]:
    """(devices, bound): leaves where their hosts are, unless memory has another opinion."""
    host = hosts(problem)
    number = {unit: i for i, unit in enumerate(dict.fromkeys(host))}
    groups = tuple(number[h] for h in host)

    def small(nbytes: Array) -> tuple[tuple[int, ...] | None, float]:
        found, bound = _search(contract(replace(problem, nbytes=nbytes), groups), limits)
        return None if found is None else tuple(found[group] for group in groups), bound

    leaf = np.array([h != unit for unit, h in enumerate(host)], dtype=np.bool_)
    found, bound = small(np.where(leaf, 0.0, problem.nbytes))
    if found is None or fits(problem, found):
        return found, bound
    found, _ = small(problem.nbytes)
    if found is not None and _seconds(problem, found) * TIGHTER <= bound:
        return found, bound
    better, exact = _search(problem, limits)
    if better is not None and (found is None or _seconds(problem, better) < _seconds(problem, found)):
        found = better
    return found, max(bound, exact)


def _search(problem: Placement, limits: _Limits) -> tuple[tuple[int, ...] | None, float]:
    """(devices, load that no contiguous placement is below: infinite where there is none)."""
    capacity = Capacity(problem)
    least = capacity.least()
    few = _Chains(problem, capacity, _prefixes(problem))
    caps = (*(least * cap for cap in CAPS), np.inf)
    found = next((chain for cap in caps if (chain := few.best(cap)) is not None), None)
    masks = downsets(_before(problem), limits.ideals, limits.end)
    if masks is None:
        return found, least
    cap = _seconds(problem, found) * TIGHTER if found is not None else np.inf
    try:
        better = _Chains(problem, capacity, masks).best(cap, limits.end)
    except TimeoutError:
        return found, least
    winner = found if better is None else better
    return winner, np.inf if winner is None else _seconds(problem, winner)


def _seconds(problem: Placement, devices: Sequence[int]) -> float:
    return float(loads(problem, devices).max())


def _before(problem: Placement) -> list[int]:
    before = [0] * problem.num_units
    for a, b in problem.order:
        before[b] |= 1 << a
    return before


def _prefixes(problem: Placement) -> list[int]:
    """The prefixes of several topological orders."""
    masks = {0: None}
    for order in topological_orders(problem.num_units, problem.order):
        mask = 0
        for unit in order:
            mask |= 1 << unit
            masks[mask] = None
    return list(masks)


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Of each ideal. ``work``, ``unable``: per kind, seconds and number of units that cannot run there."""

    work: tuple[Array, ...]
    unable: tuple[Array, ...]
    nbytes: Array
    cut: Array


class _Chains:
    """Chains of a family of ideals, given as bit masks; it must have the empty one and the whole."""

    def __init__(self, problem: Placement, capacity: Capacity, masks: Iterable[int]) -> None:
        self.problem, self.capacity = problem, capacity
        n = problem.num_units
        width = (n + 7) // 8
        packed = np.frombuffer(b"".join(mask.to_bytes(width, "little") for mask in masks), dtype=np.uint8)
        member = np.unpackbits(packed.reshape(-1, width), axis=1, count=n, bitorder="little").astype(np.bool_)
        main = np.where(np.isfinite(problem.kinds[0].seconds), problem.kinds[0].seconds, 0.0)
        order = np.lexsort((member.sum(axis=1), member @ main))
        self.member: Bools = member[order]
        self.crossing, self.weight, cut = self._crossing()
        finite = [np.isfinite(kind.seconds) for kind in problem.kinds]
        self.sums = _Sums(
            tuple(self._total(np.where(ok, k.seconds, 0.0)) for ok, k in zip(finite, problem.kinds, strict=True)),
            tuple(self._total((~ok).astype(np.float64)) for ok in finite),
            self._total(problem.nbytes),
            cut,
        )
        self.counts: Used = tuple(kind.count for kind in problem.kinds)
        self.states = sorted(product(*(range(c + 1) for c in self.counts)), key=sum)

    def _total(self, values: Array) -> Array:
        """Sum of a value over each ideal."""
        result: Array = np.matmul(self.member, values)
        return result

    def _crossing(self) -> tuple[Bools, Array, Array]:
        """(ideals, columns) and the columns' weights: the product of two rows is what two ideals' cuts share, which
        a stage between them does not pay (twice where it touches no unit of the net); and each ideal's whole cut.
        """
        columns: list[Bools] = []
        weights: list[float] = []
        cut = np.zeros(len(self.member))
        for net in self.problem.nets:
            count = self.member[:, list(net.units)].sum(axis=1)
            crossing = (count > 0) & (count < len(net.units))
            cut += net.seconds * crossing
            columns.append(crossing)
            weights.append(net.seconds * (2.0 if len(net.units) == 2 else 1.0))
            if len(net.units) > 2:
                columns += [count == k for k in range(1, len(net.units))]
                weights += [net.seconds] * (len(net.units) - 1)
        if not columns:
            return np.zeros((len(self.member), 0), dtype=np.bool_), np.zeros(0), cut
        return np.stack(columns, axis=1), np.array(weights), cut

    # -- the dynamic programme

    def best(self, cap: float, end: float = np.inf) -> tuple[int, ...] | None:
        """Devices of the chain with the least maximum load, if it is at most ``cap``. TimeoutError: at ``end``."""
        allowed = self.capacity.windows(self.states, self.counts, cap, self.sums.work, self.sums.cut, self.sums.nbytes)
        value = np.full((len(self.states), len(self.member)), np.inf)
        value[0, 0] = 0.0
        number = {state: i for i, state in enumerate(self.states)}
        useful = np.nonzero(allowed.any(axis=0))[0]
        if not len(useful) or useful[0] != 0 or useful[-1] != len(self.member) - 1:
            return None
        reached = np.zeros(len(self.member), dtype=np.bool_)
        reached[0] = True
        reach = self.capacity.reach(cap)
        main = self.sums.work[0]
        for start in range(0, len(useful), BLOCK):
            if time.perf_counter() > end:
                raise TimeoutError
            late = useful[start : start + BLOCK]
            early = np.nonzero(reached[: late[0]] & (main[: late[0]] >= main[late[0]] - reach))[0]
            early = np.concatenate([early, late])
            pairs = self._pairs(early, late, cap)
            for i, state in enumerate(self.states):
                for kind, count in enumerate(state):
                    if count:
                        before = number[(*state[:kind], count - 1, *state[kind + 1 :])]
                        self._extend(value[before], value[i], allowed[i], early, late, pairs[kind])
            reached[late] = np.isfinite(value[:, late]).any(axis=0)
        last = int(value[:, -1].argmin())
        return self._trace(value, last, number, cap) if np.isfinite(value[last, -1]) else None

    @staticmethod
    def _extend(
        before: Array, value: Array, allowed: Bools, early: Ints, late: Ints, pairs: tuple[Ints, Ints, Array]
    ) -> None:
        """``value`` of the ideals ``late`` by one more stage."""
        to, start, seconds = pairs
        from_ = before[early]
        keep = np.isfinite(from_)[start] & allowed[late][to]
        if not keep.any():
            return
        to, total = to[keep], np.maximum(from_[start[keep]], seconds[keep])
        heads = np.nonzero(np.diff(to, prepend=-1))[0]
        target = late[to[heads]]
        value[target] = np.minimum(value[target], np.minimum.reduceat(total, heads))

    def _pairs(self, early: Ints, late: Ints, cap: float) -> list[tuple[Ints, Ints, Array]]:
        """For each kind, (position in late, position in early, seconds) of the stages that may be, by the first."""
        sums = self.sums
        flat = np.flatnonzero(self._inside(early, late))
        to, start = np.divmod(flat, len(early))
        first, last = early[start], late[to]
        crossing: Array | None = None
        result = []
        for k, kind in enumerate(self.problem.kinds):
            seconds = sums.work[k][last] - sums.work[k][first]
            if kind.transfer > 0:
                if crossing is None:
                    crossing = sums.cut[last] + sums.cut[first] - self._shared(early, late).ravel()[flat]
                seconds += kind.transfer * crossing
            ok = seconds <= cap
            if kind.memory_bytes < sums.nbytes[-1]:
                ok &= sums.nbytes[last] - sums.nbytes[first] <= kind.memory_bytes * (1 + 1e-12)
            if sums.unable[k][-1]:
                ok &= sums.unable[k][last] == sums.unable[k][first]
            result.append((to[ok], start[ok], seconds[ok]))
        return result

    def _inside(self, early: Ints, late: Ints) -> Bools:
        """Whether the early ideal lies within the late one and is not the same."""
        a, b = self.member[early], ~self.member[late]
        differs = a.any(axis=0) & b.any(axis=0)
        outside = b[:, differs].astype(np.float32) @ a[:, differs].T.astype(np.float32)
        result: Bools = (outside == 0) & (late[:, None] != early[None, :])
        return result

    def _shared(self, early: Ints, late: Ints) -> Array:
        a, b = self.crossing[early], self.crossing[late]
        both = a.any(axis=0) & b.any(axis=0)
        result: Array = (b[:, both] * self.weight[both]) @ a[:, both].T.astype(np.float64)
        return result

    def _trace(self, value: Array, state: int, number: dict[Used, int], cap: float) -> tuple[int, ...]:
        """Devices of the units along the chain that ends in ``state`` with the value there."""
        devices = np.full(self.problem.num_units, -1)
        first = np.concatenate([[0], np.cumsum(self.counts)])
        at = len(self.member) - 1
        while at:
            late = np.array([at])
            early = np.nonzero(np.isfinite(value).any(axis=0))[0]
            early = early[early < at]
            used = self.states[state]
            step: tuple[float, int, int, int] | None = None
            for kind, (to, start, seconds) in enumerate(self._pairs(early, late, cap * (1 + 1e-12))):
                if used[kind] and len(to):
                    before = number[(*used[:kind], used[kind] - 1, *used[kind + 1 :])]
                    total = np.maximum(value[before][early[start]], seconds)
                    least = int(total.argmin())
                    if step is None or total[least] < step[0]:
                        step = (float(total[least]), kind, before, int(early[start[least]]))
            assert step is not None
            _, kind, before, previous = step
            devices[self.member[at] & ~self.member[previous]] = first[kind] + used[kind] - 1
            at, state = previous, before
        return tuple(int(d) for d in devices)
