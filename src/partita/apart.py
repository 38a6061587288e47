"""Apart: a simulated step as processes of their own take it: no parameter is shared, ZeRO divides them over replicas.

    simulated   one memory, or whole copies      static bytes corrected, exactly; gradients in parts from ZeRO 2 on
    afterwards  gradients round the ring         as often as the level asks (Rajbhandari et al., 2020, section 7);
                                                 between hosts without ZeRO during the last backward

The simulator knows replicas that share a memory; what a process holds beyond or below that is constant over the step,
but for gradients, which it is told to be as large as the rows that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from partita.cluster import Cluster
from partita.cost.communication import (
    IN_FLIGHT,
    REST_SECONDS,
    buckets,
    large_bytes,
    opening_seconds,
    ring,
    ring_all_reduce,
    ring_host_seconds,
)
from partita.cost.memory import optimizer_factor, shares_memory
from partita.cost.table import SegmentCost
from partita.graph import Graph
from partita.program import Program
from partita.simulate import simulate
from partita.trace import Event, Trace

Costs = Mapping[tuple[int, str], SegmentCost]


def simulate_apart(
    program: Program, costs: Costs, cluster: Cluster, *, optimizer: str, zero: int = 0, gathered: float = 0.0
) -> Trace:
    """As ``simulate``, with a process for each device. ``gathered``: bytes that ZeRO 3 has whole at a time."""
    held = _held(program, costs)
    users: dict[str, tuple[str, ...]] = {}
    for device, parameters in held.items():
        for name in parameters:
            users[name] = (*users.get(name, ()), device)
    replicas = max((len(set(places)) for places in program.placement[1:]), default=1)
    once = -(-len(program.sizes) // replicas) == 1
    level = zero if program.train else 0
    rows = level if once else min(level, 1)  # several microbatches a replica: all is whole until the last one ends
    used = _in_rows(costs, users) if rows > 1 else costs
    trace = simulate(program, used, cluster, optimizer=optimizer, processes=True)
    owner: dict[str, str] = {}
    extra: dict[str, float] = {}
    factor = optimizer_factor(optimizer) if program.train else 0
    for device, parameters in held.items():
        need = simulated = whole = 0.0
        for name, (size, trains) in parameters.items():
            n = len(users[name])
            trained = size if trains else 0
            told = size / n if rows > 1 and trains else size
            mine = owner.setdefault(name, device) == device or not shares_memory(device)
            simulated += (told + factor * (told if trains else 0)) if mine else 0.0
            need += factor * trained / (n if level else 1) + (size / n if rows == 3 and trains else size)
            whole += trained if n > 1 else 0
        extra[device] = need - simulated + (min(gathered, whole) if rows == 3 else 0.0)
    memory = tuple((device, round(peak + extra.get(device, 0.0))) for device, peak in trace.memory)
    return replace(trace, events=_summed(trace, held, users, cluster, level, once, program.train), memory=memory)


def several_nodes(cluster: Cluster) -> bool:
    """Whether the devices are on several hosts, where no one process can have them all."""
    return len({d.node for d in cluster.devices}) > 1


def largest_unit(graph: Graph) -> float:
    """Trained bytes of the largest part that ZeRO 3 gathers at a time: a block of the model."""
    sizes: dict[str, float] = {}
    for tensor in graph.of_role("parameter"):
        parts = tensor.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        unit = ".".join(parts[: at + 1])
        sizes[unit] = sizes.get(unit, 0.0) + (tensor.nbytes(1) if tensor.needs_grad else 0)
    return max(sizes.values(), default=0.0)


def passes(zero: int, *, once: bool) -> int:
    """How often a step takes replicated parameters round the ring. ``once``: a replica has one microbatch.

    0: gradients are summed (two). 1: the rows that others updated are gathered too. 2: gradients go to whose rows they
    are (one), rows are gathered. 3: rows are gathered for forward and, where a replica has one microbatch, backward.
    """
    return 3 if zero == 1 or (zero == 3 and once) else 2


def _held(program: Program, costs: Costs) -> dict[str, dict[str, tuple[int, bool]]]:
    """Device -> parameter -> (bytes, whether it is trained)."""
    found: dict[str, dict[str, tuple[int, bool]]] = {device: {} for device, _ in program.instructions}
    for s, places in enumerate(program.placement):
        for device in dict.fromkeys(places):
            if device in found and (s, device) in costs:
                found[device] |= {name: (size, trains) for name, size, trains in costs[s, device].parameters}
    return found


def _in_rows(costs: Costs, users: Mapping[str, tuple[str, ...]]) -> dict[tuple[int, str], SegmentCost]:
    """Costs whose gradients are rows: each comes whole, as one op's product, and most of it goes at once."""
    result = {}
    for key, cost in costs.items():
        parts = tuple(
            (name, size // len(users.get(name, (key[1],))) if trains else size, trains)
            for name, size, trains in cost.parameters
        )
        result[key] = replace(cost, parameters=parts, rises=replace(cost.rises, first=cost.rises.later))
    return result


@dataclass(frozen=True, slots=True)
class _Ring:
    members: tuple[str, ...]
    nbytes: float


def _summed(
    trace: Trace, held: Mapping[str, Mapping[str, tuple[int, bool]]], users: Mapping[str, tuple[str, ...]],
    cluster: Cluster, level: int, once: bool, train: bool,
) -> tuple[Event, ...]:  # fmt: skip
    """The events with gradients summed over links instead of in one memory."""
    events = tuple(e for e in trace.events if e.kind != "REDUCE" or e.segment >= 0)
    start = max((e.end for e in events), default=0.0)
    found = list(events)
    for device, parameters in held.items() if train else ():
        rings: dict[tuple[str, ...], float] = {}
        sizes: dict[tuple[str, ...], list[int]] = {}
        for name, (size, trains) in parameters.items():
            if trains and len(users[name]) > 1:
                rings[users[name]] = rings.get(users[name], 0.0) + size
                sizes.setdefault(users[name], []).append(size)
        if not level and several_nodes(cluster):
            found += [_during(events, device, members, each, cluster) for members, each in sizes.items()]
            continue
        seconds = sum(_seconds(cluster, _Ring(*item), passes(level, once=once)) for item in rings.items())
        if seconds:
            found.append(Event(device, "REDUCE", "REDUCE", -1, -1, start, start + seconds))
    return tuple(found)


def _during(
    events: Sequence[Event], device: str, members: tuple[str, ...], sizes: Sequence[int], cluster: Cluster
) -> Event:  # fmt: skip
    """Gradients summed over a link while backward runs. ``sizes``: of the parameters in order of use; the last one's
    gradient is there first. They are taken to come evenly over the last backward; where weight gradients are made
    apart, at its end. What is moved takes of the members' own cores, which makes backward that much longer."""
    ends = [e for e in events if e.device in members and e.kind in ("B", "W")]
    end = max((e.end for e in ends), default=0.0)
    last = [max((e for e in ends if e.device == d), key=lambda e: e.end, default=None) for d in members]
    apart = any(e.kind == "W" for e in ends)
    begin = end if apart else min(end, max((e.start for e in last if e is not None), default=end))
    channel = ring(cluster, members)
    messages = buckets(sizes[::-1], large_bytes(channel, sum(sizes)))
    end += 0.0 if apart else ring_host_seconds(sum(sizes), len(members), channel)
    lanes, free = [begin] * IN_FLIGHT, begin
    delay = ring_all_reduce(0.0, len(members), channel)
    opening = opening_seconds(channel) if begin > REST_SECONDS else 0.0
    for k, nbytes in enumerate(messages):
        ready = begin + (end - begin) * (k + 1) / len(messages)
        free = max(free, ready, min(lanes)) + ring_all_reduce(nbytes, len(members), channel) - delay
        free += opening if not k else 0.0
        lanes[lanes.index(min(lanes))] = free + delay
    done = max(*lanes, end)
    return Event(device, "REDUCE", "REDUCE", -1, -1, begin, done, sum(sizes))


def _seconds(cluster: Cluster, ring: _Ring, count: int) -> float:
    n = len(ring.members)
    pairs = zip(ring.members, (*ring.members[1:], ring.members[0]), strict=True)
    return count * (n - 1) * max(cluster.transfer_seconds(a, b, round(ring.nbytes / n)) for a, b in pairs)
