"""United: groups of CPU cores of one process that a plan uses as one device, named ``cpu:0+cpu:1``.

    stages: [{devices: [cpu:0+cpu:1], ...}]    one worker on the cores of both, each op divided by PyTorch's own threads

What cannot be cut into microbatches (a batch of one, statistics of the whole batch) would keep one group busy and the
others idle; united, all cores work on every op, with the unsplit model's numbers. GPUs and ranks have no such way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from partita.cluster import Cluster, Device

JOIN = "+"


def is_united(name: str) -> bool:
    return JOIN in name


def members(name: str) -> tuple[str, ...]:
    """The groups a device's name stands for: itself, where it is one."""
    return tuple(name.split(JOIN))


def problem(cluster: Cluster, name: str) -> str:
    """Why these devices cannot be one; empty where they can."""
    known = {d.name: d for d in cluster.devices}
    parts = members(name)
    missing = [p for p in parts if p not in known]
    if missing:
        return f"{', '.join(map(repr, missing))} is no device here; there are {', '.join(list(known)[:8])}"
    if len(set(parts)) < len(parts):
        return "a device is named twice"
    cores = [core for p in parts for core in known[p].cores]
    if any(not known[p].cores for p in parts) or len(set(cores)) < len(cores):
        return "only groups of CPU cores of this process that share no core can be one device"
    return ""


def unite(cluster: Cluster, name: str) -> Device:
    """The device that the groups in ``name`` are together.

    It may use as much memory as its smallest group: what it holds counts against the limit of each.
    """
    parts = [cluster.device(p) for p in members(name)]
    cores = tuple(sorted(core for p in parts for core in p.cores))
    return replace(
        parts[0],
        name=name,
        kind=f"{len(cores)}x {parts[0].kind.partition('x ')[2] or parts[0].kind}",
        memory_bytes=min(p.memory_bytes for p in parts),
        flops=sum(p.flops for p in parts),
        memory_bandwidth=sum(p.memory_bandwidth for p in parts),
        cores=cores,
    )


def with_united(cluster: Cluster, names: Iterable[str]) -> Cluster:
    """The cluster in which every united device among ``names`` stands in place of its groups."""
    united = [n for n in dict.fromkeys(names) if is_united(n) and not problem(cluster, n)]
    if not united:
        return cluster
    gone = {part for name in united for part in members(name)}
    devices = (*(unite(cluster, n) for n in united), *(d for d in cluster.devices if d.name not in gone))
    return replace(cluster, devices=devices)


def all_as_one(cluster: Cluster) -> Cluster | None:
    """All devices as one; None where they cannot be, or there is only one."""
    name = JOIN.join(d.name for d in cluster.devices)
    if len(cluster.devices) < 2 or problem(cluster, name):
        return None
    return with_united(cluster, (name,))
