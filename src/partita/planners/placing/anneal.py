"""Anneal: a better placement by random moves of units, pairs and neighbourhoods (Kirkpatrick et al., 1983).

The energy is the sum of a high power of the devices' loads, which ranks placements nearly as the maximum does and also
tells a move that helps from one that does not while the busiest device stays as it is. A move changes the loads of two
devices only: a net that a third one touches is cut before and after.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.planners.labelling.kernel import COMPILED, kernel
from partita.planners.placing.problem import Placement, loads
from partita.planners.problem import Array

Ints = NDArray[np.int64]

HOT, COLD = 0.3, 1e-5
CHECK = 20_000 if COMPILED else 200
LARGEST = 24
WIDE = 64


def anneal(
    problem: Placement, start: Sequence[int], *, seconds: float, seed: int = 0, hot: float = HOT
) -> tuple[int, ...]:
    """The best placement met in about so many seconds from ``start``, which must fit; never worse than it.

    ``hot``: the first temperature; a low one stays near ``start``.
    """
    state = _State.of(problem, start)
    began = time.perf_counter()
    best = np.array([state.load.max(initial=0.0)])
    found = state.device.copy()
    if len(state.load) < 2 or not len(found) or best[0] <= 0.0:
        return tuple(start)
    draws, scratch = np.array([seed % 1_000_003 + 1]), np.zeros((2, len(found)), dtype=np.int64)
    heat = hot
    while True:
        _moves(
            CHECK, heat, float(best[0]), draws, best, found, scratch, state.device, state.load, state.held,
            state.touched, state.seconds, state.transfer, state.nbytes, state.room, state.cost, state.pins,
            state.nets_at, state.nets_of, state.near_at, state.near_of,
        )  # fmt: skip
        passed = (time.perf_counter() - began) / seconds if seconds > 0 else 1.0
        if passed >= 1.0 or best[0] <= 0.0:  # no load is less than none
            return tuple(int(device) for device in found)
        heat = hot * (COLD / hot) ** passed


@dataclass(slots=True, eq=False)
class _State:
    """A placement and its loads, changed unit by unit; lists of lists as (where each begins, all of them)."""

    device: Ints
    load: Array
    held: Array
    touched: Ints
    seconds: Array
    transfer: Array
    nbytes: Array
    room: Array
    cost: Array
    pins: Ints
    nets_at: Ints
    nets_of: Ints
    near_at: Ints
    near_of: Ints

    @classmethod
    def of(cls, problem: Placement, start: Sequence[int]) -> _State:
        kinds, nets = problem.device_kinds, problem.nets
        nets_of: list[list[int]] = [[] for _ in range(problem.num_units)]
        near: list[dict[int, None]] = [{} for _ in range(problem.num_units)]
        touched = np.zeros((len(nets), len(kinds)), dtype=np.int64)
        for i, net in enumerate(nets):
            for unit in net.units:
                nets_of[unit].append(i)
                touched[i, start[unit]] += 1
                if len(net.units) <= WIDE:
                    near[unit].update((other, None) for other in net.units if other != unit)
        held = np.zeros(len(kinds))
        np.add.at(held, np.asarray(start, dtype=np.int64), problem.nbytes)
        return cls(
            np.array(start, dtype=np.int64), loads(problem, start), held, touched,
            np.array([kind.seconds for kind in kinds]), np.array([kind.transfer for kind in kinds]),
            np.asarray(problem.nbytes, dtype=np.float64),
            np.array([kind.memory_bytes * (1 + 1e-12) for kind in kinds]),
            np.array([net.seconds for net in nets], dtype=np.float64),
            np.array([len(net.units) for net in nets], dtype=np.int64),
            *_flat(nets_of), *_flat([list(others) for others in near]),
        )  # fmt: skip


def _flat(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    begins = np.cumsum([0, *(len(one) for one in lists)], dtype=np.int64)
    return begins, np.array([item for one in lists for item in one], dtype=np.int64)


@kernel
def _draw(draws: Ints, below: int) -> int:
    """A number from 0, by the generator of Park and Miller (1988)."""
    draws[0] = draws[0] * 48271 % 2147483647
    return int(draws[0] * below // 2147483647)


@kernel
def _move(
    unit: int, there: int, device: Ints, load: Array, held: Array, touched: Ints, seconds: Array, transfer: Array,
    nbytes: Array, cost: Array, pins: Ints, nets_at: Ints, nets_of: Ints,
) -> None:  # fmt: skip
    here = device[unit]
    less, more = seconds[here, unit], seconds[there, unit]
    for at in range(nets_at[unit], nets_at[unit + 1]):
        net = nets_of[at]
        if touched[net, here] < pins[net]:
            less += transfer[here] * cost[net]
        if touched[net, here] > 1:
            less -= transfer[here] * cost[net]
        if touched[net, there] + 1 < pins[net]:
            more += transfer[there] * cost[net]
        if touched[net, there] > 0:
            more -= transfer[there] * cost[net]
        touched[net, here] -= 1
        touched[net, there] += 1
    load[here] -= less
    load[there] += more
    held[here] -= nbytes[unit]
    held[there] += nbytes[unit]
    device[unit] = there


@kernel
def _moves(
    count: int, heat: float, scale: float, draws: Ints, best: Array, found: Ints, scratch: Ints, device: Ints,
    load: Array, held: Array, touched: Ints, seconds: Array, transfer: Array, nbytes: Array, room: Array, cost: Array,
    pins: Ints, nets_at: Ints, nets_of: Ints, near_at: Ints, near_of: Ints,
) -> None:  # fmt: skip
    """``count`` moves at one temperature: a unit, two units changing places, or neighbours of one device together."""
    units, devices = len(device), len(load)
    picked, seen = scratch[0], scratch[1]
    for _ in range(count):
        unit = _draw(draws, units)
        here, begin = device[unit], near_at[unit]
        near = near_at[unit + 1] - begin
        beside = near > 0 and _draw(draws, 10) < 6
        there = device[near_of[begin + _draw(draws, near)]] if beside else _draw(draws, devices)
        if here == there:
            continue
        chance = _draw(draws, 100)
        picked[0], size, other = unit, 1, -1
        if 70 <= chance < 85:
            other = _draw(draws, units)
            there = device[other]
            if here == there:
                continue
        elif chance >= 85:
            want, done = 1 + _draw(draws, LARGEST), 0
            seen[unit] = 1
            while done < size < want:
                at = picked[done]
                done += 1
                for k in range(near_at[at], near_at[at + 1]):
                    one = near_of[k]
                    if size < want and not seen[one] and device[one] == here:
                        seen[one] = 1
                        picked[size] = one
                        size += 1
                if done < size:  # go on from any of those that wait
                    swap = done + _draw(draws, size - done)
                    picked[done], picked[swap] = picked[swap], picked[done]
            for k in range(size):
                seen[picked[k]] = 0
        gained = -nbytes[other] if other >= 0 else 0.0
        able = other < 0 or seconds[here, other] < np.inf
        for k in range(size):
            gained += nbytes[picked[k]]
            able = able and seconds[there, picked[k]] < np.inf
        if not able or held[there] + gained > room[there] or held[here] - gained > room[here]:
            continue
        before = (load[here] / scale) ** 8 + (load[there] / scale) ** 8
        for k in range(size):
            _move(
                picked[k], there, device, load, held, touched, seconds, transfer, nbytes, cost, pins, nets_at, nets_of
            )
        if other >= 0:
            _move(other, here, device, load, held, touched, seconds, transfer, nbytes, cost, pins, nets_at, nets_of)
        after = (load[here] / scale) ** 8 + (load[there] / scale) ** 8
        if after <= before or _draw(draws, 1 << 30) < (1 << 30) * np.exp((before - after) / heat):
            highest = load.max()
            if highest < best[0] * (1 - 1e-9):
                best[0] = highest
                found[:] = device
            continue
        if other >= 0:
            _move(other, there, device, load, held, touched, seconds, transfer, nbytes, cost, pins, nets_at, nets_of)
        for k in range(size):
            _move(picked[k], here, device, load, held, touched, seconds, transfer, nbytes, cost, pins, nets_at, nets_of)
