"""Tensor: a plan in which every stage divides its single ops by a degree that was asked for.

    devices  a b c d      degree 2      teams  (a b) (c d), each as one device of twice the speed and memory
                                        the planner's stages over teams, then each stage's placements

The stages are those of the planner over teams, whose members it takes to share all work; what the plan predicts is then
simulated op by op, with the collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from partita.cluster import Cluster
from partita.errors import InfeasibleError, PlanError
from partita.graph import Graph
from partita.plan import Plan, Predicted, Stage
from partita.planners.shards import with_shards
from partita.predict import predict
from partita.sharding.batch import BatchLayouts
from partita.units import format_bytes, format_seconds


def with_tensor(
    graph: Graph, layouts: BatchLayouts, cluster: Cluster, degree: int, plan_over: Callable[[Cluster], Plan], *,
    optimizer: str,
) -> Plan:  # fmt: skip
    """The plan in teams of ``degree`` devices. ``plan_over``: the planner, for a cluster of teams.

    Raises PlanError where there are too few devices, InfeasibleError where a member's part does not fit.
    """
    names = [d.name for d in cluster.devices]
    if degree > len(names):
        raise PlanError(
            "the constraints cannot be met",
            (f"tensor {degree} needs {degree} devices a stage; there are {len(names)}",),
        )
    team_of = {names[i]: tuple(names[i : i + degree]) for i in range(0, len(names) - degree + 1, degree)}
    found = plan_over(_teams(cluster, team_of))
    stages = tuple(_team_stage(stage, team_of, degree) for stage in found.stages)
    plan = with_shards(graph, layouts, replace(found, stages=stages, devices=tuple(names), reasons=()), cluster)
    trace = predict(graph, plan, cluster, batch=plan.batch.size or graph.batch, optimizer=optimizer)
    limits = {d.name: d.memory_bytes for d in cluster.devices}
    short = [(d, need) for d, need in trace.memory if need > limits[d]]
    if short:
        device, need = max(short, key=lambda pair: pair[1])
        raise InfeasibleError(
            f"{graph.name or 'the model'}: divided by {degree}, {device} would need {format_bytes(need)} and may use "
            f"{format_bytes(limits[device])}; ask for more stages, a higher tensor degree or more memory"
        )
    busy = {device: trace.busy_seconds(device) for device, _ in trace.memory}
    one = found.predicted.one_device_seconds * degree if found.predicted else 0.0
    said = (
        f"every {degree} devices divide single ops between them, as asked for: simulated "
        f"{format_seconds(trace.step_seconds)} a step",
        *_counted(plan),
    )
    bottleneck = max(busy, key=busy.__getitem__) if busy else ""
    predicted = Predicted(trace.step_seconds, bottleneck, trace.memory, one)
    return replace(plan, predicted=predicted, status="feasible", gap=0.0, reasons=(*said, *plan.reasons))


def _teams(cluster: Cluster, team_of: dict[str, tuple[str, ...]]) -> Cluster:
    """Each team as one device, known by its first member."""
    devices = tuple(
        replace(
            cluster.device(leader),
            memory_bytes=sum(cluster.device(d).memory_bytes for d in team),
            flops=sum(cluster.device(d).flops for d in team),
            memory_bandwidth=sum(cluster.device(d).memory_bandwidth for d in team),
            kind=f"{cluster.device(leader).kind} x {len(team)}",
        )
        for leader, team in team_of.items()
    )
    return replace(cluster, devices=devices)


def _team_stage(stage: Stage, team_of: dict[str, tuple[str, ...]], degree: int) -> Stage:
    return replace(stage, devices=tuple(d for leader in stage.devices for d in team_of[leader]), tensor=degree)


def _counted(plan: Plan) -> tuple[str, ...]:
    lines = []
    for s, stage in enumerate(plan.stages):
        if stage.shard:
            names = ", ".join(f"{name} {text}" for name, text in stage.shard[:3])
            more = f" and {len(stage.shard) - 3} more" if len(stage.shard) > 3 else ""
            lines.append(f"stage {s} divides {len(stage.shard)} parameters: {names}{more}")
    return tuple(lines)
