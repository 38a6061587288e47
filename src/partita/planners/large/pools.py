"""Pools: a cluster's devices by kind, with the links inside and between their nodes."""

from __future__ import annotations

from collections import Counter

from partita.cluster import Cluster, Device
from partita.cost.communication import Channel
from partita.cost.roofline import Assumptions
from partita.planners.large.prices import Pool


def pools(cluster: Cluster, assume: Assumptions) -> tuple[Pool, ...]:
    """One pool for each kind of device, in the cluster's order; links reach ``assume.links`` of their bandwidth."""
    groups: dict[tuple[str, int, float, float], list[Device]] = {}
    for device in cluster.devices:
        alike = (device.kind, device.memory_bytes, device.flops, device.memory_bandwidth)
        groups.setdefault(alike, []).append(device)
    found = []
    for members in groups.values():
        sizes = Counter(d.node for d in members)
        inside = next(((a, b) for a, b in zip(members, members[1:], strict=False) if a.node == b.node), None)
        apart = next((d for d in cluster.devices if d.node != members[0].node), None)
        near = _channel(cluster, *inside, assume) if inside else None
        far = _channel(cluster, members[0], apart, assume) if apart else None
        near = near or far or Channel(float("inf"))
        found.append(Pool(members[0], tuple(d.name for d in members), min(sizes.values()), near, far or near))
    return tuple(found)


def _channel(cluster: Cluster, a: Device, b: Device, assume: Assumptions) -> Channel:
    link = cluster.link(a.name, b.name)
    return Channel(link.bandwidth * assume.links, link.message_seconds)
