"""Ranks: the processes that save or load together, as far as a checkpoint needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from partita.errors import CheckpointError
from partita.runtime.front import LazyParallel

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process is ``rank`` of ``size``; every rank makes the same calls in the same order.

    ``group``: the process group they speak through, None: the default one. ``waiting(what)``: is open while this rank
    waits for the others, so that a run in which one of them ends or hangs comes to an end; ``working(what)``: within
    that, while it does its own part, of which it calls ``moved()`` every few seconds at the latest.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    waiting: Callable[[str], AbstractContextManager[Any]] = nullcontext
    working: Callable[[str], AbstractContextManager[Any]] = nullcontext
    moved: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those that hold a divided model; else those of the default process group, or this process alone."""
        world = getattr(model.parallel if isinstance(model, LazyParallel) else model, "world", None)
        if world is not None:
            watch = world.watch
            return cls(world.rank, world.size, world.control, watch.waiting, watch.working, watch.moved)
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def wire(self) -> torch.device:
        """Where a tensor must be for the group to send it."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waiting("what the others say of the checkpoint"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first_says(self, value: Callable[[], T]) -> T:
        """What ``value`` returns on rank 0, on every rank. Its error is raised on all."""
        said: list[T] = []
        failure: Exception | None = None
        if self.first:
            try:
                with self.working("its part of a checkpoint"):
                    said = [value()]
            except Exception as error:
                failure = error
        said, failure = self.gather((said, failure))[0]
        if failure is not None:
            raise failure
        return said[0]

    def agree(self, message: str, problems: Sequence[str]) -> None:
        """Raise CheckpointError with every rank's problems on every rank; nothing where no rank has any."""
        found = tuple(dict.fromkeys(problem for mine in self.gather(list(problems)) for problem in mine))
        if found:
            raise CheckpointError(message, found)


ALONE = Ranks()
