"""Covering: a bound on the load from sets that single devices can run, by column generation.

If a placement has a load of at most T, its devices' sets cover every unit once, and each has a load of at most T. So
where prices of the units can be found at which all devices together are worth less than all units, each device being
worth its best set of load at most T, no placement has that load: the bound of Gilmore and Gomory (1961) for cutting
stock, here with cut nets in the sets' loads. Devices of a kind are one line of it, so their symmetry is gone. Prices
come from a linear program over the sets met so far, drawn towards the best ones known (Wentges, 1997).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partita.planners.placing.frontier import frontier
from partita.planners.placing.master import Column, Master, Shares
from partita.planners.placing.problem import Placement, fits
from partita.planners.placing.subsets import Curve, Flags, Subsets
from partita.planners.problem import Array

TIGHTER = 1 - 1e-10
CLOSE = 1e-4
NEAR = 0.85
FEW, MOST = 256, 16384  # buckets


def set_load(problem: Placement, kind: int, units: Flags) -> float:
    """Seconds that a device of the kind is busy with these units."""
    one = problem.kinds[kind]
    seconds = float(one.seconds[units].sum())
    if one.transfer > 0:
        for net in problem.nets:
            inside = sum(bool(units[u]) for u in net.units)
            seconds += one.transfer * net.seconds * (0 < inside < len(net.units))
    return seconds


@dataclass(slots=True, eq=False)
class _Packing:
    """Sets for devices of a kind, priced one after another without what those before took; ``work``: what they run."""

    kind: int
    sets: list[Flags]
    work: float


class Covering:
    """Of a problem whose placements of a load below ``best`` are looked for.

    ``bound``: what none is below; ``reached``: the least load at which parts of sets cover all, so that more of this
    proves no higher bound. ``done``: there is no more to prove.
    """

    def __init__(self, problem: Placement, best: float, bound: float) -> None:
        self.problem, self.best, self.bound, self.reached, self.done = problem, best, bound, best, False
        self.kinds = [k for k, kind in enumerate(problem.kinds) if kind.count]
        line, loose = frontier(problem), frontier(replace(problem, nets=()))
        self.whole = line.whole
        self.subsets = {
            k: Subsets.of(line if kind.transfer > 0 else loose, kind.seconds, kind.transfer)
            for k, kind in enumerate(problem.kinds)
            if kind.count
        }
        self.work = np.min([problem.kinds[k].seconds for k in self.kinds], axis=0)
        total, n = float(self.work.sum()), problem.num_units
        self.centre: Array = self.work / total if 0 < total < np.inf else np.full(n, 1.0 / n)
        self.pool: dict[tuple[int, bytes], Column] = {}
        self.packing: _Packing | None = None

    # -- sets ------------------------------------------------------------------------------------------------------

    def offer(self, devices: Sequence[int], met: Iterable[Column] = ()) -> None:
        """The sets of a placement, and others."""
        for column in met:
            self._keep(column)
        place = np.asarray(devices)
        kind_of = [k for k, kind in enumerate(self.problem.kinds) for _ in range(kind.count)]
        for device, kind in enumerate(kind_of):
            units = place == device
            if units.any():
                self._keep(Column(kind, set_load(self.problem, kind, units), units))

    def sets(self, groups: Sequence[int]) -> list[Column]:
        """All sets met, of the units that the groups hold."""
        return [replace(column, units=column.units[list(groups)]) for column in self.pool.values()]

    def _keep(self, column: Column) -> None:
        self.pool[column.kind, column.units.tobytes()] = column

    def packed(self) -> tuple[int, ...] | None:
        """A placement from the best sets that were priced one after another, what they leave where it fits; once."""
        packing, self.packing = self.packing, None
        if packing is None:
            return None
        kinds, nbytes = self.problem.device_kinds, self.problem.nbytes
        devices = np.full(self.problem.num_units, -1)
        first = sum(kind.count for kind in self.problem.kinds[: packing.kind])
        for i, units in enumerate(packing.sets):
            devices[units] = first + i
        busy = np.array([kind.seconds[devices == d].sum() for d, kind in enumerate(kinds)])
        room = np.array([kind.memory_bytes - nbytes[devices == d].sum() for d, kind in enumerate(kinds)])
        for unit in np.argsort(-self.work, kind="stable").tolist():
            if devices[unit] < 0:
                after = busy + np.array([kind.seconds[unit] for kind in kinds])
                after[room < nbytes[unit]] = np.inf
                device = int(after.argmin())
                devices[unit], busy[device] = device, after[device]
                room[device] -= nbytes[unit]
        found = tuple(int(d) for d in devices)
        return found if fits(self.problem, found) else None

    # -- bounds ----------------------------------------------------------------------------------------------------

    def run(self, end: float) -> None:
        """Until there is no more to prove, or the moment ``end`` of ``time.perf_counter``."""
        cap = self.best * TIGHTER
        if self.reached < self.best:
            cap = 0.5 * (self.bound + self.reached)
        while not self.done and time.perf_counter() < end:
            short = self._short(cap, end)
            if short is None:
                self.done = time.perf_counter() < end
                return
            if short:
                self.bound = max(self.bound, cap)
                if cap >= self.best * TIGHTER:
                    self.bound = self.best
            else:
                self.reached = min(self.reached, cap)
            self.done = self.reached - self.bound <= CLOSE * self.best
            cap = 0.5 * (self.bound + self.reached)

    def _short(self, cap: float, end: float) -> bool | None:
        """Whether the devices do not suffice within the cap; False: parts of sets cover all; None: neither is known."""
        master = Master(self.problem, self.kinds, self.pool.values(), cap)
        buckets = FEW
        best = self._ratio(self.centre, cap, buckets)
        if best > 1 + 1e-9:
            return True
        self._price(master, self.centre, cap, buckets, None)
        self.centre = self.centre * (best / self.centre.sum())
        while time.perf_counter() < end:
            now = master.solve()
            if now.missed < 1e-9 and now.share <= 1 + 1e-9:
                return False
            for near in (NEAR, 0.0):
                prices = near * self.centre + (1 - near) * now.prices
                ratio = self._ratio(prices, cap, buckets)
                if ratio > 1 + 1e-9:
                    return True
                new = self._price(master, prices, cap, buckets, now)
                if ratio > best:
                    best, self.centre = ratio, prices * (ratio / prices.sum())
                if new:
                    break
            else:
                if ratio < now.share * (1 - 1e-6) and buckets < MOST:
                    buckets *= 4
                    best = self._ratio(self.centre, cap, buckets)
                elif now.missed > 1e-9:
                    master.bar()
                else:
                    return None
        return None

    def _ratio(self, prices: Array, cap: float, buckets: int) -> float:
        """What all units are worth, to what all devices are: above 1 they do not suffice. Raises the bound where these
        prices show that they do not for a larger load.
        """
        curves = {k: subsets.curve(prices, cap, buckets) for k, subsets in self.subsets.items()}
        total, worth = float(prices.sum()), self._worth(curves, cap)
        low, high = self.bound, cap
        if low < high and self._worth(curves, low * (1 + 1e-6)) < total * (1 - 1e-9):
            for _ in range(40):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if self._worth(curves, middle) < total * (1 - 1e-9) else (low, middle)
            self.bound = low
        return total / worth if worth > 0 else np.inf if total > 0 else 0.0

    def _worth(self, curves: dict[int, Curve], load: float) -> float:
        return sum(self.problem.kinds[k].count * curve.at(load) for k, curve in curves.items())

    def _price(self, master: Master, prices: Array, cap: float, buckets: int, now: Shares | None) -> int:
        """Adds good sets for the devices one after another; how many of them the master would use."""
        new = 0
        for i, (k, subsets) in enumerate(self.subsets.items()):
            packing = _Packing(k, [], 0.0)
            out = np.zeros(self.problem.num_units, dtype=np.bool_)
            for _ in range(self.problem.kinds[k].count):
                found = subsets.best(prices, cap, max(buckets // 4, FEW // 4) if packing.sets else buckets, out)
                if found is None:
                    break
                load = found.load if self.whole else set_load(self.problem, k, found.units)
                if load <= cap:
                    column = Column(k, load, found.units)
                    self._keep(column)
                    if master.add(column) and now is not None:
                        new += float(now.prices[found.units].sum()) > now.worth[i] + 1e-8
                packing.sets.append(found.units)
                packing.work += float(self.work[found.units].sum())
                out |= found.units
            better = self.packing is None or packing.work > self.packing.work
            if better and packing.sets and self.problem.kinds[k].transfer > 0:
                self.packing = packing
        return new
