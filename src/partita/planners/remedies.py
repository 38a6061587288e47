"""Remedies: the nearest requests that do work, each found by planning it again."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

from partita.cluster import Cluster
from partita.errors import PartitaError
from partita.planners.constraints import Constraints
from partita.planners.problem import Problem
from partita.units import format_bytes, format_seconds


class Result(Protocol):
    """A plan that works: its step time and memory."""

    @property
    def seconds(self) -> float: ...

    @property
    def memory(self) -> tuple[tuple[str, int], ...]: ...


class Request(Protocol):
    """A request that can be changed and tried."""

    cluster: Cluster
    batch: int
    optimizer: str
    constraints: Constraints
    train: bool

    def again(
        self,
        *,
        cluster: Cluster | None = None,
        batch: int = 0,
        optimizer: str = "",
        constraints: Constraints | None = None,
    ) -> Request: ...

    def attempt(self) -> Result | None: ...


def remedies(request: Request, problem: Problem) -> tuple[str, ...]:
    """Lines to offer: drop a constraint, more memory, more devices, a smaller batch, an optimizer with less state."""
    lines: list[str] = []
    lines += _constraints(request)
    lines += _memory(request)
    lines += _devices(request)
    lines += _batch(request)
    if request.train and problem.optimizer_factor > 0:
        found = _try(request.again(optimizer="sgd"))
        if found is not None:
            lines.append(f"optimizer 'sgd' instead of {request.optimizer!r} fits: {_numbers(found)}")
    return tuple(lines) or ("no change of one thing alone makes it fit: use more or larger devices",)


def _try(request: Request) -> Result | None:
    try:
        return request.attempt()
    except PartitaError:
        return None


def _numbers(found: Result) -> str:
    device, need = max(found.memory, key=lambda pair: pair[1])
    return f"{format_bytes(need)} on {device}, {format_seconds(found.seconds)} a step"


def _scaled(cluster: Cluster, factor: float) -> Cluster:
    return replace(
        cluster,
        devices=tuple(replace(d, memory_bytes=int(d.memory_bytes * factor)) for d in cluster.devices),
    )


def _memory(request: Request) -> list[str]:
    """The smallest common factor on all devices' memory that works, to 3 %."""
    low, high, best = 1.0, 2.0, None
    while high <= 2.0**24:
        best = _try(request.again(cluster=_scaled(request.cluster, high)))
        if best is not None:
            break
        low, high = high, high * 4
    if best is None:
        return []
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        found = _try(request.again(cluster=_scaled(request.cluster, middle)))
        if found is not None:
            high, best = middle, found
        else:
            low = middle
    limit = {d.name: d.memory_bytes for d in request.cluster.devices}
    device, need = max(best.memory, key=lambda pair: pair[1] / max(limit[pair[0]], 1))
    rounded = max(need, int(limit[device] * high))
    return [
        f"smallest memory that works: {format_bytes(rounded)} on {device} ({high:.2f}x on every device), "
        f"{format_seconds(best.seconds)} a step"
    ]


def _devices(request: Request) -> list[str]:
    devices = request.cluster.devices
    if len({d.kind for d in devices}) != 1:
        return []
    for count in (len(devices) + 1, 2 * len(devices), 4 * len(devices)):
        extra = tuple(
            replace(devices[-1], name=f"{devices[-1].name.partition(':')[0]}:{len(devices) + k}")
            for k in range(count - len(devices))
        )
        found = _try(request.again(cluster=replace(request.cluster, devices=(*devices, *extra))))
        if found is not None:
            return [f"{count} such devices instead of {len(devices)} work: {_numbers(found)}"]
    return []


def _batch(request: Request) -> list[str]:
    size = request.batch // 2
    while size >= 1:
        found = _try(request.again(batch=size))
        if found is not None:
            return [f"a batch of {size} instead of {request.batch} fits: {_numbers(found)}"]
        size //= 2
    return []


def _constraints(request: Request) -> list[str]:
    """Constraints any one of which, left out, makes it work."""
    lines = []
    for item in fields(Constraints):
        value = getattr(request.constraints, item.name)
        if value == item.default:
            continue
        dropped: dict[str, Any] = {item.name: item.default}
        try:
            other = request.again(constraints=replace(request.constraints, **dropped))
        except PartitaError:
            continue
        found = _try(other)
        if found is not None:
            lines.append(f"without the constraint {item.name} it works: {_numbers(found)}")
    return lines
