"""Group costs: seconds of the collectives between divided ops, added to the costs of the segments they stand in.

Every group's ring is as fast as its slowest link (``cost.communication``); members wait for each other in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from partita.cluster import Cluster
from partita.cost.affine import Affine, through
from partita.cost.communication import Channel, pairwise_all_to_all, ring, ring_all_gather, ring_all_reduce
from partita.cost.memory import optimizer_factor, shares_memory
from partita.cost.table import SegmentCost
from partita.divide import Division
from partita.graph import Graph, Op, refs
from partita.program import Program
from partita.trace import Trace

FORWARD = {
    "all_reduce": 2, "all_gather": 1, "all_gather_copied": 1, "reduce_scatter": 1, "exchange": 1,
    "divided_cross_entropy": 2,
}  # fmt: skip
BACKWARD = {"copied": 2, "take": 1, "all_gather_copied": 1, "reduce_scatter": 1, "exchange": 1}
"""Passes over the ring: 2 for an all_reduce, 1 for an all_gather, a reduce_scatter or an all_to_all."""


def with_collectives(
    costs: Mapping[tuple[int, str], SegmentCost], division: Division, program: Program, cluster: Cluster
) -> dict[tuple[int, str], SegmentCost]:
    """The costs of a leader's segments with the time of their collectives."""
    result = dict(costs)
    groups = dict(program.groups)
    ops = {op.name: op for op in division.graph.ops}
    for (s, device), cost in costs.items():
        members = groups.get(device)
        if members is None:
            continue
        channel = ring(cluster, members)
        forward = backward = Affine()
        for name in program.segments[s].ops:
            there, back = collective_seconds(division.graph, ops[name], len(members), channel, train=program.train)
            forward, backward = forward + there, backward + back
        result[s, device] = replace(cost, forward=cost.forward + forward, backward=cost.backward + backward)
    return result


def with_members(
    trace: Trace, program: Program, division: Division, *, optimizer: str, processes: bool = False
) -> Trace:
    """The trace of the leaders with what the others of their groups do: the same, on their own part.

    Where they share a memory, what is not divided stays with the leader. Rows that do not lie together are a copy.
    """
    groups = dict(program.groups)
    events = tuple(replace(e, device=d) for e in trace.events for d in groups.get(e.device, (e.device,)))
    memory: list[tuple[str, int]] = []
    for leader, need in trace.memory:
        used = {
            use.tensor
            for segment, places in zip(program.segments, program.placement, strict=True)
            for use in segment.uses
            if leader in places
        }
        for rank, device in enumerate(groups.get(leader, (leader,))):
            more = _differs(division, used, rank, optimizer) if leader in groups and not processes else 0
            memory.append((device, need + more))
    return replace(trace, events=events, memory=tuple(memory))


def _differs(division: Division, used: set[str], rank: int, optimizer: str) -> int:
    """Bytes that a member holds above (or below) what the leader's own graph says."""
    local, bytes_ = division.members[min(rank, len(division.members) - 1)], 0
    for tensor in local.graph.of_role("parameter"):
        shard = local.shards.get(tensor.name)
        size = tensor.nbytes(1)
        if tensor.name not in used:
            continue
        if shard is not None:
            bytes_ += size if len(shard.cut.rounds) > 1 else 0
        elif rank and shares_memory(division.groups[0][1][rank]):
            bytes_ -= size * (1 + (optimizer_factor(optimizer) if tensor.needs_grad else 0))
    return bytes_


def collective_seconds(
    graph: Graph, op: Op, members: int, channel: Channel, *, train: bool
) -> tuple[Affine, Affine]:  # fmt: skip
    """Of an op of a local graph: seconds of its collective in forward and in backward; none for other ops."""
    kind = op.target.removeprefix("partita.")
    forward, backward = _seconds(graph, op, FORWARD.get(kind, 0), members, channel), Affine()
    if train and op.grad and any(graph.tensor(o).needs_grad for o in op.outputs if o):
        backward = _seconds(graph, op, BACKWARD.get(kind, 0), members, channel)
    return forward, backward


def _seconds(graph: Graph, op: Op, passes: int, members: int, channel: Channel) -> Affine:
    if not passes:
        return Affine()
    kind = op.target.removeprefix("partita.")
    taken, made = next(refs(op.args)), op.outputs[0]
    name = taken if kind in ("all_reduce", "copied", "take", "reduce_scatter") else made  # the whole tensor

    def at(samples: int) -> float:
        nbytes = graph.tensor(name).nbytes(samples)
        if kind == "exchange":
            return pairwise_all_to_all(members * nbytes, members, channel)
        if passes == 2:
            return ring_all_reduce(nbytes, members, channel)
        return ring_all_gather(nbytes, members, channel)

    batch = max(graph.batch, 2)
    return through(1, at(1), batch, at(batch))
