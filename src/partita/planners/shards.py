"""Shards: the placements of a stage's parameters, for a plan that divides single ops (``Stage.tensor``).

    linear n ─ gelu ─ linear k      up.weight: Shard(0)   down.weight: Shard(1)      found by ``sharding.choose``

The search prices ops and collectives on the group's devices and its slowest link; what it finds is written into
``Stage.shard``, so that a plan file shows every divided parameter and a person may change it.
"""

from __future__ import annotations

from dataclasses import replace

from partita.cluster import Cluster
from partita.divide import Division, divide
from partita.graph import Graph
from partita.plan import Plan, Stage
from partita.sharding.batch import BatchLayouts
from partita.sharding.placements import Shard
from partita.sharding.prices import Prices
from partita.sharding.unruled import unruled


def with_shards(graph: Graph, layouts: BatchLayouts, plan: Plan, cluster: Cluster) -> Plan:
    """The plan with every divided parameter named in its stage's ``shard``; wishes that stand there are kept.

    Ops that no rule lets divide are named in ``reasons``, with the line that would.
    """
    if all(stage.tensor < 2 for stage in plan.stages):
        return plan
    size = plan.batch.size or graph.batch
    division = divide(graph, layouts, plan, batch=size, prices=prices(plan, cluster), ranks=1)
    assert division is not None
    return named(graph, plan, division)


def named(graph: Graph, plan: Plan, division: Division) -> Plan:
    """The plan with what the division found."""
    stages = tuple(_named(graph, s, stage, division) for s, stage in enumerate(plan.stages))
    notes = unruled(graph, [op for choice in division.choices.values() for op in choice.options])
    return replace(plan, stages=stages, reasons=(*plan.reasons, *notes))


def prices(plan: Plan, cluster: Cluster) -> Prices:
    """Of the slowest device and link of all groups. Latency is left out: a degree that was asked for is carried out."""
    groups = [g for stage in plan.stages if stage.tensor > 1 for g in stage.groups]
    devices = [cluster.device(d) for g in groups for d in g]
    links = [cluster.link(a, b).bandwidth for g in groups for a, b in zip(g, g[1:], strict=False)]
    memory = min(d.memory_bandwidth for d in devices)
    return Prices(min(d.flops for d in devices), memory, min(*links, memory / 4))  # a sum reads twice, writes twice


def _named(graph: Graph, number: int, stage: Stage, division: Division) -> Stage:
    choice = division.choices.get(number)
    if choice is None:
        return stage
    found = dict(stage.shard)
    for name, placement in choice.held.items():
        path = graph.tensor(name).path or name
        if isinstance(placement, Shard):
            found.setdefault(path, str(placement))
    return replace(stage, shard=tuple(sorted(found.items())))
