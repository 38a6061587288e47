"""Compiling: what of a plan goes through ``torch.compile``: as asked, or where it was measured to pay.

Compiling takes minutes, so nothing is compiled unless somebody asks: ``constraints={"compile": "auto"}`` compiles and
times every part that could be, each beside itself as it is, and keeps those that are clearly faster. What was compiled
for that is what the plan then runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from partita.check import check
from partita.cluster import Cluster
from partita.cost.blocks import Block
from partita.cost.compiled import COMPILED, EAGER, units
from partita.cost.measured import Measured, Timing
from partita.errors import PlanError
from partita.graph import Graph
from partita.lower import lower
from partita.manual import stage_names
from partita.plan import Plan, Predicted, Stage
from partita.planners.resolved import find
from partita.predict import predict
from partita.program import Program
from partita.runtime.compiled import lacking
from partita.sharding.batch import layouts
from partita.united import with_united
from partita.units import format_seconds

CLEARLY = 0.95
NOTHING = 0.01  # of all parts' seconds: too little to be named apart
ALL = ("",)


class Timer(Protocol):
    """Timings on the devices of a cluster at microbatches of these sizes (none: as ``measure.profile`` chooses), of
    ``units`` in place of its own; ``compiled``: as compiled code. None: not to be had."""

    def __call__(
        self, over: Cluster, sizes: Sequence[int], units: Sequence[Block] = (), compiled: bool = False
    ) -> Measured | None: ...


def as_asked(
    graph: Graph, plan: Plan, cluster: Cluster, names: Sequence[str], measured: Measured | None, optimizer: str
) -> Plan:
    """The plan with these modules (names or globs of them; ``""``: everything) compiled, and predicted anew.

    Raises PlanError for a name that means nothing, and where it then does not fit.
    """
    missing = [name for name in names if name and not find(graph, name)]
    if missing:
        raise PlanError(
            "the constraints cannot be met:",
            tuple(f"compile: {n!r} is no module or op of the model" for n in missing),
        )
    every = not all(names)
    wanted = {i for name in names for ops in find(graph, name).values() for i in ops}
    chosen = frozenset(op.name for i, op in enumerate(graph.ops) if every or i in wanted)
    new = _predicted(graph, _with(graph, plan, chosen), cluster, measured, optimizer)
    problems = (*check(new, graph, cluster, memory=_memory(new)), *unmet(new))
    if problems:
        raise PlanError("the plan cannot be compiled as asked:", problems)
    return new


def where_it_pays(
    graph: Graph, plan: Plan, cluster: Cluster, measured: Measured | None, timings: Timer, optimizer: str
) -> tuple[Plan, Measured | None]:
    """The plan with those parts compiled that were measured to be clearly faster so, and the timings; with the reason
    why, or why not, among its reasons."""
    asked = replace(
        plan, stages=tuple(replace(s, compile=() if s.recompute or s.offload else ALL) for s in plan.stages)
    )
    missing = lacking(d for s in plan.stages for d in s.devices)
    if missing:
        return _because(plan, f"nothing was compiled: {missing.partition(', or take')[0]}"), measured
    if measured is None or plan.predicted is None:
        return _because(plan, "nothing was compiled: nothing could be measured here"), measured
    program = _lowered(graph, asked)
    here = units(graph, program, EAGER)
    if not any(s.compiled for s in program.segments) or not here or any(s.tensor > 1 for s in plan.stages):
        return _because(plan, "nothing was compiled: no part of it stands by itself"), measured
    if program.synchronised:
        return _because(
            plan, "nothing was compiled: between statistics that replicas share there is little to fuse"
        ), measured
    used = with_united(cluster, dict.fromkeys(d for s in plan.stages for d in s.devices))
    over = Cluster(tuple(d for d in used.devices if any(d.name in s.devices for s in plan.stages)), used.links)
    size = max(program.sizes)
    eager = timings(over, (size,), here)
    there = units(graph, program, COMPILED)
    compiled = timings(over, (size,), there, True) if eager is not None else None
    if eager is None or compiled is None:
        return _because(plan, "nothing was compiled: its parts could not be timed here"), measured
    faster, times = _faster(graph, program, over, zip(here, there, strict=True), eager, compiled, size)
    said = f"{format_seconds(times[1])} compiled, {format_seconds(times[0])} as they are, a microbatch"
    if not faster:
        return _because(plan, f"nothing is compiled: the parts take {said}"), measured
    timed = measured.merged(Measured({k: t for k, t in compiled.timings.items() if k[0].startswith(COMPILED)}))
    new = _predicted(graph, _with(graph, plan, faster), cluster, timed, optimizer)
    assert new.predicted is not None
    now, before = new.predicted.step_seconds, plan.predicted.step_seconds
    full = any(need > used.device(d).memory_bytes for d, need in new.predicted.memory)
    if full or check(new, graph, cluster) or now >= CLEARLY * before:
        return _because(plan, f"nothing is compiled: a step would take {format_seconds(now)}"), measured
    return _because(
        new, f"compiled by torch.compile: the parts that could be take {said}; a step {format_seconds(before)} without"
    ), timed


def unmet(plan: Plan) -> tuple[str, ...]:
    """What this machine lacks for a plan that compiles, in words with the remedy."""
    found = lacking(d for s in plan.stages if s.compile for d in s.devices)
    return (found,) if found else ()


def _faster(
    graph: Graph, program: Program, over: Cluster, pairs: Iterable[tuple[Block, Block]], eager: Measured,
    compiled: Measured, size: int,
) -> tuple[frozenset[str], tuple[float, float]]:  # fmt: skip
    """Ops of the ranges that pay on the devices that run them; seconds of all ranges as they are, and compiled.
    ``pairs``: each unit as it is timed eager, and compiled."""
    kind = {d.name: d.kind for d in over.devices}
    found, sums = set[str](), [0.0, 0.0]
    small: list[tuple[list[str], float]] = []
    stage_of = {name: segment.stage for segment in program.segments for name in segment.ops}
    places = {s.stage: p for s, p in zip(program.segments, program.placement, strict=True) if s.stage >= 0}
    for plain, other in pairs:
        if not other.signature.startswith(COMPILED):
            continue
        names = [graph.ops[i].name for i in plain.ops]
        stage = next(stage_of[n] for n in names if stage_of.get(n, -1) >= 0)
        on = kind[places[stage][0]]
        timings = eager.get(plain.signature, on), compiled.get(other.signature, on)
        if timings[0] is None or timings[1] is None:
            continue
        seconds = [_total(t, size) for t in timings if t is not None]
        sums = [a + b for a, b in zip(sums, seconds, strict=True)]
        if seconds[1] < CLEARLY * seconds[0]:
            found.update(names)
        else:
            small.append((names, seconds[1]))
    for names, took in small if found else ():
        if took < NOTHING * sums[1]:
            found.update(names)
    return frozenset(found), (sums[0], sums[1])


def _total(timing: Timing, size: int) -> float:
    return (timing.forward + timing.backward + timing.weight).at(size)


def _with(graph: Graph, plan: Plan, chosen: frozenset[str]) -> Plan:
    """The plan with these ops compiled, named as a person would."""
    program = _lowered(graph, replace(plan, stages=tuple(replace(s, compile=ALL) for s in plan.stages)))
    parts = {n: p.stage for p in program.segments for a, b in p.compiled for n in p.ops[a:b]}
    stages: list[Stage] = []
    for s, stage in enumerate(plan.stages):
        could = {n for n, at in parts.items() if at == s}
        if could and could <= chosen:
            stages.append(replace(stage, compile=ALL))
            continue
        inside, now = dict[str, int](), 0
        for op in graph.ops:  # what could not be compiled goes with what is before it, so that modules are named whole
            now = int(op.name in could and op.name in chosen) if op.name in parts else now
            inside[op.name] = now
        modules, ops = stage_names(graph, inside, 2)[1] if any(inside.values()) else ((), ())
        stages.append(replace(stage, compile=(*modules, *ops)))
    return replace(plan, stages=tuple(stages))


def _lowered(graph: Graph, plan: Plan) -> Program:
    batch = plan.batch.size or graph.batch
    return lower(graph, layouts(graph), plan, batch=batch, train=graph.mode == "train")


def _predicted(graph: Graph, plan: Plan, cluster: Cluster, measured: Measured | None, optimizer: str) -> Plan:
    trace = predict(graph, plan, cluster, optimizer=optimizer, measured=measured)
    one = plan.predicted.one_device_seconds if plan.predicted is not None else 0.0
    busy = {device: trace.busy_seconds(device) for device, _ in trace.memory}
    slowest = max(busy, key=busy.__getitem__) if busy else ""
    return replace(plan, predicted=Predicted(trace.step_seconds, slowest, trace.memory, one))


def _memory(plan: Plan) -> dict[str, int]:
    return dict(plan.predicted.memory) if plan.predicted is not None else {}


def _because(plan: Plan, reason: str) -> Plan:
    return replace(plan, reasons=(*plan.reasons, reason))


__all__ = ["ALL", "Timer", "as_asked", "unmet", "where_it_pays"]
