"""Placement: which device runs which unit of a graph so that the busiest device is busy for the least time.

The max-load objective of Tarnawski et al., *Efficient Algorithms for Device Placement of DNN Graph Operators*
(NeurIPS 2020), section 3: a device's load is the seconds of its units plus the seconds of every value that it sends or
receives, each value once. A value is therefore a net of a hypergraph, and a device pays for the nets that it cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from partita.planners.problem import Array

Shape = Literal["chain", "convex", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """``count`` devices that are alike. ``seconds`` (units): time of each unit, infinite where it cannot run.

    ``transfer``: multiplies the seconds of every cut net; 0 where the values lie already (a CPU beside its memory).
    """

    name: str
    count: int
    seconds: Array
    memory_bytes: float = float("inf")
    transfer: float = 1.0


@dataclass(frozen=True, slots=True)
class Net:
    """A value: the units that make or take it, and the seconds to move it to or from a device."""

    units: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """``nbytes`` (units): memory of each unit. ``order``: (earlier, later) pairs, what contiguity is about.

    Devices are numbered through the kinds in their order.
    """

    kinds: tuple[Kind, ...]
    nbytes: Array
    nets: tuple[Net, ...]
    order: tuple[tuple[int, int], ...]

    @property
    def num_units(self) -> int:
        return len(self.nbytes)

    @property
    def device_kinds(self) -> tuple[Kind, ...]:
        """The kind of each device."""
        return tuple(kind for kind in self.kinds for _ in range(kind.count))


@dataclass(frozen=True, slots=True)
class Placed:
    """``devices``: of each unit. ``seconds``: load of the busiest device; no placement of the searched space has a
    load below ``bound``.
    """

    devices: tuple[int, ...]
    seconds: float
    bound: float

    @property
    def gap(self) -> float:
        """How much faster the best possible may be, as a ratio of the answer; 0 where it is proven best."""
        return max(0.0, 1.0 - self.bound / self.seconds) if self.seconds > 0 else 0.0

    @property
    def proven(self) -> bool:
        return self.gap <= 1e-9


def loads(problem: Placement, devices: Sequence[int]) -> Array:
    """Seconds each device is busy."""
    kinds = problem.device_kinds
    result = np.zeros(len(kinds))
    for unit, device in enumerate(devices):
        result[device] += kinds[device].seconds[unit]
    for net in problem.nets:
        touched = {devices[unit] for unit in net.units}
        if len(touched) > 1:
            for device in touched:
                result[device] += kinds[device].transfer * net.seconds
    return result


def peaks(problem: Placement, devices: Sequence[int]) -> Array:
    """Bytes each device holds."""
    result = np.zeros(len(problem.device_kinds))
    np.add.at(result, np.asarray(devices, dtype=np.intp), problem.nbytes)
    return result


def fits(problem: Placement, devices: Sequence[int]) -> bool:
    """Whether every unit can run where it is and every device's memory holds its units."""
    limits = np.array([kind.memory_bytes for kind in problem.device_kinds])
    slack = 1e-12 * np.where(np.isfinite(limits), limits, 0.0)
    return bool(np.isfinite(loads(problem, devices)).all() and (peaks(problem, devices) <= limits + slack).all())


def shape(problem: Placement, devices: Sequence[int]) -> Shape:
    """``chain``: the devices can be put in an order that every pair of ``order`` follows. ``convex``: no path leaves a
    device and comes back. A chain is convex, and not the other way round.
    """
    crossing = {(devices[a], devices[b]) for a, b in problem.order if devices[a] != devices[b]}
    if len(set(components(len(problem.device_kinds), crossing))) == len(problem.device_kinds):
        return "chain"
    after: list[list[int]] = [[] for _ in range(problem.num_units)]
    for a, b in problem.order:
        after[a].append(b)
    for device in set(devices):
        mine = [unit for unit in range(problem.num_units) if devices[unit] == device]
        stack = [b for a in mine for b in after[a] if devices[b] != device]
        seen = set(stack)
        while stack:
            for b in after[stack.pop()]:
                if devices[b] == device:
                    return "none"
                if b not in seen:
                    seen.add(b)
                    stack.append(b)
    return "convex"


def contract(problem: Placement, groups: Sequence[int]) -> Placement:
    """The problem with the units of each group (numbered from 0) joined to one."""
    index = np.asarray(groups, dtype=np.intp)
    count = int(index.max()) + 1 if len(index) else 0

    def sums(values: Array) -> Array:
        result = np.zeros(count)
        np.add.at(result, index, values)
        return result

    merged: dict[tuple[int, ...], float] = {}
    for net in problem.nets:
        units = tuple(sorted({int(index[unit]) for unit in net.units}))
        if len(units) > 1 and net.seconds > 0:
            merged[units] = merged.get(units, 0.0) + net.seconds
    order = dict.fromkeys((int(index[a]), int(index[b])) for a, b in problem.order if index[a] != index[b])
    kinds = tuple(Kind(k.name, k.count, sums(k.seconds), k.memory_bytes, k.transfer) for k in problem.kinds)
    return Placement(kinds, sums(problem.nbytes), tuple(Net(u, s) for u, s in merged.items()), tuple(order))


def components(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The strongly connected component of each node, numbered in an order that the pairs follow (Tarjan, 1972)."""
    after: list[list[int]] = [[] for _ in range(count)]
    for a, b in pairs:
        after[a].append(b)
    entered, low = [-1] * count, [0] * count
    found, stack, clock = [-1] * count, list[int](), 0
    number = 0
    for root in range(count):
        if entered[root] >= 0:
            continue
        path = [(root, 0)]
        while path:
            node, at = path.pop()
            if at == 0:
                entered[node] = low[node] = clock
                clock += 1
                stack.append(node)
            for i in range(at, len(after[node])):
                other = after[node][i]
                if entered[other] < 0:
                    path += [(node, i + 1), (other, 0)]
                    break
                if found[other] < 0:
                    low[node] = min(low[node], entered[other])
            else:
                if low[node] == entered[node]:
                    while found[node] < 0:
                        found[stack.pop()] = number
                    number += 1
                if path:
                    parent = path[-1][0]
                    low[parent] = min(low[parent], low[node])
    return tuple(number - 1 - f for f in found)
