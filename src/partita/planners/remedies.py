"""Remedies: why nothing fits, and the nearest requests that do work, each found by planning it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from partita.cluster import Cluster
from partita.cost.away import SLOWEST, has_host
from partita.errors import PartitaError, Remedy
from partita.planners.build import usable_bytes
from partita.planners.conflicts import Atom, atoms, joined, largest_agreement, smallest_conflict
from partita.planners.constraints import Constraints
from partita.units import format_bytes, format_seconds

PRECISION = 1.03  # of the smallest memory named
WORTHWHILE = 1.05  # less memory by so much is worth another try
AMPLE = 2.0**24  # times what there is


class Result(Protocol):
    """A plan that works: its step time and memory."""

    @property
    def seconds(self) -> float: ...

    @property
    def memory(self) -> tuple[tuple[str, int], ...]: ...


class Request(Protocol):
    """A request that can be changed and tried. ``feasible``: in closed form; ``attempt``: simulated too."""

    @property
    def cluster(self) -> Cluster: ...

    @property
    def batch(self) -> int: ...

    @property
    def optimizer(self) -> str: ...

    @property
    def constraints(self) -> Constraints: ...

    @property
    def train(self) -> bool: ...

    @property
    def processes(self) -> bool: ...

    def again(
        self,
        *,
        cluster: Cluster | None = None,
        batch: int = 0,
        optimizer: str = "",
        constraints: Constraints | None = None,
    ) -> Request: ...

    def feasible(self) -> bool: ...

    def attempt(self) -> Result | None: ...


def remedies(request: Request, guilty: tuple[Atom, ...] = ()) -> tuple[Remedy, ...]:
    """What to offer: a constraint of the conflict dropped or loosened, more memory, more devices, a smaller batch, an
    optimizer with less state.
    """
    found = loosened(request, guilty)
    if guilty and not _feasible(request, cluster=_scaled(request.cluster, AMPLE)):
        return (*found, *_devices(request))
    found += [*_memory(request), *_devices(request), *_batch(request), *_zero(request), *_host(request)]
    if request.train and request.optimizer not in ("none", "sgd"):
        sgd = _try(request, optimizer="sgd")
        if sgd is not None:
            text = f"optimizer 'sgd' instead of {request.optimizer!r} fits: {_numbers(sgd)}"
            found.append(Remedy(text, {"optimizer": "sgd"}))
    return tuple(found)


def conflict(request: Request) -> tuple[Atom, ...]:
    """The smallest set of the request's constraints that cannot be met; () where they are not what is wrong."""
    parts = atoms(request.constraints)
    return smallest_conflict(parts, lambda c: _works(request, c)) if parts else ()


def loosened(request: Request, guilty: tuple[Atom, ...]) -> list[Remedy]:
    """The request with one constraint of the conflict changed or dropped; where several conflicts overlap, with as many
    kept as can be.
    """
    parts = atoms(request.constraints)
    found: list[Remedy] = []
    for atom in guilty:
        others = [a for a in parts if a != atom]
        for value in _nearest(atom, request):
            near = joined([*others, replace(atom, value=value)])
            result = _try(request, constraints=near)
            if result is not None:
                text = f"{replace(atom, value=value)} instead of {atom.value} works: {_numbers(result)}"
                found.append(Remedy(text, {"constraints": near}))
                break
        result = _try(request, constraints=joined(others))
        if result is not None:
            text = f"without the constraint {atom} it works: {_numbers(result)}"
            found.append(Remedy(text, {"constraints": joined(others)}))
    if guilty and not found:
        kept = largest_agreement(parts, lambda c: _works(request, c))
        result = _try(request, constraints=joined(kept))
        if result is not None:
            text = f"without {', '.join(str(a) for a in parts if a not in kept)} it works: {_numbers(result)}"
            found.append(Remedy(text, {"constraints": joined(kept)}))
    return found


def _nearest(atom: Atom, request: Request) -> Iterator[int]:
    """Other values of a number, nearest first."""
    value, devices = atom.value, len(request.cluster.devices)
    if isinstance(value, bool) or not isinstance(value, int):
        return
    if atom.field == "zero":
        yield from (level for level in (3, 2, 1, 0) if level != value)
        return
    if atom.field == "microbatches":
        near = {v for v in (value // 2, value // 4, 2 * value, 4 * value, request.batch) if 0 < v <= request.batch}
    else:
        near = {v for v in (value - 1, value + 1, value + 2, devices) if 0 < v <= devices}
    yield from sorted(near - {value}, key=lambda v: (abs(v - value), v))


def _works(request: Request, constraints: Constraints) -> bool:
    return _try(request, constraints=constraints) is not None


def _feasible(request: Request, **changed: Any) -> bool:
    try:
        return request.again(**changed).feasible()
    except PartitaError:
        return False


def _try(request: Request, **changed: Any) -> Result | None:
    try:
        return request.again(**changed).attempt()
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


def _memory(request: Request) -> list[Remedy]:
    """The smallest common factor on all devices' memory that works, to 3 %."""

    def enough(factor: float) -> bool:
        return _feasible(request, cluster=_scaled(request.cluster, factor))

    low, high = 1.0, 2.0
    while not enough(high):
        low, high = high, high * 4
        if high > AMPLE:
            return []
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    for factor in (high, high * 1.05, high * 1.15, high * 1.5, high * 2):
        found = _try(request, cluster=_scaled(request.cluster, factor))
        if found is not None:
            factor, found = _tightened(request, factor, found)
            larger = _scaled(request.cluster, factor)
            limit = {d.name: d.memory_bytes for d in larger.devices}
            device, _ = max(found.memory, key=lambda pair: pair[1] / max(limit[pair[0]], 1))
            text = (
                f"smallest memory that works: {format_bytes(limit[device])} on {device} ({factor:.2f}x on every "
                f"device), {format_seconds(found.seconds)} a step"
            )
            return [Remedy(text, {"cluster": larger})]
    return []


def _tightened(request: Request, factor: float, found: Result) -> tuple[float, Result]:
    """A smaller factor, where what was found leaves room."""
    for _ in range(3):
        limit = {d.name: factor * usable_bytes(d, processes=request.processes) for d in request.cluster.devices}
        less = factor * max(need / limit[device] for device, need in found.memory) * 1.002
        if less * WORTHWHILE > factor:
            break
        tighter = _try(request, cluster=_scaled(request.cluster, less))
        if tighter is None:
            break
        factor, found = less, tighter
    return factor, found


def enlarged(cluster: Cluster, by: int) -> Cluster:
    """With ``by`` devices more, like the last."""
    last, count = cluster.devices[-1], len(cluster.devices)
    kind = last.name.partition(":")[0]
    extra = tuple(replace(last, name=f"{kind}:{count + k}") for k in range(by))
    return replace(cluster, devices=(*cluster.devices, *extra))


def _zero(request: Request) -> list[Remedy]:
    """State divided over replicas, were each device a process of its own."""
    if not request.train or request.processes or len(request.cluster.devices) < 2 or request.constraints.zero >= 0:
        return []
    for level in (2, 3):
        near = replace(request.constraints, zero=level)
        found = _try(request, constraints=near) if _feasible(request, constraints=near) else None
        if found is not None:
            text = f"zero {level} with a process a device (torchrun) fits: {_numbers(found)}"
            return [Remedy(text, {"constraints": near})]
    return []


def _host(request: Request) -> list[Remedy]:
    """Activations in host memory, of accelerators whose link there nobody described."""
    bare = [d for d in request.cluster.devices if has_host(d) and not d.host_bandwidth]
    if not request.train or not bare:
        return []
    devices = tuple(replace(d, host_bandwidth=SLOWEST) if d in bare else d for d in request.cluster.devices)
    described = replace(request.cluster, devices=devices)
    found = _try(request, cluster=described) if _feasible(request, cluster=described) else None
    if found is None:
        return []
    text = f"offload to host memory fits, with 'host_bandwidth: 16 GB/s' (PCIe 3.0) of each device: {_numbers(found)}"
    return [Remedy(text, {"cluster": described})]


def _devices(request: Request) -> list[Remedy]:
    devices = request.cluster.devices
    if len({d.kind for d in devices}) != 1:
        return []
    for count in (len(devices) + 1, 2 * len(devices), 4 * len(devices)):
        more = enlarged(request.cluster, count - len(devices))
        found = _try(request, cluster=more) if _feasible(request, cluster=more) else None
        if found is not None:
            text = f"{count} such devices instead of {len(devices)} work: {_numbers(found)}"
            return [Remedy(text, {"cluster": more})]
    return []


def _batch(request: Request) -> list[Remedy]:
    """The largest batch that fits, of the halves, quarters and so on."""
    sizes = [request.batch >> k for k in range(1, request.batch.bit_length())]
    if not sizes or not _feasible(request, batch=sizes[-1]):
        return []
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _feasible(request, batch=sizes[middle]) else (middle + 1, high)
    for size in sizes[high:]:
        found = _try(request, batch=size)
        if found is not None:
            text = f"a batch of {size} instead of {request.batch} fits: {_numbers(found)}"
            return [Remedy(text, {"batch": size})]
    return []
