"""Arena: sums, shards and gatherings among ranks of one host through memory they share, not through the network stack.

    rank 0's area   [ what it gives to 1 | its slice of the sum ]      each rank writes its own area only,
    rank 1's area   [ what it gives to 0 | its slice of the sum ]      and reads the others'

Every rank maps every other's area (an anonymous file that ends with its process; nothing is left behind).
Collectives are numbered, the same on all ranks; counters say up to which number a rank has written, and read. When
an area is full it begins anew, once all ranks have read all of it. Waiting looks at the counters, a few microseconds
busily, then asleep; where a host has more ranks than cores, the longer the less often: a core that looks is one that
those who are waited for lack.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from partita.runtime.distributed.messages import Sent
from partita.runtime.distributed.world import Group, World

T = TypeVar("T")
PAGE = 4096
BYTES = 64 << 20
SPINS = 40
NAP_SECONDS = 5e-5
CROWDED_NAP_SECONDS = 1e-3
GIVEN, SUMMED, READ = 0, 8, 16  # counters, one a cache line


class Arena:
    """One group's areas, by position. ``make`` gives None where the ranks cannot share memory."""

    def __init__(self, world: World, position: int, maps: Sequence[mmap.mmap], sent: Sent) -> None:
        self.world, self.position, self.size, self.sent = world, position, len(maps), sent
        self.counters = [memoryview(m)[:PAGE].cast("q") for m in maps]
        self.areas = [torch.frombuffer(m, dtype=torch.uint8, offset=PAGE) for m in maps]
        self.typed: dict[torch.dtype, list[torch.Tensor]] = {}
        crowded = world.local_size > (os.cpu_count() or 1)
        self.longest = CROWDED_NAP_SECONDS if crowded else NAP_SECONDS
        self.number = 0
        self.sums = 0  # how many of the ops are sums: only those are counted by SUMMED
        self.head = 0  # where the next op's place begins; the same on all ranks
        self.waiting: deque[tuple[int, Callable[[], None]]] = deque()

    @staticmethod
    def make(world: World, ranks: Sequence[int], group: Group, sent: Sent) -> Arena | None:
        """Collective among the ranks. ``sent`` counts what is read from others' areas (all read as much as they give,
        where their parts are equal)."""
        able = (
            sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64")  # stores stay in order there
            and world.device.type == "cpu" and len({world.hosts[r] for r in ranks}) == 1
            and os.environ.get("PARTITA_SHARED_MEMORY", "1") != "0"
        )  # fmt: skip
        token, mine, offer = secrets.token_bytes(16), None, None
        if able:
            with contextlib.suppress(OSError):
                handle = os.memfd_create("partita")
                os.ftruncate(handle, PAGE + BYTES)
                mine = mmap.mmap(handle, PAGE + BYTES)
                mine[PAGE // 2 : PAGE // 2 + 16] = token
                offer = (os.getpid(), handle, token)
        with world.watch.waiting("shared memory"):
            offers = [None] * len(ranks)
            dist.all_gather_object(offers, offer, group=group)  # they come in ascending order of ranks
            by_rank = dict(zip(sorted(ranks), offers, strict=True))
            maps = _opened([by_rank[r] for r in ranks], world.rank, ranks, mine)
            agreed = [None] * len(ranks)
            dist.all_gather_object(agreed, maps is not None, group=group)
        if offer is not None:
            os.close(offer[1])
        return Arena(world, list(ranks).index(world.rank), maps, sent) if maps is not None and all(agreed) else None

    def fits(self, *nbytes: int) -> bool:
        """Whether an op that needs this room may go through here; the same answer on all ranks."""
        return 0 < sum(_rounded(n) for n in nbytes) <= BYTES // 2

    # -- ops -----------------------------------------------------------------------------------------------------------

    def scatter(self, flat: torch.Tensor, splits: Sequence[int], what: str) -> Callable[[], torch.Tensor]:
        """This rank's slice of the sum of everybody's ``flat``, once landed."""
        kind = flat.dtype
        number, offset = self._place(max(flat.numel() * flat.element_size(), 1), what)
        at = [sum(splits[:r]) for r in range(self.size + 1)]
        self._view(self.position, offset, flat.numel(), flat.dtype).copy_(flat)
        self._set(GIVEN, number + 1)
        result: list[torch.Tensor] = [flat[at[self.position] : at[self.position + 1]].clone()]  # lets go of the rest

        def land() -> None:
            self._await(GIVEN, number + 1, what)
            for r in range(self.size):
                if r != self.position:
                    result[0].add_(self._taken(r, offset, at[self.position], at[self.position + 1], kind))
            self._set(READ, number + 1)

        return self._landing(number, land, lambda: result[0])

    def gather(
        self, out: torch.Tensor, own: torch.Tensor, splits: Sequence[int], what: str
    ) -> Callable[[], torch.Tensor]:
        """Everybody's slices in ``out``, once landed."""
        number, offset = self._place(max(splits) * own.element_size(), what)
        self._view(self.position, offset, own.numel(), own.dtype).copy_(own)
        self._set(GIVEN, number + 1)

        def land() -> None:
            self._await(GIVEN, number + 1, what)
            for r, target in enumerate(out.split(list(splits))):  # type: ignore[no-untyped-call]
                if r != self.position:
                    target.copy_(self._taken(r, offset, 0, splits[r], own.dtype))
                elif target.data_ptr() != own.data_ptr():
                    target.copy_(own)
            self._set(READ, number + 1)

        return self._landing(number, land, lambda: out)

    def exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], largest: int, what: str
    ) -> list[torch.Tensor]:
        """What every rank gave for this one, of ``shapes``; ``parts[r]`` goes to rank r, and has a place of ``largest``
        elements."""
        kind = parts[0].dtype
        slot = largest * kind.itemsize
        number, offset = self._place(slot * self.size, what)
        for r, part in enumerate(parts):
            if r != self.position:
                self._view(self.position, offset + r * slot, part.numel(), kind).view(part.shape).copy_(part)
        self._set(GIVEN, number + 1)
        found: list[torch.Tensor] = []

        def land() -> None:
            self._await(GIVEN, number + 1, what)
            for r, shape in enumerate(shapes):
                if r == self.position:
                    found.append(parts[r].clone(memory_format=torch.contiguous_format))
                    continue
                count = torch.Size(shape).numel()
                taken = self._taken(r, offset + self.position * slot, 0, count, kind)
                found.append(taken.view(*shape).clone())
            self._set(READ, number + 1)

        return self._landing(number, land, lambda: found)()

    def sum(self, flat: torch.Tensor, what: str) -> tuple[Callable[[], torch.Tensor], Callable[[], bool]]:
        """(landing, push) of the sum in place: first each rank's slice is summed by that rank (``push``), then read by
        all."""
        count, kind, width = flat.numel(), flat.dtype, flat.element_size()
        at = [r * count // self.size for r in range(self.size + 1)]
        slices = [flat[a:b] for a, b in zip(at, at[1:], strict=False)]
        number, offset = self._place(_rounded(count * width) + (count // self.size + 1) * width, what)
        order, self.sums = self.sums, self.sums + 1
        second = offset + _rounded(count * width)
        for r in range(self.size):
            if r != self.position:
                self._view(self.position, offset, count, kind)[at[r] : at[r + 1]].copy_(slices[r])
        self._set(GIVEN, number + 1)
        summed = [False]

        def add() -> None:
            total = slices[self.position]
            low, high = at[self.position], at[self.position + 1]
            for r in range(self.size):
                if r != self.position:
                    total.add_(self._taken(r, offset, low, high, kind))
            self._view(self.position, second, high - low, kind).copy_(total)
            self._set(SUMMED, order + 1)
            summed[0] = True

        def push() -> bool:
            mine = self.counters[self.position][SUMMED]
            if not summed[0] and mine == order and self._least(GIVEN) > number:
                with torch.no_grad():
                    add()
            return summed[0]

        def land() -> None:
            if not summed[0]:
                self._await(GIVEN, number + 1, what)
                add()
            self._await(SUMMED, order + 1, what)
            for r in range(self.size):
                if r != self.position:
                    slices[r].copy_(self._taken(r, second, 0, at[r + 1] - at[r], kind))
            self._set(READ, number + 1)

        return self._landing(number, land, lambda: flat), push

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _place(self, nbytes: int, what: str) -> tuple[int, int]:
        """Number and offset of the next op. At the area's end all that is under way is finished, by everybody."""
        if self.head + _rounded(nbytes) > BYTES:
            self._land_until(self.number - 1)
            self._await(READ, self.number, what)
            self.head = 0
        number, offset = self.number, self.head
        self.number, self.head = number + 1, offset + _rounded(nbytes)
        return number, offset

    def _landing(self, number: int, land: Callable[[], None], result: Callable[[], T]) -> Callable[[], T]:
        self.waiting.append((number, land))

        def landed() -> T:
            self._land_until(number)
            return result()

        return landed

    def _land_until(self, number: int) -> None:
        """Finish ops in their order, up to this one."""
        while self.waiting and self.waiting[0][0] <= number:
            _, land = self.waiting.popleft()
            with torch.no_grad():
                land()

    def _view(self, rank: int, offset: int, count: int, kind: torch.dtype) -> torch.Tensor:
        if kind not in self.typed:
            self.typed[kind] = [area.view(kind) for area in self.areas]
        return self.typed[kind][rank].narrow(0, offset // kind.itemsize, count)

    def _taken(self, rank: int, offset: int, first: int, last: int, kind: torch.dtype) -> torch.Tensor:
        """Elements of what another rank has put there, counted."""
        self.sent.payload += (last - first) * kind.itemsize
        return self._view(rank, offset + first * kind.itemsize, last - first, kind)

    def _set(self, counter: int, value: int) -> None:
        self.counters[self.position][counter] = value

    def _least(self, counter: int) -> int:
        return min(c[counter] for c in self.counters)

    def _await(self, counter: int, value: int, what: str) -> None:
        for _ in range(SPINS):
            if self._least(counter) >= value:
                return
        nap = NAP_SECONDS
        with self.world.watch.waiting(what, polls=True):
            while self._least(counter) < value:
                self.world.watch.check()
                time.sleep(nap)
                nap = min(1.1 * nap, self.longest)  # about a tenth of what it has waited


def _opened(
    offers: Sequence[tuple[int, int, bytes] | None], here: int, ranks: Sequence[int], mine: mmap.mmap | None
) -> list[mmap.mmap] | None:
    """Everybody's area; None where one cannot be had."""
    maps: list[mmap.mmap] = []
    for rank, offer in zip(ranks, offers, strict=True):
        if offer is None or mine is None:
            return None
        if rank == here:
            maps.append(mine)
            continue
        process, handle, token = offer
        try:
            with open(f"/proc/{process}/fd/{handle}", "r+b") as file:
                found = mmap.mmap(file.fileno(), PAGE + BYTES)
        except (OSError, ValueError):
            return None
        if found[PAGE // 2 : PAGE // 2 + 16] != token:
            return None
        maps.append(found)
    return maps


def _rounded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
