"""Predict: one step of a Plan on a Cluster, as the Trace the simulator gives."""

from __future__ import annotations

from dataclasses import replace

from partita.apart import largest_unit, several_nodes, simulate_apart
from partita.cluster import Cluster
from partita.cost.compiled import with_compiled
from partita.cost.likened import likened
from partita.cost.measured import Measured
from partita.cost.table import cost_table, segment_costs
from partita.divide import divide
from partita.graph import Graph
from partita.group_costs import with_collectives, with_members
from partita.lower import lower
from partita.plan import Plan
from partita.sharding.batch import layouts
from partita.simulate import simulate
from partita.trace import Trace
from partita.united import with_united


def predict(
    graph: Graph,
    plan: Plan,
    cluster: Cluster,
    *,
    batch: int = 0,
    optimizer: str = "adamw",
    measured: Measured | None = None,
    processes: bool = False,
) -> Trace:
    """The predicted Trace of a training step of ``batch`` samples (0: what the plan was made for, else the graph's).

    ``measured``: timings that stand in for the closed forms of ``cost``. ``processes``: each device is a process of its
    own (so it is with ZeRO, and on several nodes). The plan must have passed ``check``.
    """
    samples = batch or plan.batch.size or graph.batch
    plan, train = replace(plan, predicted=None), graph.mode == "train"
    cluster = with_united(cluster, (d for stage in plan.stages for d in stage.devices))
    found = layouts(graph)
    division = divide(graph, found, plan, batch=samples)
    program = lower(graph, found, plan, batch=samples, train=train, division=division)
    table = cost_table(graph, cluster, measured=measured)
    if division is None and any(stage.compile for stage in plan.stages):
        table = with_compiled(table, program, measured or Measured())
    if division is not None:
        table = likened(table, division.graph, division.members[0].origin, cluster)
    costs = segment_costs(program, table, cluster)
    if division is not None:
        costs = with_collectives(costs, division, program, cluster)
    apart = processes or bool(plan.zero) or several_nodes(cluster)
    if apart:
        gathered = 2.0 * largest_unit(graph)
        trace = simulate_apart(program, costs, cluster, optimizer=optimizer, zero=plan.zero, gathered=gathered)
    else:
        trace = simulate(program, costs, cluster, optimizer=optimizer)
    if division is None:
        return trace
    return with_members(trace, program, division, optimizer=optimizer, processes=apart)
