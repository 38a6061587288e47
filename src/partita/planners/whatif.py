"""What if: what a plan's neighbours would cost, and what more memory, faster links or another device would bring.

Asked for when a plan is explained (``plan_text.explain_later``): neighbours are simulated, clusters planned for anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from partita.cluster import Cluster
from partita.errors import PartitaError
from partita.plan import Plan
from partita.planners.build import Built
from partita.planners.explain import part_name, shifted
from partita.planners.objective import allowed_stage, received_bytes, stage_time
from partita.planners.problem import Candidate
from partita.planners.remedies import enlarged
from partita.units import format_bytes, format_seconds

GIB = 1 << 30
CUTS_PRICED = 8


class Priced(Protocol):
    """What simulation says of a candidate. ``over``: a device that would not hold it, with the bytes missing."""

    @property
    def plan(self) -> Plan: ...

    @property
    def seconds(self) -> float: ...

    @property
    def memory(self) -> tuple[tuple[str, int], ...]: ...

    @property
    def over(self) -> tuple[str, float]: ...


class Planner(Protocol):
    """What ``later_reasons`` asks: prices of candidates, and plans for other clusters.

    ``otherwise``: the best plan that divides ops between devices (True) or that does not; ``all_on_devices``: that
    keeps no parameters in host memory.
    """

    @property
    def cluster(self) -> Cluster: ...

    @property
    def processes(self) -> bool: ...

    def price(self, built: Built, candidate: Candidate) -> Priced | None: ...

    def slowest_op(self, built: Built, candidate: Candidate, stage: int) -> tuple[str, float]: ...

    def elsewhere(self, cluster: Cluster) -> Plan: ...

    def otherwise(self, divided: bool) -> Priced | None: ...

    def all_on_devices(self) -> Priced | None: ...


def later_reasons(planner: Planner, built: Built, candidate: Candidate, seconds: float, gap: float) -> tuple[str, ...]:
    """Reasons that are simulated or planned anew: a neighbour's seconds are those ``predict`` gives for it."""
    lines = [*_neighbours(planner, built, candidate, seconds), *_pace(planner, built, candidate, seconds)]
    lines += [*_whole_or_divided(planner, built, candidate, seconds), *_state(planner, built, candidate, seconds)]
    lines += _all_on_devices(planner, candidate, seconds)
    cluster = planner.cluster
    more = replace(cluster, devices=tuple(replace(d, memory_bytes=d.memory_bytes + GIB) for d in cluster.devices))
    links = tuple(replace(k, bandwidth=2.0 * k.bandwidth) for k in cluster.links)
    asked = [("1GiB more on every device", more)]
    if len(cluster.devices) > 1 and links:
        asked.append(("links twice as fast", replace(cluster, links=links)))
    if len({d.kind for d in cluster.devices}) == 1:
        asked.append(
            (f"{len(cluster.devices) + 1} such devices instead of {len(cluster.devices)}", enlarged(cluster, 1))
        )
    for what, other in asked:
        found = _seconds_of(planner, other)
        if found is not None:
            lines.append(f"{what}: {_change(found, seconds)}")
    least = candidate.seconds / (1.0 + gap)
    lines.append(
        f"in closed form this plan takes {format_seconds(candidate.seconds)} and no plan of those searched less than "
        f"{format_seconds(least)} (gap {gap:.2%})"
    )
    return tuple(lines)


def _whole_or_divided(planner: Planner, built: Built, candidate: Candidate, now: float) -> list[str]:
    """The best plan that differs in whether single ops are divided."""
    if len(planner.cluster.devices) < 2:
        return []
    mine = any(built.problem.pools[s.pool].members > 1 for s in candidate.stages)
    found = planner.otherwise(not mine)
    if found is None:
        return ["no plan of whole ops fits" if mine else "no plan that divides single ops between devices was found"]
    degree = max(stage.tensor for stage in found.plan.stages)
    what = "without divided ops" if mine else f"with single ops divided by {degree}"
    stages = len(found.plan.stages)
    shape = f"{stages} stage{'s' if stages > 1 else ''}, {found.plan.batch.microbatches} microbatches"
    device, short = found.over
    tail = f", {format_bytes(short)} too much for {device}" if device else ""
    change = f"{format_seconds(found.seconds)} a step ({found.seconds / now - 1:+.1%})"
    return [f"{what} the best plan ({shape}) takes {change}{tail}"]


def _all_on_devices(planner: Planner, candidate: Candidate, now: float) -> list[str]:
    """The best plan without parameters in host memory, where this one has some."""
    if not any(s.lend for s in candidate.stages):
        return []
    found = planner.all_on_devices()
    if found is None:
        return ["no plan fits with all parameters on the devices"]
    return [f"with all parameters on the devices the best plan takes {_change(found.seconds, now)}"]


def _state(planner: Planner, built: Built, candidate: Candidate, now: float) -> list[str]:
    """The same plan at the other levels of ZeRO."""
    problem = built.problem
    if not planner.processes or not problem.train or all(s.replicas < 2 for s in candidate.stages):
        return []
    lines = []
    for level in (level for level in range(4) if level != problem.zero):
        priced = planner.price(replace(built, problem=replace(problem, zero=level)), candidate)
        if priced is not None:
            device, need = max(priced.memory, key=lambda pair: pair[1])
            where, short = priced.over
            more = f", {format_bytes(short)} too much for {where}" if where else ""
            text = f"{_change(priced.seconds, now)}, {format_bytes(need)} on {device}{more}"
            lines.append(f"this plan with ZeRO {level}: {text}")
    return lines


def _seconds_of(planner: Planner, cluster: Cluster) -> float | None:
    try:
        predicted = planner.elsewhere(cluster).predicted
    except PartitaError:
        return None
    return predicted.step_seconds if predicted is not None else None


def _change(seconds: float, now: float) -> str:
    change = seconds / now - 1.0
    return f"{format_seconds(seconds)} a step ({change:+.1%})" if abs(change) >= 5e-4 else "no faster"


def _neighbours(planner: Planner, built: Built, candidate: Candidate, now: float) -> list[str]:
    """Each cut one part earlier and later, simulated; the first few cuts of a long pipeline."""
    lines = []
    divided = any(built.problem.pools[s.pool].members > 1 for s in candidate.stages)
    most = 1 if divided else CUTS_PRICED
    for k in range(1, min(len(candidate.stages), most + 1)):
        where = part_name(built.blocks[min(candidate.stages[k].blocks)])
        found = []
        for word, by in (("earlier", -1), ("later", 1)):
            moved = shifted(candidate, k, by)
            if moved is None or not all(allowed_stage(built.problem, s.blocks, s.pool) for s in moved.stages):
                continue
            priced = planner.price(built, moved)
            if priced is not None:
                device, short = priced.over
                text = f"{format_seconds(priced.seconds)} a step ({priced.seconds / now - 1:+.1%})"
                found.append(f"{word} {text}" + (f", {format_bytes(short)} too much for {device}" if device else ""))
        if found:
            lines.append(f"simulated, the cut before {where} one part {'; one part '.join(found)}")
    return lines


def _pace(planner: Planner, built: Built, candidate: Candidate, now: float) -> list[str]:
    """The op that weighs most where the pace is set, and the link that carries most."""
    problem, m = built.problem, candidate.microbatches
    if any(s.pool < 0 for s in candidate.stages):
        return []
    times = [stage_time(problem, s, m) for s in candidate.stages]
    busy = [t.microbatches * (t.forward + t.backward + t.weight) + t.whole for t in times]
    slow = max(range(len(busy)), key=busy.__getitem__)
    name, part = planner.slowest_op(built, candidate, slow)
    lines = [f"the heaviest op where the pace is set (stage {slow}) is {name}: {part:.0%} of that stage's computing"]
    both = 2 if problem.train else 1
    carried = [both * m * received_bytes(problem, s.blocks, problem.samples(m)) for s in candidate.stages]
    most = max(range(len(carried)), key=carried.__getitem__)
    if carried[most]:
        waits = carried[most] * problem.seconds_per_byte + both * m * problem.latency
        lines.append(
            f"the busiest link leads into stage {most}: {format_bytes(carried[most])} a step, {format_seconds(waits)} "
            f"at the slowest link's speed ({waits / now:.1%} of the step)"
        )
    return lines
