"""Predict: one step of a Plan on a Cluster, as the Trace the simulator gives."""

from __future__ import annotations

from dataclasses import replace

from partita.cluster import Cluster
from partita.cost.measured import Measured
from partita.cost.table import cost_table, segment_costs
from partita.graph import Graph
from partita.lower import lower
from partita.plan import Plan
from partita.sharding.batch import layouts
from partita.simulate import simulate
from partita.trace import Trace


def predict(
    graph: Graph,
    plan: Plan,
    cluster: Cluster,
    *,
    batch: int = 0,
    optimizer: str = "adamw",
    measured: Measured | None = None,
) -> Trace:
    """The predicted Trace of a training step of ``batch`` samples (0: what the plan was made for, else the graph's).

    ``measured``: timings that stand in for the closed forms of ``cost``. The plan must have passed ``check``.
    """
    samples = batch or plan.batch.size or graph.batch
    program = lower(graph, layouts(graph), replace(plan, predicted=None), batch=samples, train=graph.mode == "train")
    costs = segment_costs(program, cost_table(graph, cluster, measured=measured), cluster)
    return simulate(program, costs, cluster, optimizer=optimizer)
