"""Away: saved activations that wait in host memory: which go, and what their copies cost beside the computing.

    device     F range 0 | F range 1 | F range 2 | ...          B range 2 | B range 1 | B range 0
    host link            | out 0     | out 1     | out 2 ...    | in 1    | in 0    |

A range's copies run beside the next range, and the device waits at that one's end until they are out; in backward the
range before is fetched while one is undone. So at most two ranges' bytes are on their way (the buffers), and what a
copy takes longer than the computing beside it is waited for. The last range is still there where its backward is next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.cluster import Device
from partita.cost.affine import Affine
from partita.cost.kept import kept_by_maker, tensor_bytes
from partita.cost.memory import shares_memory
from partita.cost.ops import saved_tensors
from partita.graph import Graph, Op

Array = NDArray[np.float64]
SMALL = 64 * 1024
"""Bytes below which a tensor stays: launching its copy would take longer than the copy."""
SLOWEST = 16e9
"""Bytes per second of an accelerator whose host link nobody described: PCIe 3.0 x16 (``cluster_presets.FABRICS``)."""

Ranges = Sequence[tuple[int, int]]
Going = Sequence[tuple[str, int]]
"""(tensor, position of the op after which its memory goes)."""
Lent = Sequence[tuple[int, Sequence[str]]]
"""(position at which a range begins, parameters that live on the host and are copied for it)."""


def leaving(
    graph: Graph, index: Sequence[int], ranges: Ranges, recompute: Ranges, outputs: Sequence[str],
    given: Mapping[str, object], samples: int,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    """What of a segment's ops (``index``) goes to the host: memory that they make, that ops in ``ranges`` save and no
    other does, and that has at least ``SMALL`` bytes; not what leaves the segment (``outputs``), is ``given`` to it or
    enters what is run again. It goes after the last op that saves it.
    """
    position = {int(op): at for at, op in enumerate(index)}
    inside = {at for start, stop in ranges for at in range(start, stop)}
    stay = {_base(graph, name) for name in outputs}
    for start, stop in recompute:
        stay.update(_base(graph, n) for at in range(start, stop) for n in graph.ops[index[at]].uses())
    kept = graph.known("kept_by_maker")
    if "" not in kept:
        kept[""] = kept_by_maker(graph, given)
    found = []
    for i in index:
        for k in kept[""][i]:
            savers = [position.get(s, -1) for s in k.savers]
            if not k.base or k.base in stay or not inside.issuperset(savers) or k.size.at(samples) < SMALL:
                continue
            last = max(savers)
            name = next(n for n in saved_tensors(graph, graph.ops[index[last]]) if _base(graph, n) == k.base)
            found.append((name, last))
    return tuple(sorted(found, key=lambda pair: pair[1]))


def _base(graph: Graph, name: str) -> str:
    return graph.tensor(name).base or name


def ways(
    graph: Graph, ranges: Ranges, going: Going, end: int, *, there: bool = True, lent: Lent = ()
) -> dict[str, int]:
    """Base that goes -> the position at which it has left in forward and is back in backward: where the next range
    ends. What the last range saved stays to the segment's ``end`` in forward, and is ``there`` in a backward that comes
    next; in another it is back where its range ends.
    """
    used = _used(ranges, going, lent)
    found = {}
    for name, at in going:
        mine = next(r for r, (start, stop) in enumerate(used) if start <= at < stop)
        last = mine + 1 == len(used)
        found[_base(graph, name)] = (end if there else used[mine][1]) if last else used[mine + 1][1]
    return found


def _used(ranges: Ranges, going: Going, lent: Lent) -> list[tuple[int, int]]:
    """Ranges of which something goes, or is lent."""
    first = {start for start, _ in lent}
    return [(a, b) for a, b in ranges if a in first or any(a <= at < b for _, at in going)]


def copies_alive(
    graph: Graph, ranges: Ranges, going: Going, lent: Lent, ops: Sequence[Op], *, there: bool = True
) -> tuple[Array, Array]:
    """Bytes (positions, 2), while each op is done and undone, of parameters' copies: from the beginning of the range
    before, for which others are lent, until the next range ends; and of gradients on their way home."""
    used, n = _used(ranges, going, lent), len(ops)
    done, undone = np.zeros((n + 1, 2)), np.zeros((n + 1, 2))
    begins = [start for start, _ in lent]
    for number, (start, names) in enumerate(lent):
        size = float(sum(graph.tensor(name).nbytes(1) for name in names))
        mine = next(r for r, (a, _) in enumerate(used) if a == start)
        last = mine + 1 == len(used)
        stop = n if last else used[mine + 1][1]
        done[begins[number - 1] if number else start, 0] += size
        done[stop, 0] -= size
        undone[start, 0] += size
        undone[used[mine][1] if last and not there else stop, 0] -= size
        for at in range(start, used[mine][1]):
            home = sum(graph.tensor(u).nbytes(1) for u in ops[at].uses() if u in names and graph.tensor(u).needs_grad)
            undone[at, 0] += home
            undone[at + 1, 0] -= home
    return np.cumsum(done[:-1], axis=0), np.cumsum(undone[:-1], axis=0)


@dataclass(frozen=True, slots=True)
class Trip:
    """One range's bytes and ``copies``, the computing between the ends of the range before and its own in forward
    (``ahead``) and backward (``behind``). ``lent``: bytes of parameters that come for it, ``home``: of their gradients.
    """

    nbytes: Affine
    copies: int
    ahead: Affine
    behind: Affine
    lent: float = 0.0
    home: float = 0.0


@dataclass(frozen=True, slots=True)
class Trips:
    """The ranges of a segment in forward's order, and how fast its device's copies are: ``seconds_per_byte``, and
    ``launch`` for each. ``beside``: they run beside the computing; else the device's own cores do them.
    """

    ranges: tuple[Trip, ...] = ()
    seconds_per_byte: float = 0.0
    launch: float = 0.0
    beside: bool = True

    @property
    def nbytes(self) -> Affine:
        """All that goes."""
        return sum((trip.nbytes for trip in self.ranges), Affine())

    @property
    def last(self) -> Affine:
        """On the device, of the last range."""
        return self.ranges[-1].nbytes + Affine(self.ranges[-1].lent) if self.ranges else Affine()

    def _each(self, samples: int) -> list[float]:
        return [t.nbytes.at(samples) * self.seconds_per_byte + t.copies * self.launch for t in self.ranges]

    @property
    def _lent(self) -> list[float]:
        return [t.lent * self.seconds_per_byte for t in self.ranges]

    def forward(self, samples: int, busy: float = 0.0) -> tuple[float, float]:
        """Seconds of waiting in a forward, and for how long the link is busy after its last range. ``busy``: before."""
        each, lent = self._each(samples), self._lent
        if not self.beside:
            return sum(each) + sum(lent), 0.0
        clock = work = 0.0
        out, link = busy, busy + (lent[0] if lent else 0.0)
        here = link if lent and lent[0] else 0.0
        for at, (trip, copy) in enumerate(zip(self.ranges, each, strict=True)):
            clock, following = max(clock, here), lent[at + 1] if at + 1 < len(lent) else 0.0
            if following:
                here = link = max(link, clock) + following
            clock, work = max(clock + trip.ahead.at(samples), out), work + trip.ahead.at(samples)
            out = link = max(link, clock) + copy
        return clock - work, max(link - clock, 0.0)

    def backward(self, samples: int, busy: float = 0.0, *, there: bool = False) -> float:
        """Seconds of waiting in a backward. ``there``: the last range has not gone yet."""
        each = [a + b for a, b in zip(self._each(samples), self._lent, strict=True)]
        home = sum(t.home for t in self.ranges) * self.seconds_per_byte
        if not self.beside:
            return sum(each[:-1] if there else each) + home
        clock = work = 0.0
        link = busy
        if not there and each:
            link = clock = link + each[-1]
        ready = clock
        for at in range(len(each) - 1, -1, -1):
            clock = max(clock, ready)
            if at:
                ready = link = max(link, clock) + each[at - 1]
            behind = self.ranges[at].behind.at(samples)
            clock, work = clock + behind, work + behind
        return clock - work + home


def rates(device: Device) -> tuple[float, float, bool]:
    """(seconds per byte, of each copy, whether beside computing) of a device's copies to and from its host."""
    if has_host(device):
        return 1.0 / (device.host_bandwidth or SLOWEST), device.overhead_seconds, True
    return 2.0 / device.memory_bandwidth, device.overhead_seconds, False


def has_host(device: Device) -> bool:
    """Whether the host's memory is another than the device's: of CPU cores it is not, unless somebody says so."""
    return device.host_bandwidth > 0 or not shares_memory(device.name)


def trips(
    graph: Graph, ranges: Ranges, going: Going, forward: Sequence[Affine], backward: Sequence[Affine], device: Device,
    lent: Lent = (),
) -> Trips:  # fmt: skip
    """Of a segment whose ops take ``forward`` and ``backward`` seconds, by position."""
    used, names_at = _used(ranges, going, lent), dict(lent)
    found = []
    done = 0
    for number, (start, stop) in enumerate(used):
        mine = [tensor_bytes(graph, _base(graph, n)) for n, at in going if start <= at < stop]
        end = stop if number < len(used) - 1 else len(forward)
        parameters = [graph.tensor(name) for name in names_at.get(start, ())]
        found.append(
            Trip(
                sum(mine, Affine()), len(mine), sum(forward[done:stop], Affine()), sum(backward[done:end], Affine()),
                float(sum(p.nbytes(1) for p in parameters)),
                float(sum(p.nbytes(1) for p in parameters if p.needs_grad)),
            )
        )  # fmt: skip
        done = stop
    return Trips(tuple(found), *rates(device))
