"""Weight gradients of replicas, made once: whoever is ahead in his backward multiplies for all replicas.

    replica a   B4 B3 B2 dw4=dy_a' x_a + dy_b' x_b B1 dw3 .. upper dw1    ahead: takes the products
    replica b   B4    B3         B2        B1  dw2 ...       lower dw1    behind: goes on with what others wait for

Replicas that each make their own gradient write it twice and read both again to add them, and a device that a neighbour
slows down holds up the step. Here a weight's gradient is written by the products alone and exists once, and the
products go to the device that has time. Large ones are cut into as many parts of the weight's rows as there are
replicas, so that nobody waits while another makes the last one. Pairs are joined in the order of the microbatches and
the parts are always the same, so the bits do not depend on who made them. One product is left over till somebody's
backward has ended, and gives him something to do while the others' last pairs come. What a replica has handed in stays
until it is made: nobody keeps more pairs than there is room for under the peak that its backward reaches anyway
(``cost.pairs``), so the first products are made in step, and later ones when there is time. A gradient is accounted to
the first replica, whoever makes it.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from partita.cost.pairs import LEAD
from partita.cost.surge import together
from partita.graph import Graph, Ref
from partita.program import Program
from partita.runtime.meter import counted_on
from partita.runtime.waits import Stopped, Waits
from partita.runtime.weight_grad import WEIGHT_ARGUMENT, Gradient


@dataclass(frozen=True, slots=True)
class Sharing:
    """``uses``: weight -> products a microbatch owes it. ``replicas``: the devices, in order of their microbatches.
    ``leads``: weight -> pairs that a replica may keep when it has handed in this one's."""

    uses: Mapping[str, int]
    replicas: tuple[str, ...]
    leads: Mapping[str, int]


def sharing(graph: Graph, program: Program) -> Sharing | None:
    """What replicas can make together, where the program is one stage whose every replica runs one microbatch."""
    if not program.replicas or not program.train:
        return None
    segment = next(s for s in program.segments if s.phase == "split")
    inside = {name for at, name in enumerate(segment.ops) if not segment.is_compiled(at)}
    number = {op.name: i for i, op in enumerate(graph.ops)}
    uses: dict[str, int] = {}
    for op in graph.ops:
        position = WEIGHT_ARGUMENT.get(op.target)
        argument = op.args[position] if position is not None and op.name in inside else None
        if isinstance(argument, Ref) and graph.tensor(argument.name).role == "parameter":
            uses[argument.name] = uses.get(argument.name, 0) + 1
    leads = together(graph, [number[name] for name in segment.ops], segment.recompute)
    return Sharing(uses, program.replicas, leads)


@dataclass(frozen=True, slots=True)
class _Owed:
    replica: int
    number: int
    kind: str
    gradient: Gradient
    x: torch.Tensor
    grad: torch.Tensor


Work = Callable[[int], None]  # for the replica of this number to do


class _Product:
    """One weight's gradient, in parts; made when no part is left."""

    def __init__(self, name: str, works: list[Work]) -> None:
        self.name, self.left = name, len(works)
        self.parts: deque[Work] = deque(works)


class Meeting:
    """One step's exchange of pairs between the replicas."""

    def __init__(self, sharing: Sharing, waits: Waits) -> None:
        self.sharing = sharing
        self._waits = waits
        self._owed: dict[str, list[_Owed]] = {}
        self._ready: deque[_Product] = deque()  # one entry a part
        self._finish: list[Callable[[], None]] = []
        self._done = dict.fromkeys(sharing.replicas, 0)
        self._handed = Counter[tuple[str, str]]()
        self._kept = dict.fromkeys(sharing.replicas, 0)  # pairs of weights this replica has handed in all pairs of
        self._making = 0
        self._waiting: set[str] = set()
        self._ended: set[str] = set()
        self._changed = threading.Condition()

    def put(self, device: str, name: str, owed: _Owed) -> None:
        """Note one pair; with the last of a weight its gradient can be made, by whoever is ahead."""
        complete: list[_Owed] = []
        with self._changed:
            self._done[device] += 1
            self._handed[device, name] += 1
            if self._handed[device, name] == self.sharing.uses[name]:
                self._kept[device] += self.sharing.uses[name]
            waiting = self._owed.setdefault(name, [])
            waiting.append(owed)
            if len(waiting) == self.sharing.uses[name] * len(self.sharing.replicas):
                complete = self._owed.pop(name)
                self._making += 1  # nobody may think that all wait
        if complete:
            product = _Product(name, self._works(complete))
            with self._changed:
                self._making -= 1
                self._ready.extend(product for _ in product.parts)
                self._changed.notify_all()

    def make_ready(
        self,
        device: str,
        reserve: int = 0,
        note: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        behind: bool = False,
    ) -> None:
        """Make what can be made, while this device is ahead (or has ended, or even if it is ``behind``): all but a
        ``reserve``, at the end that too. ``note``: entered around each product."""
        while True:
            with self._changed:
                ended = device in self._ended
                ahead = ended or behind or self._done[device] >= max(self._done.values())
                if len(self._ready) <= (0 if ended else reserve) or not ahead:
                    return
                product = self._ready.popleft()
                work = product.parts.popleft()
                self._making += 1
            with note():
                self._do(device, work)
            del work  # and with it, after the last part, the pairs
            with self._changed:
                self._making -= 1
                product.left -= 1
                if not product.left:
                    for replica in self._kept:
                        self._kept[replica] -= self.sharing.uses[product.name]
                self._changed.notify_all()

    def keep_near(self, device: str, name: str) -> None:
        """Wait while this device keeps more than there is room for, making what comes to be ready."""
        lead = self.sharing.leads.get(name, LEAD)
        while True:
            with self._changed:
                if self._kept[device] < lead:
                    return
                if self._waits.stopped:
                    raise Stopped
                if not self._ready:
                    self._waiting.add(device)
                    alone = len(self._waiting | self._ended) == len(self.sharing.replicas) and not self._making
                    if not alone:
                        self._changed.wait(0.2)
                    self._waiting.discard(device)
                    if alone:  # each waits for another's pair
                        return
            self.make_ready(device, behind=True)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Until ``ready()``, which is looked at where nobody changes what it sees."""
        with self._changed:
            if ready():
                return
        with self._waits.waiting(what, ready), self._changed:
            while not ready():
                if self._waits.stopped:
                    raise Stopped
                self._changed.wait(0.2)

    def _works(self, owed: list[_Owed]) -> list[Work]:
        """All of one weight's pairs: parts of one product where they are of one op and it is large, else one piece."""
        owed.sort(key=lambda o: (o.replica, o.number))
        if len({o.kind for o in owed}) == 1:
            with torch.no_grad(), counted_on(self.sharing.replicas[0]):
                cut = owed[0].gradient.cut([(o.x, o.grad) for o in owed], len(self.sharing.replicas))
            if cut is not None:
                self._finish.append(cut.finish)
                return [_for_anyone(part) for part in cut.parts]
        return [partial(_make, owed)]

    def _do(self, device: str, work: Work) -> None:
        with torch.no_grad(), counted_on(self.sharing.replicas[0]):
            work(self.sharing.replicas.index(device))

    def end(self, device: str, note: Callable[[], AbstractContextManager[None]]) -> None:
        """This device's backward is over: help until everybody's is, then make what was never completed."""
        with self._changed:
            self._ended.add(device)
            self._changed.notify_all()
        while True:
            self.make_ready(device, note=note)
            with self._changed:
                if self._ready:
                    continue
                if len(self._ended) == len(self.sharing.replicas):
                    left = list(self._owed.values()) if device == self.sharing.replicas[0] else []
                    break
            self._wait("the end of all replicas", self._go_on)
        for owed in left:
            for work in self._works(owed):
                with note():
                    self._do(device, work)

    def _go_on(self) -> bool:
        """Whether somebody whose backward is over has something to do, or nothing to wait for."""
        return bool(self._ready) or len(self._ended) == len(self.sharing.replicas)

    def finish(self) -> None:
        """When all devices have ended: what was made in parts becomes the weights' gradients."""
        for finish in self._finish:
            finish()


def _for_anyone(part: Callable[[], None]) -> Work:
    return lambda replica: part()


def _make(owed: list[_Owed], replica: int) -> None:
    """Into the replica's own leaves, which nobody else writes."""
    for kind in dict.fromkeys(o.kind for o in owed):
        same = [o for o in owed if o.kind == kind]
        gradient = next((o.gradient for o in same if o.replica == replica), same[0].gradient)
        gradient.make([(o.x, o.grad) for o in same])


class Shared:
    """One device's side of a Meeting."""

    def __init__(self, meeting: Meeting, device: str) -> None:
        self.meeting, self.device = meeting, device
        self._replica = meeting.sharing.replicas.index(device)
        self._number = 0

    def takes(self, name: str) -> bool:
        return name in self.meeting.sharing.uses

    def add(self, name: str, kind: str, gradient: Gradient, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Hand in this pair, and make what is complete if there is time."""
        self._number += 1
        self.meeting.put(self.device, name, _Owed(self._replica, self._number, kind, gradient, x, grad))
        self.meeting.make_ready(self.device, len(self.meeting.sharing.replicas))
        self.meeting.keep_near(self.device, name)

    def end(self, note: Callable[[], AbstractContextManager[None]]) -> None:
        self.meeting.end(self.device, note)
