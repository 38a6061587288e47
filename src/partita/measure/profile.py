"""Profile: what each distinct part of a model takes on each kind of device, measured by running it as steps do.

The graph is cut into units (``cost.blocks.profile_units``); equal layers have equal signatures and are measured once,
two of them in turn, so that weights come from memory as in a step. Each unit runs the code a plan would run, on the
device's own thread and cores, with real inputs: a forward of every unit, then backward and weight gradients in reverse,
first with no gradients yet, then adding to them. Devices that share the machine's memory run at the same time.
What other processes take meanwhile is not counted where that can be told (``_clock``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from partita.capture import Captured
from partita.cluster import Cluster, Device
from partita.cost.affine import Affine, through
from partita.cost.blocks import Block, profile_units
from partita.cost.measured import Measured, Timing
from partita.cost.memory import shares_memory
from partita.lower import lower
from partita.measure import store
from partita.measure.progress import progress_bar
from partita.measure.rehearsal import Rehearsal, scene
from partita.phases import divides
from partita.plan import Batch, Plan, Stage
from partita.program import Program
from partita.runtime.local import torch_device
from partita.runtime.team import Team
from partita.sharding.batch import BatchLayouts, layouts

Tensors = Mapping[str, torch.Tensor]
BUDGET_SECONDS = 4.0
INSTANCES = 2
MOST_ROUNDS = 12
PHASES = ("forward", "backward", "weight")


@dataclass(frozen=True, slots=True)
class _Sample:
    """Seconds of one run of a unit. ``fresh``: the first of a step, when there are no gradients yet."""

    phase: str
    unit: int
    fresh: bool
    seconds: float


@dataclass(eq=False)
class _Lane:
    """One device's side, and what it timed."""

    device: Device
    rehearsal: Rehearsal
    samples: list[_Sample] = field(default_factory=list)


@dataclass(frozen=True)
class _Script:
    """The program at one number of samples, the segments chosen from it, bytes each keeps to backward."""

    program: Program
    lanes: list[_Lane]
    chosen: tuple[int, ...]
    saved: Mapping[int, float]


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
) -> Measured:
    """Timings of the graph's units on the kinds of devices in the cluster, all of which must be here.

    ``given``: the call's tensors and the model's buffers by Graph name (left as they are); ``sizes``: samples of the
    microbatches to time (none: a replica's share of the batch and a quarter of that). What was measured before on this
    machine is read from disk, but for ``again``. ``budget_seconds`` bounds the repeats, not the first run of each unit.
    """
    batch_layouts = _timed_as(captured, batch_layouts)
    parts = profile_units(captured.graph)
    counts = _sizes(captured, batch_layouts, cluster, sizes)
    known = store.read(parts, cluster, counts, train)
    if _complete(known, parts, cluster) and not again:
        return known
    fresh: dict[tuple[str, str], Timing] = {}
    groups = _groups(cluster)
    with _random_state_kept(), progress_bar("measuring", len(groups) * MOST_ROUNDS, show=progress) as advance:
        for group in groups:
            scripts = [_script(captured, batch_layouts, group, parts, n, given, parameters, train) for n in counts]
            _rounds(group, scripts, train, budget_seconds / len(groups), advance)
            for kind in {d.kind for d in group}:
                by_size = [_numbers(script, parts, kind) for script in scripts]
                fresh |= {(signature, kind): timing for signature, timing in _lines(by_size, counts, parts).items()}
    measured = Measured(fresh)
    store.write(measured, cluster, counts, train)
    return known.merged(measured)


def kept(
    captured: Captured, batch_layouts: BatchLayouts, cluster: Cluster, *, sizes: Sequence[int] = (), train: bool = True
) -> Measured | None:
    """What an earlier ``profile`` left on disk; None where a unit is missing."""
    batch_layouts = _timed_as(captured, batch_layouts)
    parts = profile_units(captured.graph)
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
) -> _Script:
    """Every unit as a stage of its own, with its inputs at this number of samples."""
    graph = captured.graph
    batch = max(graph.batch, 1)
    split = Batch(batch, 2, (samples, batch - samples)) if samples < batch else Batch(batch, 1)
    home = group[0].name
    stages = tuple(Stage((home,), ops=tuple(graph.ops[i].name for i in p.ops)) for p in parts)
    plan = Plan(stages, fingerprint=graph.fingerprint, devices=(home,), batch=split, schedule="gpipe")
    program = lower(graph, batch_layouts, plan, batch=batch, train=train, part="forward")
    copies = {name: t.detach().clone() for name, t in given.items()}
    shared = scene(captured, batch_layouts, program, copies, parameters, train=train)
    lanes = [_Lane(d, Rehearsal(shared, torch_device(d.name))) for d in group]
    saved = lanes[0].rehearsal.open()
    for lane in lanes[1:]:  # the same values, read only
        lane.rehearsal.once, lane.rehearsal.values = lanes[0].rehearsal.once, lanes[0].rehearsal.values
    return _Script(program, lanes, _chosen(program, parts), saved)


def _rounds(
    group: tuple[Device, ...], scripts: Sequence[_Script], train: bool, budget: float, advance: Callable[[], None]
) -> None:
    """Every size in turn, so that a busy neighbour meets all of them; the first round only warms up."""
    team = Team(group)
    began = time.perf_counter()
    try:
        for number in range(MOST_ROUNDS):
            for script in scripts:
                barrier = threading.Barrier(len(script.lanes))
                team.run(
                    {lane.device.name: partial(_round, lane, script.chosen, train, barrier) for lane in script.lanes},
                    barrier.abort,
                )
                if not number:
                    for lane in script.lanes:
                        lane.samples.clear()
            advance()
            spent = time.perf_counter() - began
            if number and spent + spent / (number + 1) > budget:
                break
    finally:
        team.close()


def _chosen(program: Program, parts: Sequence[Block]) -> tuple[int, ...]:
    """Segments to time: of each signature the first few."""
    seen: dict[tuple[str, str], int] = {}
    result = []
    for i, segment in enumerate(program.segments):
        if segment.phase == "once":
            continue
        key = (parts[segment.stage].signature, segment.phase)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= INSTANCES:
            result.append(i)
    return tuple(result)


def _round(lane: _Lane, chosen: Sequence[int], train: bool, barrier: threading.Barrier) -> None:
    """Two passes over the chosen units: with no gradients yet, then adding to them."""
    rehearsal = lane.rehearsal

    def wait() -> None:
        if rehearsal.device.type == "cuda":
            torch.cuda.synchronize(rehearsal.device)

    clock = _clock(lane.device, rehearsal.device.type, alone=barrier.parties == 1)

    def timed(phase: str, index: int, fresh: bool, run: Callable[[], None]) -> None:
        wait()
        start = clock()
        run()
        wait()
        lane.samples.append(_Sample(phase, index, fresh, clock() - start))

    rehearsal.begin()
    for fresh in (True, False):
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


def _numbers(script: _Script, parts: Sequence[Block], kind: str) -> dict[str, list[dict[str, float]]]:
    """Signature -> numbers of each chosen instance: typical over rounds, then the median over devices of the kind."""
    times: dict[tuple[int, str, bool], list[float]] = {}
    for lane in (lane for lane in script.lanes if lane.device.kind == kind):
        rounds: dict[tuple[int, str, bool], list[float]] = {}
        for s in lane.samples:
            rounds.setdefault((s.unit, s.phase, s.fresh), []).append(s.seconds)
        for key, seconds in rounds.items():
            times.setdefault(key, []).append(_typical(seconds))
    typical = {key: median(values) for key, values in times.items()}
    found: dict[str, list[dict[str, float]]] = {}
    for index in script.chosen:
        segment = script.program.segments[index]
        row = {phase: typical.get((index, phase, False), 0.0) for phase in PHASES}
        row["first"] = sum(typical.get((index, phase, True), 0.0) - row[phase] for phase in PHASES)
        row["saved"] = script.saved.get(index, 0.0)
        row["whole"] = float(segment.phase == "whole")
        found.setdefault(parts[segment.stage].signature, []).append(row)
    return found


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: neighbours on the machine only ever add."""
    ordered = sorted(times)
    return ordered[(len(ordered) - 1) // 4]


def _lines(
    by_size: Sequence[Mapping[str, Sequence[Mapping[str, float]]]], counts: Sequence[int], parts: Sequence[Block]
) -> dict[str, Timing]:
    """Signature -> Timing, through what was measured at the smallest and the largest number of samples."""
    result = {}
    for signature in dict.fromkeys(p.signature for p in parts):
        lines: dict[str, Affine] = {}
        for name in (*PHASES, "first", "saved"):
            values = [_value(m.get(signature, ()), name) for m in by_size]
            if len(counts) == 1:
                lines[name] = Affine(0.0, values[0] / counts[0])
            else:
                lines[name] = _through(counts[0], values[0], counts[-1], values[-1])
        result[signature] = Timing(
            lines["forward"], lines["backward"], lines["weight"], saved=lines["saved"], first=lines["first"]
        )
    return result


def _through(n1: int, y1: float, n2: int, y2: float) -> Affine:
    """The line through both; through the second and zero where that would put more work below nothing."""
    line = through(n1, y1, n2, y2)
    return line if line.fixed >= 0.0 else Affine(0.0, y2 / n2)


def _value(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Of one unit: its part for each microbatch plus its part for the whole batch."""
    split = [r[name] for r in rows if not r["whole"]]
    whole = [r[name] for r in rows if r["whole"]]
    return (median(split) if split else 0.0) + (median(whole) if whole else 0.0)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
