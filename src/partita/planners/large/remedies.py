"""Remedies: why no layout is found, and the nearest requests that work, each planned before it is offered."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from partita.cluster import Cluster
from partita.cluster_file import describe
from partita.errors import ClusterError, InfeasibleError, PlanError, Remedy
from partita.planners.large.request import Request
from partita.planners.large.search import Found
from partita.units import format_bytes, format_seconds

FACTORS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)


def why_not(request: Request, found: Found) -> PlanError | InfeasibleError:
    """The error that says what stands in the way: constraints (the smallest set that cannot be met) or memory."""
    guilty = request.conflict()
    words = ", ".join(map(str, guilty))
    if guilty and not request.ever():
        line = f"smallest conflicting set: {words}" if len(guilty) > 1 else f"{words} cannot be met by itself"
        return PlanError("the constraints cannot be met", (line,), tuple(request.loosened(guilty)))
    where = " + ".join(f"{p.count} x {p.device.kind}" for p in request.search.pools)
    reason, first = found.why_not, []
    if guilty:
        reason = f"within the devices' memory these cannot be met: {words}"
        first = request.loosened(guilty)
    return InfeasibleError(f"{request.graph.name} does not fit {where}: {reason}", (*first, *remedies(request)))


def remedies(request: Request) -> tuple[Remedy, ...]:
    """More memory, more devices, a smaller batch, an optimizer with less state: the least change of one of them."""
    found = []
    for factor in FACTORS:
        larger = replace(
            request.cluster,
            devices=tuple(replace(d, memory_bytes=int(factor * d.memory_bytes)) for d in request.cluster.devices),
        )
        if (fit := request.again(cluster=larger).attempt()) is not None:
            amounts = " and ".join(dict.fromkeys(format_bytes(d.memory_bytes) for d in larger.devices))
            text = f"devices of {amounts} fit: {format_seconds(fit.seconds)} a step"
            found.append(Remedy(text, {"cluster": larger}))
            break
    for factor in (f for f in FACTORS if f == int(f)):
        more = multiplied(request.cluster, int(factor))
        if more is not None and (fit := request.again(cluster=more).attempt()) is not None:
            text = f"{int(factor)} times as many devices fit: {format_seconds(fit.seconds)} a step"
            found.append(Remedy(text, {"cluster": more}))
            break
    for size in (request.batch >> k for k in range(1, request.batch.bit_length())):
        if request.again(batch=size).feasible() and (fit := request.again(batch=size).attempt()) is not None:
            text = f"a batch of {size} instead of {request.batch} fits: {format_seconds(fit.seconds)} a step"
            found.append(Remedy(text, {"batch": size}))
            break
    if request.train and request.optimizer not in ("none", "sgd"):
        fit = request.again(optimizer="sgd").attempt()
        if fit is not None:
            text = f"optimizer 'sgd' fits: {format_seconds(fit.seconds)} a step"
            found.append(Remedy(text, {"optimizer": "sgd"}))
    return tuple(found) or (Remedy("no change of one thing alone makes it fit: use more and larger devices", {}),)


def multiplied(cluster: Cluster, factor: int) -> Cluster | None:
    """``factor`` times as many of each kind of node; None where the cluster is not made of devices with presets."""

    def spec(times: int) -> str:
        nodes = [
            (ds[0].kind, len(ds)) for _, members in groupby(cluster.devices, lambda d: d.node) if (ds := list(members))
        ]
        return " + ".join(f"{times * len(list(same))}x{n}x{kind}" for (kind, n), same in groupby(nodes))

    try:
        same, more = describe(spec(1)), describe(spec(factor))
    except ClusterError:
        return None
    memory = {d.kind: d.memory_bytes for d in cluster.devices}
    if len(same.devices) != len(cluster.devices):
        return None
    return replace(more, devices=tuple(replace(d, memory_bytes=memory[d.kind]) for d in more.devices))
