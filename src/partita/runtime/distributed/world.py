"""World: the processes of a run started by ``torchrun``: who this one is, its device, and how it talks to the others.

Device *i* of a plan is rank *i*: ``cpu:1`` (or ``cuda:1``) is the process of rank 1, on whichever host that runs, so
that a plan made for one process fits two, and back.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from partita.errors import ClusterError, PartitaError, UsageError
from partita.runtime.distributed.watch import Watch

T = TypeVar("T")
Group = dist.ProcessGroup


def launched() -> bool:
    """Whether this process is one of several that were started together (``torchrun``, or the user's process group)."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(eq=False)
class World:
    """``control``: a Gloo group of all ranks, for objects, CPU tensors and headers. ``hosts``: each rank's host name.

    ``up`` and ``down``: groups for the tensors that a lower rank sends to a higher one, and back (on CUDA each
    direction has a communicator of its own, so that two ranks that send to each other cannot block one another).
    """

    rank: int
    size: int
    device: torch.device
    control: Group
    up: Group
    down: Group
    watch: Watch
    hosts: tuple[str, ...] = ()
    groups: dict[tuple[str, tuple[int, ...]], Group] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """This rank's device as plans call it."""
        return f"{self.device.type}:{self.rank}"

    @property
    def whole(self) -> Group:
        """All ranks, for tensors on this rank's device."""
        return self.group(range(self.size))

    @property
    def local_rank(self) -> int:
        """Position among the ranks of this host."""
        return self.hosts[: self.rank].count(self.hosts[self.rank])

    @property
    def local_size(self) -> int:
        return self.hosts.count(self.hosts[self.rank])

    def group(self, ranks: Sequence[int], purpose: str = "") -> Group:
        """The process group of these ranks, one for each purpose: what overlaps must not share an order. All ranks
        of the world must ask for the same groups in the same order."""
        key = purpose, tuple(sorted(set(ranks)))
        found = self.groups.get(key)
        if found is None:
            if not purpose and len(key[1]) == self.size and self.device.type == "cpu":
                found = self.control
            else:
                found = dist.new_group(list(key[1]), timeout=limit())
            self.groups[key] = found
        return found

    # -- objects -------------------------------------------------------------------------------------------------------

    def gather(self, value: T, what: str) -> list[T]:
        """Everybody's value, by rank."""
        found: list[Any] = [None] * self.size
        with self.watch.waiting(what):
            dist.all_gather_object(found, value, group=self.control)
        return found

    def from_first(self, value: T | None, what: str) -> T:
        """Rank 0's value."""
        found: list[Any] = [value]
        with self.watch.waiting(what):
            dist.broadcast_object_list(found, src=0, group=self.control)
        result: T = found[0]
        return result

    def together(self, what: str, make: Callable[[], T]) -> list[T]:
        """Everybody's ``make()``, by rank. Where it fails on some rank, all raise: that rank its own error, the others
        one that names it."""
        error: Exception | None = None
        made: Any = None
        try:
            made = make()
        except Exception as caught:
            error = caught
        text = f"{type(error).__name__}: {error}" if error is not None else ""
        found = self.gather((text, made), what)
        if error is not None:
            raise error
        for rank, (problem, _) in enumerate(found):
            if problem:
                raise elsewhere(UsageError(f"{what}: rank {rank} could not: {problem}"))
        return [value for _, value in found]

    def first(self, what: str, make: Callable[[], T]) -> T:
        """What rank 0 makes; its error on every rank, under the same class where that is partita's."""
        error: Exception | None = None
        made: Any = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as caught:
                error = caught
        outcome: tuple[str, str, Any] = self.from_first(
            (type(error).__name__, str(error), None) if error is not None else ("", "", made), what
        )
        if error is not None:
            raise error
        if outcome[0]:
            kinds: dict[str, type[PartitaError]] = {c.__name__: c for c in PartitaError.__subclasses__()}
            raise elsewhere(kinds.get(outcome[0], UsageError)(outcome[1]))
        result: T = outcome[2]
        return result


def limit() -> timedelta:
    """How long torch.distributed itself waits for anything; hung and ended ranks are found much earlier (``watch``)."""
    return timedelta(seconds=float(os.environ.get("PARTITA_TIMEOUT", "1800")))


def elsewhere(error: PartitaError) -> PartitaError:
    """The error, marked as one that another rank says: where nobody catches it, this rank ends without a word."""
    error.said_elsewhere = True  # type: ignore[attr-defined]
    return error


_joined: list[World] = []


def join_world() -> World:
    """This process's World, made at the first call; all ranks must make that call.

    Uses the user's process group where there is one. Raises ClusterError where the ranks do not find each other.
    """
    if _joined:
        return _joined[0]
    cuda = torch.cuda.is_available()
    own = not dist.is_initialized()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if own:
        if cuda:
            torch.cuda.set_device(local)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit())
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            raise ClusterError(
                f"the {os.environ.get('WORLD_SIZE', '?')} ranks did not find each other at {where}: {error}. Start the "
                "script with torchrun (or partita run), which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            ) from error
    rank, size = dist.get_rank(), dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=limit())
    up, down = (dist.new_group(timeout=limit()) for _ in range(2)) if cuda else (control, control)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    world = World(rank, size, device, control, up, down, Watch(rank, size, device.type))
    world.watch.start()
    if own:
        atexit.register(_close, world)
    world.group(range(size))
    world.hosts = tuple(world.gather(host_name(), "the ranks' host names"))
    _joined.append(world)
    return world


def failed(error: BaseException) -> None:
    """Tell the other ranks, where this is one of several, that it ends with this error, which somebody caught."""
    for world in _joined:
        world.watch.failed(error)


def _close(world: World) -> None:
    """The process group that was made here ends with the process, and the watch before it."""
    world.watch.leave()
    if dist.is_initialized() and world.watch.notice is None:
        dist.destroy_process_group()


def host_name() -> str:
    """The host as the operating system calls it; ``PARTITA_HOST`` where several containers share one name."""
    return os.environ.get("PARTITA_HOST") or socket.gethostname()
