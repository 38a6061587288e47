"""Weight gradients of replicas, made once: every weight has one owner, who multiplies for all replicas.

    replica a   B: ... (x, dy) of w2 ─ owner a: waits for b's ─ dw2 = dy_a' x_a + dy_b' x_b ...
    replica b   B: ... (x, dy) of w2 ─▶ a      (x, dy) of w1 ─ owner b ...

Replicas that each make their own gradient write it twice and read both again to add them. Here a weight's gradient is
written by the products alone, and exists once. Pairs are joined in the order of the microbatches, so the result does
not depend on who was faster; nobody waits before the end of his backward.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from partita.graph import Graph, Ref
from partita.program import Program
from partita.runtime.transport import Stopped
from partita.runtime.weight_grad import WEIGHT_ARGUMENT

Make = Callable[[list[tuple[torch.Tensor, torch.Tensor]]], None]


@dataclass(frozen=True, slots=True)
class Owners:
    """``owner``: weight -> device that makes its gradient. ``uses``: products a microbatch owes it. ``replicas``: the
    devices in the order of their microbatches.
    """

    owner: Mapping[str, str]
    uses: Mapping[str, int]
    replicas: tuple[str, ...]


def owners(graph: Graph, program: Program) -> Owners | None:
    """Who owns what, where the program is one stage whose every replica runs one microbatch; else None."""
    split = [i for i, s in enumerate(program.segments) if s.phase == "split"]
    if len(split) != 1 or len(program.sizes) < 2 or not program.train:
        return None
    places = program.placement[split[0]]
    if len(set(places)) != len(program.sizes):
        return None
    inside = set(program.segments[split[0]].ops)
    uses: dict[str, int] = {}
    for op in graph.ops:
        position = WEIGHT_ARGUMENT.get(op.target)
        argument = op.args[position] if position is not None and op.name in inside else None
        if isinstance(argument, Ref) and graph.tensor(argument.name).role == "parameter":
            uses[argument.name] = uses.get(argument.name, 0) + 1
    load = dict.fromkeys(places, 0)
    owner: dict[str, str] = {}
    for name in sorted(uses, key=lambda n: -graph.tensor(n).nbytes(1)):
        owner[name] = min(load, key=lambda d: load[d])
        load[owner[name]] += graph.tensor(name).nbytes(1) * uses[name]
    return Owners(owner, uses, places)


@dataclass(frozen=True, slots=True)
class _Owed:
    replica: int
    number: int
    kind: str
    make: Make
    x: torch.Tensor
    grad: torch.Tensor


class Meeting:
    """One step's exchange of pairs between the replicas."""

    def __init__(self, owners: Owners, stopped: Callable[[], bool]) -> None:
        self.owners = owners
        self._stopped = stopped
        self._owed: dict[str, list[_Owed]] = {}
        self._ready: dict[str, deque[str]] = {d: deque() for d in owners.replicas}
        self._ended: set[str] = set()
        self._changed = threading.Condition()

    def put(self, name: str, owed: _Owed) -> None:
        with self._changed:
            waiting = self._owed.setdefault(name, [])
            waiting.append(owed)
            if len(waiting) == self.owners.uses[name] * len(self.owners.replicas):
                self._ready[self.owners.owner[name]].append(name)
                self._changed.notify_all()

    def make_ready(self, device: str) -> None:
        """Make the gradients this device owns of which every pair is there."""
        ready = self._ready[device]
        while ready:
            with self._changed:
                name = ready.popleft()
                owed = self._owed.pop(name)
            self._make(device, owed)

    def _make(self, device: str, owed: list[_Owed]) -> None:
        owed.sort(key=lambda o: (o.replica, o.number))
        own = self.owners.replicas.index(device)
        for kind in dict.fromkeys(o.kind for o in owed):
            same = [o for o in owed if o.kind == kind]
            make = next((o.make for o in same if o.replica == own), same[0].make)
            with torch.no_grad():
                make([(o.x, o.grad) for o in same])

    def end(self, device: str) -> None:
        """This device's backward is over: help until everybody's is, then make what was never completed."""
        with self._changed:
            self._ended.add(device)
            self._changed.notify_all()
        while True:
            self.make_ready(device)
            with self._changed:
                if self._ready[device]:
                    continue
                if len(self._ended) == len(self.owners.replicas):
                    break
                if self._stopped():
                    raise Stopped
                self._changed.wait(0.2)
        with self._changed:
            left = [self._owed.pop(n) for n in list(self._owed) if self.owners.owner[n] == device]
        for owed in left:
            self._make(device, owed)


class Shared:
    """One device's side of a Meeting."""

    def __init__(self, meeting: Meeting, device: str) -> None:
        self.meeting, self.device = meeting, device
        self._replica = meeting.owners.replicas.index(device)
        self._number = 0

    def takes(self, name: str) -> bool:
        return name in self.meeting.owners.owner

    def add(self, name: str, kind: str, make: Make, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Owe this pair to the weight's owner, and make whatever of one's own is complete."""
        self._number += 1
        self.meeting.put(name, _Owed(self._replica, self._number, kind, make, x, grad))
        self.meeting.make_ready(self.device)

    def end(self) -> None:
        self.meeting.end(self.device)
