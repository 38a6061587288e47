"""Phases: when each op of a step runs: once before it, for each microbatch, or on the whole batch."""

from __future__ import annotations

from partita.graph import Graph
from partita.sharding.batch import BatchLayouts


def divides(graph: Graph, layouts: BatchLayouts) -> bool:
    """Whether microbatches are worth having: most of the work can be done for a part of the batch.

    Where an early op couples the batch (the first BatchNorm), almost everything would run on the joined batch anyway:
    then the step has one microbatch, and with it the unsplit model's numbers bit for bit.
    """
    if not layouts.microbatchable:
        return False
    split = sum(op.flops for op in graph.ops if layouts.phase[op.name] == "split")
    return 2 * split >= sum(op.flops for op in graph.ops)


def phases_of(graph: Graph, layouts: BatchLayouts, *, single: bool) -> dict[str, str]:
    """Phase of each op. With one microbatch everything but the random draws runs in place."""
    if not single:
        return {op.name: layouts.phase[op.name] for op in graph.ops}
    phases: dict[str, str] = {}
    drawn: set[str] = set()
    ordered = True
    for op in graph.ops:
        inputs_known = all(graph.producer(t) is None or t in drawn for t in op.uses())
        early = (
            ordered
            and op.random
            and not op.writes
            and inputs_known
            and not any(graph.tensor(t).role == "input" for t in op.uses())
        )
        if early:
            drawn.update(op.outputs)
        elif op.random:
            ordered = False
        phases[op.name] = "once" if early else "split"
    return phases
