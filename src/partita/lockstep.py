"""Lockstep: where a stage has a replica for each microbatch, its batch norms can share their statistics as they run."""

from __future__ import annotations

from math import prod

from partita.assign import stages_of
from partita.graph import Graph, Op
from partita.plan import Plan
from partita.sharding.batch import BatchLayouts
from partita.sharding.batch import layouts as batch_layouts


def effective(graph: Graph, layouts: BatchLayouts, plan: Plan, batch: int) -> tuple[BatchLayouts, bool]:
    """The layouts a plan runs under, and whether its batch norms share their statistics over replicas.

    Batch norm in training couples the batch in time; where every stage that has one has a replica for each microbatch,
    all parts run at the same moment and can combine their statistics, so that nothing needs to be joined.
    """
    count = len(plan.batch.split(batch)) if batch > 0 else 1
    if count < 2 or plan.batch_norm != "exact" or not layouts.couplings:
        return layouts, False
    if not can_synchronise(graph):
        return layouts, False
    stage_of = stages_of(plan, graph)
    norms = {stage_of[op.name] for op in _norms(graph)}
    if any(len(set(plan.stages[s].devices)) != count for s in norms):
        return layouts, False
    ranks: dict[str, int] = {}
    for s in norms:
        for rank, device in enumerate(plan.stages[s].devices):
            if ranks.setdefault(device, rank) != rank:
                return layouts, False
    found = batch_layouts(graph, batch_norm="per_microbatch")
    return (found, True) if len(found.couplings) < len(layouts.couplings) else (layouts, False)


MIN_STATISTICS = 128


def can_synchronise(graph: Graph) -> bool:
    """Whether the model has batch norms in training, each with enough values a channel to combine safely.

    Statistics of a handful of values make a batch norm magnify rounding a thousandfold, so that the combined sum and
    the plain one, both right to float32, would differ visibly; such models keep to the joined batch.
    """
    counts = [prod(graph.tensor(name).shape_at(graph.batch)) for op in _norms(graph) for name in op.uses()[:1]]
    channels = [graph.tensor(op.uses()[0]).shape_at(graph.batch)[1] for op in _norms(graph)]
    return bool(counts) and all(n >= MIN_STATISTICS * c for n, c in zip(counts, channels, strict=True))


def _norms(graph: Graph) -> list[Op]:
    """Batch norms that take statistics (they write running averages, or have none)."""
    return [op for op in graph.ops if op.target == "aten.batch_norm.default" and op.args[5] is True]
