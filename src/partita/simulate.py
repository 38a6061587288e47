"""Simulate: walk a Program's instruction lists with a clock; the Trace a run would give, with memory per device.

A worker runs its list in order. SEND leaves at once and takes the link for ``latency + bytes / bandwidth``, one message
after the other; RECV waits for its message. Both take of the device what its own cores do for them. Accuracy: exact for
the given costs; devices of one host slow each other down as ``cost.beside`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from partita.cluster import Cluster
from partita.cost.away import has_host
from partita.cost.beside import paces
from partita.cost.memory import optimizer_factor, shares_memory
from partita.cost.table import SegmentCost
from partita.errors import PlanError
from partita.inbox import Message, message, sure_releases
from partita.program import Instruction, Program
from partita.trace import Event, Trace

EASED = 2
"""Simulations more where devices are faster alone: the times follow what overlaps to a fraction of a per cent."""


def simulate(
    program: Program,
    costs: Mapping[tuple[int, str], SegmentCost],
    cluster: Cluster,
    *,
    optimizer: str = "none",
    processes: bool = False,
) -> Trace:
    """The predicted Trace. ``costs``: (segment, device name) -> cost (``cost.table.segment_costs``). ``processes``: one
    for each device, so that nothing is handed over without a copy.

    Memory counts parameters, gradients and ``optimizer`` state, saved activations, what is alive only while a segment
    runs, received tensors (with the sender, where devices share a memory), and, where they share the caller's, the
    whole batch of what the caller made. Raises PlanError where devices wait for each other for ever, naming who waits
    for what.
    """
    run = _Run(program, costs, cluster, optimizer, processes)
    trace = run.go()
    for _ in range(EASED if run.eases else 0):
        run = _Run(program, costs, cluster, optimizer, processes, paces(run.spans))
        trace = run.go()
    return trace


class _Run:
    def __init__(
        self,
        program: Program,
        costs: Mapping[tuple[int, str], SegmentCost],
        cluster: Cluster,
        optimizer: str,
        processes: bool,
        pace: Mapping[tuple[str, int], float] = MappingProxyType({}),
    ) -> None:
        self.program, self.costs, self.cluster = program, costs, cluster
        self.lists = dict(program.instructions)
        self.clock = dict.fromkeys(self.lists, 0.0)
        self.arrival: dict[Message, float] = {}
        self.link_free: dict[tuple[str, str], float] = {}
        self.events: list[Event] = []
        self.begun: set[tuple[int, str]] = set()
        self.previous: dict[str, tuple[str, int]] = {}
        weights = {i.segment for _, items in program.instructions for i in items if i.kind == "W"}
        self.splits_backward = weights if len(program.sizes) > 1 else set[int]()  # one microbatch puts nothing off
        self.memory = _Memory(program, costs, optimizer, processes)
        self.memory.hosted = frozenset(d for d in self.lists if has_host(cluster.device(d)))
        self.copying: dict[str, float] = {}  # until when a device's link to its host is busy
        self.pace = pace
        self.spans: dict[tuple[str, int], tuple[float, float, float]] = {}  # of what shares a memory, for ``paces``
        self.eases = any(cost.alone < 1.0 for (_, device), cost in costs.items() if shares_memory(device))

    def go(self) -> Trace:
        position = self.position = dict.fromkeys(self.lists, 0)
        moved = True
        while moved:
            moved = False
            for device, items in self.lists.items():
                while position[device] < len(items) and self._step(device, items[position[device]]):
                    position[device] += 1
                    moved = True
        waiting = [
            f"{device} waits with {items[position[device]]}"
            + (f" for {items[position[device]].peer}" if items[position[device]].peer else "")
            for device, items in self.lists.items()
            if position[device] < len(items)
        ]
        if waiting:
            raise PlanError(
                "the program never ends: devices wait for each other; another schedule or stage order is needed",
                tuple(waiting),
            )
        self._reduce()
        events = tuple(sorted(self.events, key=lambda e: (e.start, e.device, e.end)))
        return Trace(events, tuple((d, round(self.memory.peak[d])) for d in self.lists), "simulated")

    def _step(self, device: str, item: Instruction) -> bool:
        """Runs one instruction; False where its message has not been sent yet."""
        start = self.clock[device]
        if item.kind == "SEND":
            link = (device, item.peer)
            begin = max(start, self.link_free.get(link, 0.0))
            end = begin + self.cluster.transfer_seconds(device, item.peer, item.nbytes)
            self.link_free[link] = end
            self.clock[device] = start + item.nbytes / self.cluster.link(device, item.peer).host_bandwidth
            self.arrival[message(device, item.peer, item)] = end
            self._event(device, item, begin, end)
            self.memory.sent(device, item)
            return True
        if item.kind == "RECV":
            key = message(item.peer, device, item)
            if key not in self.arrival:
                return False
            moving = item.nbytes / self.cluster.link(device, item.peer).host_bandwidth
            self.clock[device] = max(start + moving, self.arrival[key])
            self.memory.received(device, item, self.position[device])
            self._event(device, item, start, self.clock[device])
            return True
        again = self.previous.get(device) == ("W", item.segment)
        self.previous[device] = (item.kind, item.segment)
        at = (device, self.position[device])
        self.clock[device] = start + self._seconds(device, item, again) * self.pace.get(at, 1.0)
        if item.kind in ("F", "B", "W"):
            if self.eases and shares_memory(device):
                cost = self.costs.get((item.segment, device))
                self.spans[at] = (start, self.clock[device], cost.alone if cost is not None else 1.0)
            following = self.lists[device][self.position[device] + 1 :][:1]
            ends_run = not following or following[0].kind != "W"
            self.memory.ran(device, item, item.segment in self.splits_backward, ends_run)
        self._event(device, item, start, self.clock[device])
        return True

    def _event(self, device: str, item: Instruction, start: float, end: float) -> None:
        self.events.append(Event(device, str(item), item.kind, item.segment, item.microbatch, start, end, item.nbytes))

    def _seconds(self, device: str, item: Instruction, follows_weight: bool) -> float:
        if item.kind == "REDUCE":
            return self.cluster.transfer_seconds(device, item.peer or device, item.nbytes)
        cost = self.costs.get((item.segment, device))
        if cost is None:
            return 0.0
        samples = samples_of(self.program, item)
        if item.kind == "F":
            return cost.forward.at(samples) + self._waits_forward(device, cost, samples)
        if item.kind == "W" and item.segment not in self.splits_backward:
            return 0.0
        if item.kind == "W":  # a run of W steps is one product per weight: what does not grow is paid once
            return cost.weight.at(samples) - (cost.weight.fixed if follows_weight else 0.0)
        key = (item.segment, device)
        first = 0.0 if key in self.begun else cost.first.at(samples)
        self.begun.add(key)
        both = cost.backward.at(samples) + first + self._waits_backward(device, item, cost, samples)
        return both if item.segment in self.splits_backward else both + cost.weight.at(samples)

    def _waits_forward(self, device: str, cost: SegmentCost, samples: int) -> float:
        """Seconds for which what goes to the host holds up the computing."""
        if not cost.trips.ranges or not self.program.train:
            return 0.0
        start = self.clock[device]
        waits, busy = cost.trips.forward(samples, max(self.copying.get(device, 0.0) - start, 0.0))
        self.copying[device] = start + cost.forward.at(samples) + waits + busy
        return waits

    def _waits_backward(self, device: str, item: Instruction, cost: SegmentCost, samples: int) -> float:
        if not cost.trips.ranges:
            return 0.0
        busy = max(self.copying.get(device, 0.0) - self.clock[device], 0.0)
        there = self.memory.there.get(device) == (item.segment, item.microbatch)
        return cost.trips.backward(samples, busy, there=there)

    def _reduce(self) -> None:
        """Replicas' gradients are added when all have ended, each device a share (read both, write one)."""
        if not self.program.train:
            return
        users: dict[str, set[str]] = {}
        size_of: dict[str, int] = {}
        for (_, device), cost in self.costs.items():
            for name, size, trains in cost.parameters:
                if self.memory.together and name in cost.products:
                    continue
                if trains and device in self.clock:
                    users.setdefault(name, set()).add(device)
                    size_of[name] = size
        moved = sum(3.0 * (len(devices) - 1) * size_of[name] for name, devices in users.items())
        if not moved:
            return
        self.memory.reduce(max(size_of[name] for name, devices in users.items() if len(devices) > 1))
        start = max(self.clock.values())
        speed = sum(self.cluster.device(d).memory_bandwidth for d in self.clock)
        for device in self.clock:
            self.events.append(Event(device, "REDUCE", "REDUCE", -1, -1, start, start + moved / speed))


def _sent(message: Message) -> tuple[str, str, int, bool]:
    """One tensor that a device sends, to however many."""
    device, _, _, microbatch, tensor, grad = message
    return device, tensor, microbatch, grad


def samples_of(program: Program, item: Instruction) -> int:
    """Samples the instruction works on."""
    return program.sizes[item.microbatch] if item.microbatch >= 0 else sum(program.sizes)


class _Memory:
    """Bytes alive on each device, and the most there were."""

    def __init__(
        self, program: Program, costs: Mapping[tuple[int, str], SegmentCost], optimizer: str, processes: bool
    ) -> None:
        self.program, self.costs = program, costs
        devices = [device for device, _ in program.instructions]
        self.now = dict.fromkeys(devices, 0.0)
        factor = optimizer_factor(optimizer)
        held: dict[str, dict[str, tuple[int, bool]]] = {device: {} for device in devices}
        views: dict[str, dict[str, float]] = {device: {} for device in devices}
        owner: dict[str, str] = {}
        for s, places in enumerate(program.placement):
            for device in dict.fromkeys(places):
                if device in held and (s, device) in costs:
                    for name, size, trains in costs[s, device].parameters:
                        held[device][name] = (size, trains)
                    for name, whole in costs[s, device].given if shares_memory(device) else ():
                        views[device][name] = whole.at(sum(program.sizes))
        for device, parameters in held.items():
            for name, (size, trains) in parameters.items():
                mine = owner.setdefault(name, device) == device if shares_memory(device) else True
                gradient = size if trains and program.train else 0
                self.now[device] += size + factor * gradient if mine else 0
            self.now[device] += sum(views[device].values())
        self.peak = dict(self.now)
        self.made: dict[str, set[str]] = {device: set() for device in devices}
        self.late: dict[tuple[int, str], float] = {}
        self.flushed: dict[str, list[Instruction]] = {device: [] for device in devices}
        self.boundary: dict[tuple[str, int], float] = {}
        self.processes = processes
        self.together = program.replicas if not processes and all(map(shares_memory, program.replicas)) else ()
        self.releases = sure_releases(program, frozenset(s for (s, _), cost in costs.items() if cost.later))
        self.leaving: dict[tuple[str, str, int, bool], set[Message]] = {}
        self.leaving_bytes: dict[tuple[str, str, int, bool], float] = {}
        self.later_sent: dict[tuple[str, int, int], dict[tuple[str, str, int, bool], int]] = {}
        self.hosted: frozenset[str] = frozenset()  # devices whose host has a memory of its own
        self.there: dict[str, tuple[int, int]] = {}  # whose last range has not left yet
        self.staying: dict[str, float] = {}

    def _add(self, device: str, change: float, transient: float = 0.0) -> None:
        self.now[device] += change
        self.peak[device] = max(self.peak[device], self.now[device] + transient)

    def sent(self, device: str, item: Instruction) -> None:
        """What was sent stays until it has certainly been used (``inbox``): who gets it may be late. What is saved is
        counted as that.
        """
        cost = self.costs.get((item.segment, device))
        key = _sent(message(device, item.peer, item))
        going = self.leaving.setdefault(key, set())
        going.add(message(device, item.peer, item))
        if not item.grad and cost is not None and item.tensor in cost.held:
            self.later_sent.setdefault((device, item.segment, item.microbatch), {})[key] = item.nbytes
        elif key not in self.leaving_bytes:
            self.leaving_bytes[key] = item.nbytes
            self._add(device, item.nbytes)

    def received(self, device: str, item: Instruction, position: int) -> None:
        for gone in self.releases.get((device, position), ()):
            going = self.leaving.get(_sent(gone), set())
            going.discard(gone)
            if not going and (nbytes := self.leaving_bytes.pop(_sent(gone), 0.0)):
                self._add(device, -nbytes)
        if self.processes or not (shares_memory(device) and shares_memory(item.peer)):  # else it is the sender's
            key = (device, item.microbatch)
            self.boundary[key] = self.boundary.get(key, 0.0) + item.nbytes
            self._add(device, item.nbytes)

    def ran(self, device: str, item: Instruction, splits_backward: bool, ends_run: bool) -> None:
        """``ends_run``: no W follows this one."""
        cost = self.costs.get((item.segment, device))
        if cost is None:
            return
        samples = samples_of(self.program, item)
        saved = cost.saved.at(samples)
        if device not in self.hosted:  # what goes to the host goes nowhere
            saved += cost.trips.nbytes.at(samples)
        if not shares_memory(device):  # rows of what the caller made are copied here
            saved += cost.rows.at(samples)
        if item.kind == "F":
            rise = max((line.at(samples) for line in cost.rises.forward), default=0.0)
            joined = cost.joined.at(samples)  # till the step's end: its gradient is what all parts' gradients view
            train = self.program.train
            if cost.trips.ranges and train:
                self._leave(device)
                self.there[device] = item.segment, item.microbatch
                stays = self.staying[device] = cost.trips.last.at(samples)
                self._add(device, saved + joined + stays, max(rise - stays, 0.0))
                return
            self._add(device, saved + joined if train else 0.0, rise if train else rise + joined)
            if not self.program.train:
                self._ends(device, item)
        elif item.kind == "W":
            self.flushed[device].append(item)
            if ends_run:
                self._flush(device, splits_backward)
        else:
            if self.there.get(device) == (item.segment, item.microbatch):
                self._leave(device)
            elif cost.trips.ranges:
                cost = replace(cost, rises=cost.fetched)
            self._gradients(device, item, cost, samples, splits_backward)
            self._add(device, (max(cost.owed.at(samples), 0.0) if splits_backward else 0.0) - saved)
            for key, nbytes in self.later_sent.pop((device, item.segment, item.microbatch), {}).items():
                if self.leaving.get(key):  # its receiver may keep it for a W step
                    self.leaving_bytes[key] = nbytes
                    self._add(device, nbytes)
            if not splits_backward:
                self._ends(device, item)

    def _leave(self, device: str) -> None:
        """The last range of what went to the host goes too, or is used."""
        self.there.pop(device, None)
        self._add(device, -self.staying.pop(device, 0.0))

    def _ends(self, device: str, item: Instruction) -> None:
        self._add(device, -self.boundary.pop((device, item.microbatch), 0.0))

    def _flush(self, device: str, splits_backward: bool) -> None:
        """A run of W steps: each weight's gradient of all of them in one product, one weight after the other."""
        items, self.flushed[device] = self.flushed[device], []
        for segment in dict.fromkeys(i.segment for i in items if splits_backward):
            mine = [i for i in items if i.segment == segment]
            cost, samples = self.costs[segment, device], [samples_of(self.program, i) for i in mine]
            late = self.late.pop((segment, device), 0.0)
            first = late > 0 or not cost.later
            rise = max((p.at(sum(samples), len(samples), first) for p in cost.rises.products), default=0.0)
            self._add(device, 0.0, max(rise, 0.0))
            self._add(device, late - sum(max(cost.owed.at(n), 0.0) for n in samples))
        for item in items:
            self._ends(device, item)

    def _gradients(
        self, device: str, item: Instruction, cost: SegmentCost, samples: int, splits_backward: bool
    ) -> None:
        """What the first backward of a segment adds for good, and the peak while it comes."""
        key = (item.segment, device)
        fresh = {name: size for name, size, trains in cost.parameters if trains and name not in self.made[device]}
        self.made[device].update(fresh)
        total = float(sum(fresh.values()))
        if splits_backward:
            self.late[key] = self.late.get(key, 0.0) + min(float(cost.later), total)
            total -= min(float(cost.later), total)
        lines = cost.rises.first if fresh else cost.rises.later
        if splits_backward and cost.rises.put_off:
            mine = self.later_sent.get((device, item.segment, item.microbatch), {})
            lines = cost.rises.lagged if any(self.leaving.get(key) for key in mine) else cost.rises.put_off
        if self.together and cost.rises.owner:  # each product is made once, and counted with the first
            owner = device == self.together[0]
            lines = cost.rises.owner if owner else cost.rises.helper
            total -= 0.0 if owner else float(sum(size for name, size in fresh.items() if name in cost.products))
        rise = max((line.at(samples) for line in lines), default=0.0)
        self._add(device, 0.0, max(rise, 0.0))
        self.now[device] += total  # what is saved goes in the same moment

    def reduce(self, largest: float) -> None:
        """While replicas' gradients are added, another's stands beside a device's own, but in a common memory."""
        for device in self.now:
            self._add(device, 0.0, largest if self.processes or not shares_memory(device) else 0.0)
