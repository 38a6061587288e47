"""Automatic: the planner's plan for a captured model on devices that are here, with the timings it rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from partita.apart import several_nodes
from partita.capture import Captured
from partita.cluster import Cluster
from partita.cost.measured import Measured
from partita.errors import InfeasibleError
from partita.lockstep import can_synchronise
from partita.manual import plan_live
from partita.plan import Plan
from partita.planners import as_one
from partita.planners.auto import auto
from partita.planners.constraints import Constraints
from partita.runtime.live import children_bytes
from partita.sharding.batch import layouts
from partita.united import all_as_one

Timer: TypeAlias = Callable[[Cluster, Sequence[int]], Measured | None]


def best_plan(
    captured: Captured,
    cluster: Cluster,
    model: nn.Module,
    timings: Timer,
    *,
    optimizer: str,
    constraints: Constraints | Mapping[str, Any] | None,
    objective: str,
    may_unite: bool = True,
) -> tuple[Plan, Measured | None]:
    """The fastest plan that fits. ``timings(cluster, sizes)``: what was measured on its devices at microbatches of
    these sizes (none: as ``measure.profile`` chooses), or None.

    Without constraints, and only where measured, all CPU cores as one device are a choice too (``may_unite``: the
    devices are of one process).
    """
    if captured.live:
        names = [d.name for d in cluster.devices]
        return plan_live(children_bytes(model), type(model).__name__, names, reason=captured.live), None
    graph = captured.graph

    def plan(over: Cluster, limits: Constraints | Mapping[str, Any] | None, measured: Measured | None) -> Plan:
        return auto(
            graph, layouts(graph), over, sync_batch_norm=can_synchronise(graph), optimizer=optimizer,
            constraints=limits, objective=objective, measured=measured,
            processes=not may_unite or several_nodes(over),
        )  # fmt: skip

    measured = timings(cluster, ())
    divided = plan(cluster, constraints, measured)
    whole = all_as_one(cluster) if may_unite and constraints is None else None
    if whole is None or measured is None or not as_one.worth_asking(divided, cluster):
        return divided, measured
    timed = timings(whole, (graph.batch,))
    if timed is None:
        return divided, measured
    try:
        united = plan(whole, {"microbatches": 1}, timed)
    except InfeasibleError:
        return divided, measured
    return as_one.better(divided, united), measured.merged(timed)
