"""Automatic: the planner's plan for a captured model on devices that are here, with the timings it rests on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from partita.apart import several_nodes
from partita.capture import Captured
from partita.cluster import Cluster
from partita.compiling import Timer, as_asked, where_it_pays
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
    wanted = Constraints.read(constraints)
    asked, wanted = wanted.compile, replace(wanted, compile=())

    def plan(over: Cluster, limits: Constraints | Mapping[str, Any] | None, measured: Measured | None) -> Plan:
        return auto(
            graph, layouts(graph), over, sync_batch_norm=can_synchronise(graph), optimizer=optimizer,
            constraints=limits, objective=objective, measured=measured,
            processes=not may_unite or several_nodes(over),
        )  # fmt: skip

    measured = timings(cluster, ())
    divided = plan(cluster, wanted, measured)
    found = [(divided, measured)]
    whole = all_as_one(cluster) if may_unite and wanted == Constraints() else None
    if whole is not None and measured is not None and (asked == "auto" or as_one.worth_asking(divided, cluster)):
        timed = timings(whole, (graph.batch,))
        with contextlib.suppress(InfeasibleError):
            if timed is not None:
                found.append((plan(whole, Constraints(microbatches=1), timed), measured.merged(timed)))
    if asked == "auto":
        found = [where_it_pays(graph, p, cluster, m, timings, optimizer) for p, m in found]
    best, timed = found[0]
    for other, more in found[1:]:
        best = as_one.better(best, other)
        timed = timed.merged(more) if timed is not None and more is not None else timed
    if asked and asked != "auto":
        best = as_asked(graph, best, cluster, asked, timed, optimizer)
    return best, timed
