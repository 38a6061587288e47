"""Profile: what each distinct part of a model takes on each kind of device, measured by running it as steps do.

The graph is cut into units (``cost.blocks.profile_units``); equal layers have equal signatures and are measured once,
two of them in turn, so that weights come from memory as in a step. Each unit runs the code a plan would run, on the
device's own thread and cores, with real inputs: a forward of every unit, then backward and weight gradients in reverse,
with no gradients yet, and at the smallest size once more adding to them. Devices that share the machine's memory run at
the same time, and one of each kind once more by itself. A large model's step takes seconds, and all of this is waited
for: the first round, which warms up, is one pass of the smallest size, and as when a device runs by itself, over one of
each kind of unit. What other processes take meanwhile is not counted where that can be told (``_clock``, ``timings``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from partita.capture import Captured
from partita.cluster import Cluster, Device
from partita.cost.blocks import Block, profile_units
from partita.cost.measured import Measured, Timing
from partita.cost.memory import shares_memory
from partita.graph import Graph
from partita.lower import lower
from partita.measure import store
from partita.measure.progress import progress_bar
from partita.measure.rehearsal import Rehearsal, scene
from partita.measure.timings import Sample, ease, lines, numbers
from partita.phases import divides
from partita.plan import Batch, Plan, Stage
from partita.program import Program
from partita.runtime.local import torch_device
from partita.runtime.team import Team
from partita.sharding.batch import BatchLayouts, layouts

Tensors = Mapping[str, torch.Tensor]
BUDGET_SECONDS = 3.0
INSTANCES = 2
MOST_ROUNDS = 12
ALONE_ROUNDS = (1, 3, 5)


@dataclass(eq=False)
class _Lane:
    """One device's side, and what it timed."""

    device: Device
    rehearsal: Rehearsal
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class _Script:
    """The program at one number of samples, the segments chosen from it, bytes each keeps to backward; ``distinct``:
    of those chosen, one of each kind."""

    program: Program
    lanes: list[_Lane]
    chosen: tuple[int, ...]
    distinct: tuple[int, ...]
    saved: Mapping[int, float]

    def samples(self, kind: str) -> list[list[Sample]]:
        """What each lane of a device of this kind timed."""
        return [lane.samples for lane in self.lanes if lane.device.kind == kind]

    def units(self, parts: Sequence[Block]) -> list[tuple[int, str, bool, float]]:
        """Of the segments chosen: number, signature, whether they run once on the whole batch, bytes kept."""
        of = ((i, self.program.segments[i]) for i in self.chosen)
        return [(i, parts[s.stage].signature, s.phase == "whole", self.saved.get(i, 0.0)) for i, s in of]


def profile(
    captured: Captured,
    batch_layouts: BatchLayouts,
    cluster: Cluster,
    *,
    given: Tensors,
    parameters: Tensors,
    sizes: Sequence[int] = (),
    train: bool = True,
    progress: bool = True,
    budget_seconds: float = BUDGET_SECONDS,
    again: bool = False,
    units: Sequence[Block] = (),
    compiled: bool = False,
) -> Measured:
    """Timings of the graph's units on the kinds of devices in the cluster, all of which must be here.

    ``given``: the call's tensors and the model's buffers by Graph name (left as they are); ``sizes``: samples of the
    microbatches to time (none: a replica's share of the batch and a quarter of that). What was measured before on this
    machine is read from disk, but for ``again``. ``budget_seconds`` bounds the repeats, not the first run of each unit.
    ``units``: to be timed in place of ``profile_units``, all of the graph's ops in order; ``compiled``: as compiled
    code, which takes minutes to make where it is not on disk yet.
    """
    batch_layouts = _timed_as(captured, batch_layouts)
    parts = tuple(units) or profile_units(captured.graph)
    counts = _sizes(captured, batch_layouts, cluster, sizes)
    known = store.read(parts, cluster, counts, train)
    if _complete(known, parts, cluster) and not again:
        return known
    fresh: dict[tuple[str, str], Timing] = {}
    groups = _groups(cluster)
    with _random_state_kept(), progress_bar("measuring", len(groups) * MOST_ROUNDS, show=progress) as advance:
        for group in groups:
            scripts = [
                _script(captured, batch_layouts, group, parts, n, given, parameters, train, compiled) for n in counts
            ]
            _rounds(group, scripts, train, budget_seconds / len(groups), advance)
            for kind in {d.kind for d in group}:
                by_size: list[dict[str, list[dict[str, float]]]] = []
                for script in scripts:
                    by_size.append(numbers(script.samples(kind), script.units(parts), by_size[0] if by_size else {}))
                found = lines(by_size, counts, (p.signature for p in parts), ease(scripts[-1].samples(kind)))
                fresh |= {(signature, kind): timing for signature, timing in found.items()}
    measured = Measured(fresh)
    store.write(measured, cluster, counts, train)
    return known.merged(measured)


def kept(
    captured: Captured, batch_layouts: BatchLayouts, cluster: Cluster, *, sizes: Sequence[int] = (), train: bool = True,
    units: Sequence[Block] = (),
) -> Measured | None:  # fmt: skip
    """What an earlier ``profile`` left on disk; None where a unit is missing."""
    batch_layouts = _timed_as(captured, batch_layouts)
    parts = tuple(units) or profile_units(captured.graph)
    known = store.read(parts, cluster, _sizes(captured, batch_layouts, cluster, sizes), train)
    return known if _complete(known, parts, cluster) else None


def _complete(known: Measured, parts: Sequence[Block], cluster: Cluster) -> bool:
    kinds = {d.kind for d in cluster.devices}
    return all(known.get(p.signature, kind) is not None for p in parts for kind in kinds)


def _timed_as(captured: Captured, batch_layouts: BatchLayouts) -> BatchLayouts:
    """Where the batch cannot be divided, replicas may still share the statistics of batch norms."""
    graph = captured.graph
    return batch_layouts if divides(graph, batch_layouts) else layouts(graph, batch_norm="per_microbatch")


def _sizes(captured: Captured, batch_layouts: BatchLayouts, cluster: Cluster, asked: Sequence[int]) -> tuple[int, ...]:
    """Samples to time, ascending; only the whole batch where there are no microbatches."""
    batch = max(captured.graph.batch, 1)
    if not divides(captured.graph, batch_layouts):
        return (batch,)
    share = -(-batch // max(len(cluster.devices), 2))
    wanted = {n for n in asked if 0 < n <= batch} or {share, max(1, share // 4)}
    return tuple(sorted(wanted))


def _groups(cluster: Cluster) -> list[tuple[Device, ...]]:
    """Devices measured at the same time: all CPU groups of a host together, one GPU of each kind alone. The first
    device's host stands for others that have nothing else."""
    together = tuple(d for d in cluster.devices if shares_memory(d.name))
    here = tuple(d for d in together if d.node == cluster.devices[0].node)
    if {d.kind for d in here} == {d.kind for d in together}:
        together = here
    alone = {d.kind: d for d in cluster.devices if not shares_memory(d.name)}
    return [*([together] if together else []), *((d,) for d in alone.values())]


def _script(
    captured: Captured,
    batch_layouts: BatchLayouts,
    group: tuple[Device, ...],
    parts: Sequence[Block],
    samples: int,
    given: Tensors,
    parameters: Tensors,
    train: bool,
    compiled: bool = False,
) -> _Script:
    """Every unit as a stage of its own, with its inputs at this number of samples."""
    graph = captured.graph
    batch = max(graph.batch, 1)
    split = Batch(batch, 2, (samples, batch - samples)) if samples < batch else Batch(batch, 1)
    home = group[0].name
    every = ("",) if compiled else ()
    stages = tuple(Stage((home,), ops=tuple(graph.ops[i].name for i in p.ops), compile=every) for p in parts)
    plan = Plan(stages, fingerprint=graph.fingerprint, devices=(home,), batch=split, schedule="gpipe")
    program = lower(graph, batch_layouts, plan, batch=batch, train=train, part="forward")
    copies = {name: t.detach().clone() for name, t in given.items()}
    shared = scene(captured, batch_layouts, program, copies, parameters, train=train)
    lanes = [_Lane(d, Rehearsal(shared, torch_device(d.name))) for d in group]
    chosen = _chosen(program, parts)
    with _threads_of(group[0]):
        saved = lanes[0].rehearsal.open(_stand_ins(graph, program, parts, chosen))
    for lane in lanes[1:]:  # the same values, read only
        lane.rehearsal.once, lane.rehearsal.values = lanes[0].rehearsal.once, lanes[0].rehearsal.values
    return _Script(program, lanes, chosen, _chosen(program, parts, 1), saved)


def _rounds(
    group: tuple[Device, ...], scripts: Sequence[_Script], train: bool, budget: float, advance: Callable[[], None]
) -> None:
    """Every size in turn, so that a busy neighbour meets all of them; the first round only warms up."""
    team = Team(group)
    began = time.perf_counter()
    try:
        for number in range(MOST_ROUNDS):
            before = time.perf_counter()
            for script in scripts if number else scripts[:1]:
                barrier = threading.Barrier(len(script.lanes))
                team.run(
                    {
                        lane.device.name: partial(
                            _round,
                            lane,
                            script.chosen if number else script.distinct,
                            train,
                            barrier,
                            number,
                            again=number > 0 and script is scripts[0] and len(script.program.sizes) > 1,
                        )
                        for lane in script.lanes
                    },
                    barrier.abort,
                )
                if not number:
                    for lane in script.lanes:
                        lane.samples.clear()
            if number in ALONE_ROUNDS and len(scripts[-1].lanes) > 1:
                largest = scripts[-1]
                for lane in {lane.device.kind: lane for lane in largest.lanes}.values():
                    nobody = threading.Barrier(1)
                    run = partial(_round, lane, largest.distinct, train, nobody, number, alone=True)
                    team.run({lane.device.name: run}, nobody.abort)
            advance()
            now = time.perf_counter()
            if number and now - began + now - before > budget:  # another like this one
                break
    finally:
        team.close()


def _chosen(program: Program, parts: Sequence[Block], most: int = INSTANCES) -> tuple[int, ...]:
    """Segments to time: of each signature the first few."""
    seen: dict[tuple[str, str], int] = {}
    result = []
    for i, segment in enumerate(program.segments):
        if segment.phase == "once":
            continue
        key = (parts[segment.stage].signature, segment.phase)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= most:
            result.append(i)
    return tuple(result)


def _stand_ins(graph: Graph, program: Program, parts: Sequence[Block], chosen: Sequence[int]) -> dict[int, int]:
    """Segment -> an equal one that is run, whose results stand in for its own. Nothing is timed or counted of a segment
    that is not chosen, but for those that take what a chosen one makes, which may keep it to their backward."""
    taking = {i for i, s in enumerate(program.segments) if any(u.source in chosen for u in s.uses)}
    found: dict[int, int] = {}
    ran: dict[object, int] = {}
    for i, segment in enumerate(program.segments):
        if segment.phase == "once":
            continue
        part = parts[segment.stage]
        place = {o: (k, j) for k, op in enumerate(part.ops) for j, o in enumerate(graph.ops[op].outputs)}
        results = tuple((place.get(o), graph.tensor(o).shape, graph.tensor(o).dtype) for o in segment.outputs)
        key = part.signature, segment.phase, len(segment.ops), results
        if i in chosen or i in taking or key not in ran:
            ran[key] = i
        else:
            found[i] = ran[key]
    return found


def _round(
    lane: _Lane, chosen: Sequence[int], train: bool, barrier: threading.Barrier, turn: int, *, alone: bool = False,
    again: bool = False,
) -> None:  # fmt: skip
    """A pass over the chosen units with no gradients yet, and ``again`` one that adds to them, which only further
    microbatches do. ``alone``: so they are noted."""
    rehearsal = lane.rehearsal

    def wait() -> None:
        if rehearsal.device.type == "cuda":
            torch.cuda.synchronize(rehearsal.device)

    clock = _clock(
        lane.device, rehearsal.device.type, alone=barrier.parties == 1 and not alone
    )  # alone: timed as together was

    def timed(phase: str, index: int, fresh: bool, run: Callable[[], None]) -> None:
        wait()
        began, start = time.perf_counter(), clock()
        run()
        wait()
        seconds, wall = clock() - start, time.perf_counter() - began
        lane.samples.append(Sample(phase, index, fresh, seconds, wall, turn, alone))

    rehearsal.begin()
    for fresh in (True, False) if again else (True,):
        barrier.wait()
        for index in chosen:
            timed("forward", index, fresh, partial(rehearsal.forward, index))
        for index in reversed(chosen):
            if train:
                grads = rehearsal.seed(index)
                timed("backward", index, fresh, partial(rehearsal.backward, index, grads))
                timed("weight", index, fresh, partial(rehearsal.weight, index))
            rehearsal.drop(index)
    rehearsal.end()


def _clock(device: Device, kind: str, *, alone: bool) -> Callable[[], float]:
    """Seconds of the device's own work: what neighbours on the machine take is not counted, where that can be told.

    One core: the thread's time. Several, with nothing else running in the process: the threads' mean, or the calling
    thread's where one op runs on it alone.
    """
    if kind != "cpu" or (len(device.cores) > 1 and not alone):
        return time.perf_counter
    if len(device.cores) == 1:
        return time.thread_time
    begun = time.process_time(), time.thread_time()

    def clock() -> float:
        return max((time.process_time() - begun[0]) / len(device.cores), time.thread_time() - begun[1])

    return clock


@contextmanager
def _threads_of(device: Device) -> Iterator[None]:
    """This thread computes with as many threads as the device's own: compiled code is made for a number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(device.cores) or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
