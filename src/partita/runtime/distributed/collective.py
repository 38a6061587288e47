"""Sums, shards and gatherings over some of the ranks, started now and waited for later; uneven shards as they come.

scatter   rank r gives all of x and gets its shard of the sum: every rank sends each shard to whose it is, (n-1)/n x
gather    rank r gives its shard and gets all of x                                                       (n-1)/n x
sum       every rank gets all of the sum                                                                2(n-1)/n x
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from partita.runtime.distributed.arena import Arena
from partita.runtime.distributed.messages import DTYPES, Sent
from partita.runtime.distributed.world import Group, World
from partita.torch_compat import all_gather_single

HEAD = 16  # numbers that say what follows: dtype, dims, sizes


@dataclass(frozen=True, slots=True)
class Flight:
    """Something under way. ``land()`` waits and gives the result; ``push()`` begins its second half where the first is
    over, and says whether there is nothing left to begin."""

    land: Callable[[], torch.Tensor]
    push: Callable[[], bool] = lambda: True


class Members:
    """Some ranks, and this one among them. ``order``: their positions as the process group has them, ascending."""

    def __init__(self, world: World, ranks: Sequence[int], sent: Sent, purpose: str) -> None:
        self.world, self.ranks, self.sent = world, tuple(ranks), sent
        self.group: Group = world.group(ranks, purpose)
        self.arena = Arena.make(world, self.ranks, self.group, sent)
        self.position = self.ranks.index(world.rank)
        self.order = sorted(range(len(self.ranks)), key=self.ranks.__getitem__)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sum(self, flat: torch.Tensor, what: str) -> Flight:
        """In place."""
        arena = self.fitting(2 * flat.numel() * flat.element_size())
        if arena is not None:
            return Flight(*arena.sum(flat, self.words(what)))
        self._count(2 * flat.numel() * flat.element_size() * (self.size - 1) // self.size)
        return self._flight([dist.all_reduce(flat, group=self.group, async_op=True)], what, lambda: flat)

    def scatter(self, flat: torch.Tensor, splits: Sequence[int], what: str) -> Flight:
        """``flat``: all shards in order of rank, ``splits[r]`` elements each; gives this rank's of the sum."""
        own = splits[self.position]
        arena = self.fitting(flat.numel() * flat.element_size())
        if arena is not None:
            return Flight(arena.scatter(flat, splits, self.words(what)))
        self._count((flat.numel() - own) * flat.element_size())
        arrived = flat.new_empty(own * self.size).split([own] * self.size)  # type: ignore[no-untyped-call]
        works = self._each(flat.split(list(splits)), arrived)  # type: ignore[no-untyped-call]

        def summed() -> torch.Tensor:
            total: torch.Tensor = arrived[0] + arrived[1]
            for part in arrived[2:]:
                total += part
            return total

        return self._flight(works, what, summed)

    def gather(self, out: torch.Tensor, own: torch.Tensor, splits: Sequence[int], what: str) -> Flight:
        """``out``: room for all shards in order of rank."""
        arena = self.fitting(max(splits) * own.element_size())
        if arena is not None:
            return Flight(arena.gather(out, own, splits, self.words(what)))
        self._count((self.size - 1) * own.numel() * own.element_size())
        if out.is_cuda and len(set(splits)) == 1 and self.order == list(range(self.size)):
            works = [all_gather_single(out, own, group=self.group, async_op=True)]
        else:
            works = self._each([own] * self.size, out.split(list(splits)))  # type: ignore[no-untyped-call]
        return self._flight(works, what, lambda: out)

    def exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], largest: int, what: str
    ) -> list[torch.Tensor]:
        """What every rank gave for this one, of ``shapes``; ``parts[r]`` goes to rank r. ``largest``: elements of any
        part of any rank."""
        arena = self.fitting(largest * self.size * parts[0].element_size())
        if arena is not None:
            return arena.exchange(parts, shapes, largest, self.words(what))
        self._count(sum(p.numel() * p.element_size() for r, p in enumerate(parts) if r != self.position))
        takes = [parts[0].new_empty(tuple(s)) for s in shapes]
        self._wait(self._each([p.contiguous() for p in parts], takes), what)
        return takes

    def _each(self, gives: Sequence[torch.Tensor], takes: Sequence[torch.Tensor]) -> list[Any]:
        """Work: every two ranks exchange directly. Contiguous tensors.

        Gloo's own alltoall sends before it says what it is ready to take, and does not begin to send before it hears
        that: of two ranks that come one after the other, the first sends only when it has taken all of the second's.
        """
        if gives[0].is_cuda:
            into, out = ([tensors[r].reshape(-1) for r in self.order] for tensors in (takes, gives))
            return [dist.all_to_all(into, out, group=self.group, async_op=True)]
        if takes[self.position].data_ptr() != gives[self.position].data_ptr():
            takes[self.position].copy_(gives[self.position])
        others = [r for r in range(self.size) if r != self.position]
        works = [dist.irecv(takes[r], self.ranks[r], group=self.group) for r in others if takes[r].numel()]
        return works + [dist.isend(gives[r], self.ranks[r], group=self.group) for r in others if gives[r].numel()]

    def fitting(self, nbytes: int) -> Arena | None:
        """The shared memory, where an op that needs so much of it may go through there."""
        return self.arena if self.arena is not None and self.arena.fits(nbytes) else None

    def words(self, what: str) -> str:
        return f"{what} over ranks {', '.join(map(str, self.ranks))}"

    def _count(self, nbytes: int) -> None:
        self.sent.payload += nbytes

    def _flight(self, works: Sequence[Any], what: str, result: Callable[[], torch.Tensor]) -> Flight:
        def land() -> torch.Tensor:
            self._wait(works, what)
            return result()

        return Flight(land)

    def _wait(self, works: Sequence[Any], what: str) -> None:
        with self.world.watch.waiting(self.words(what)):
            for work in works:
                work.wait()


class RankGroup:
    """``runtime.collectives.Group`` over these ranks: what a divided op's members do together."""

    def __init__(self, members: Members) -> None:
        self._members, self.rank, self.size, self.op = members, members.position, members.size, ""

    def all_reduce(self, tensor: torch.Tensor, how: str = "sum") -> torch.Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if how == "sum":
            return self._members.sum(total.view(-1), "a sum").land().view(total.shape)
        op = dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM
        with self._members.world.watch.waiting(self._members.words("a sum")):
            dist.all_reduce(total, op, group=self._members.group)
        return total

    def all_gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        own = tensor.detach().contiguous()
        splits = [n * _rest(own, dim) for n in sizes]
        out = own.new_empty(sum(splits))
        self._members.gather(out, own.view(-1), splits, "the parts of a divided op").land()
        shape = own.shape
        return [part.view(*shape[:dim], n, *shape[dim + 1 :]) for part, n in zip(out.split(splits), sizes, strict=True)]  # type: ignore[no-untyped-call]

    def reduce_scatter(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        parts = tensor.detach().split(list(sizes), dim)  # type: ignore[no-untyped-call]
        flat = torch.cat([p.reshape(-1) for p in parts])
        own = parts[self.rank].shape
        flight = self._members.scatter(flat, [p.numel() for p in parts], "the sum of a divided op")
        return flight.land().view(own)

    def all_to_all(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], largest: int = 0
    ) -> list[torch.Tensor]:
        return self._members.exchange([p.detach() for p in parts], shapes, largest, "parts")

    def broadcast(self, tensor: torch.Tensor | None, source: int = 0) -> torch.Tensor:
        owner = self._members.ranks[source]
        own = tensor if self.rank == source else None
        return spread(self._members.world, own, owner, "a member's tensor", self._members.group)


def _rest(tensor: torch.Tensor, dim: int) -> int:
    shape = tensor.shape
    return torch.Size((*shape[:dim], *shape[dim + 1 :])).numel()


def spread(world: World, value: torch.Tensor | None, owner: int, what: str, group: Group | None = None) -> torch.Tensor:
    """A tensor of one rank on every rank (of the group), whatever its shape."""
    head = torch.zeros(HEAD, dtype=torch.int64)
    if value is not None:
        shape = tuple(value.shape)
        head[: 2 + len(shape)] = torch.tensor([DTYPES.index(value.dtype), len(shape), *shape])
    with world.watch.waiting(what):
        dist.broadcast(head, src=owner, group=group or world.control)
        code, dims, *sizes = head.tolist()
        if value is None:
            value = torch.empty(sizes[:dims], dtype=DTYPES[code], device=world.device)
        value = value.contiguous()
        if value.numel():
            dist.broadcast(value.reshape(-1).view(torch.uint8), src=owner, group=group or world.whole)
    return value


PACK_BYTES = 1 << 20


def spread_all(
    world: World, mine: Mapping[str, torch.Tensor], owners: Mapping[str, int], shapes: Mapping[str, torch.Size],
    kinds: Mapping[str, torch.dtype], what: str,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Tensors of which each rank has some (``mine``: at least those it owns) on every rank, in the order of ``owners``;
    small ones of one rank and dtype that follow each other in one message."""
    packs: list[list[str]] = []
    filled = 0
    for name, owner in owners.items():
        size = shapes[name].numel() * kinds[name].itemsize
        before = packs[-1][-1] if packs else ""
        if before and (owners[before], kinds[before]) == (owner, kinds[name]) and filled + size <= PACK_BYTES:
            packs[-1].append(name)
            filled += size
        else:
            packs.append([name])
            filled = size
    found = {}
    for pack in packs:
        owner, counts = owners[pack[0]], [shapes[name].numel() for name in pack]
        if owner == world.rank:
            flat = torch.cat([mine[name].detach().reshape(-1) for name in pack])
        else:
            flat = torch.empty(sum(counts), dtype=kinds[pack[0]], device=world.device)
        if flat.numel():
            with world.watch.waiting(f"{what} of {pack[0]}"):
                dist.broadcast(flat.view(torch.uint8), src=owner, group=world.whole)
        for name, part in zip(pack, flat.split(counts), strict=True):  # type: ignore[no-untyped-call]
            found[name] = mine[name] if owner == world.rank else part.view(shapes[name])
    return found
