"""Collectives: what the members of a group do together, behind one seam, and their form between threads.

    all_reduce       every member gives x, every member gets the sum (or the maximum)
    all_gather       every member gives a part, every member gets all parts, in order of rank
    reduce_scatter   every member gives x, member r gets part r of the sum
    all_to_all       every member gives a part for each, and gets one from each
    broadcast        every member gets what one of them gives

All members call the same collectives in the same order. What comes back is new memory; what was given is left as it
was. Every member gets the same bits: a replicated value is equal on all of them, whatever rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from partita.runtime.sync_norm import Gathering
from partita.runtime.waits import Deadlock, Waits, differ


class Group(Protocol):
    """One member's side of a group. ``rank``: its number in the group, from 0; ``size``: how many there are. ``op``:
    for whose sake the member is about to meet the others, in words."""

    op: str

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor, how: str = "sum") -> torch.Tensor:
        """The sum (``how='max'``: the element-wise maximum) of everybody's tensor, which have one shape."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Everybody's tensor. They agree in all but ``dim``, along which member r's has ``sizes[r]``."""
        ...

    def reduce_scatter(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """Of the sum of everybody's tensor, the rows of ``dim`` that are this member's: ``sizes[r]`` for member r."""
        ...

    def all_to_all(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], largest: int = 0
    ) -> list[torch.Tensor]:
        """``parts[r]`` goes to member r; what member r gave for this one comes back, of ``shapes[r]``. ``largest``:
        elements of the largest part that any member gives to any, where all know it."""
        ...

    def broadcast(self, tensor: torch.Tensor | None, source: int = 0) -> torch.Tensor:
        """The tensor of member ``source``; the others may give None: shape and dtype travel with it."""
        ...


class LocalGroup:
    """A group of worker threads of one process, which read each other's memory. Sums are made in order of rank.

    ``begin`` gives the members of a run their meeting: a run that is stopped ends every wait with ``Stopped``, and
    members that meet for different things, or for what cannot come, are told so (``Deadlock``).
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.op = rank, size, ""
        self._count = 0
        self._meeting: Gathering

    @staticmethod
    def make(size: int, waits: Waits) -> tuple[LocalGroup, ...]:
        """The members of a new group, in order of rank."""
        members = tuple(LocalGroup(rank, size) for rank in range(size))
        LocalGroup.begin(members, waits)
        return members

    @staticmethod
    def begin(members: Sequence[LocalGroup], waits: Waits) -> None:
        """From now on these meet in this run: what autograd holds of a forward meets in the backward's."""
        meeting = Gathering(len(members), waits)
        for member in members:
            member._meeting, member._count = meeting, 0

    def _meet(self, kind: str, value: Any) -> list[Any]:
        self._count += 1
        mine = kind, self.op
        met = self._meeting.gather(self._count, self.rank, (mine, value), f"{kind} of {self.op}")
        if any(theirs != mine for theirs, _ in met):
            lines = [f"member {rank}: {theirs} of {op}" for rank, ((theirs, op), _) in enumerate(met)]
            raise Deadlock(differ("the members of a group meet for different things", lines))
        return [value for _, value in met]

    def all_reduce(self, tensor: torch.Tensor, how: str = "sum") -> torch.Tensor:
        """Member r adds up slice r of everybody's, so that the sum is made once."""
        given = [t.to(tensor.device) for t in self._meet("all_reduce", tensor.detach())]
        with torch.no_grad():
            flat = [t.reshape(-1) for t in given]
            count = flat[0].numel()
            start, end = self.rank * count // self.size, (self.rank + 1) * count // self.size
            parts = self._meet("all_reduce", _combined([t[start:end] for t in flat], how))
            return torch.cat([p.to(tensor.device) for p in parts]).view(tensor.shape)

    def all_gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        given = self._meet("all_gather", tensor.detach())
        with torch.no_grad():
            found = [t.to(tensor.device, copy=True) for t in given]
        self._meet("all_gather", None)  # whoever changes what he gave must wait until all have read it
        return found

    def reduce_scatter(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        given = self._meet("reduce_scatter", tensor.detach())
        with torch.no_grad():
            start, length = sum(sizes[: self.rank]), sizes[self.rank]
            found = _combined([t.narrow(dim, start, length).to(tensor.device) for t in given], "sum")
        self._meet("reduce_scatter", None)
        return found

    def all_to_all(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], largest: int = 0
    ) -> list[torch.Tensor]:
        given = self._meet("all_to_all", [part.detach() for part in parts])
        with torch.no_grad():
            found = [theirs[self.rank].to(parts[self.rank].device, copy=True) for theirs in given]
        self._meet("all_to_all", None)
        return found

    def broadcast(self, tensor: torch.Tensor | None, source: int = 0) -> torch.Tensor:
        given: torch.Tensor = self._meet("broadcast", tensor)[source]
        with torch.no_grad():
            found = given if tensor is not None and self.rank == source else given.detach().clone()
        self._meet("broadcast", None)
        return found


def _combined(parts: list[torch.Tensor], how: str) -> torch.Tensor:
    """The sum or maximum, in order, as new memory."""
    if how == "sum":
        total = parts[0].add(parts[1]) if len(parts) > 1 else parts[0].clone()
        for part in parts[2:]:
            total.add_(part)
        return total
    total = parts[0].clone()
    for part in parts[1:]:
        torch.maximum(total, part, out=total)
    return total
