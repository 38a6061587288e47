"""The ranks of a run as a Cluster: each describes its own device, and the links between them are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from partita.cluster import Cluster, Device, Link
from partita.errors import ClusterError
from partita.measure.detect import Memory, describe_rank, limited
from partita.measure.links import links_between
from partita.runtime.distributed import World


def rank_cluster(world: World, devices: int | str | Sequence[str] | Cluster, memory: Memory = None) -> Cluster:
    """The Cluster of these ranks, the same on each. Collective.

    ``devices``: "auto" (all ranks), how many, their names (``cpu:0`` is rank 0) or as many words as there are to be
    devices, or a Cluster of such names. Raises ClusterError where there are more than ranks.
    """
    names = [f"{world.device.type}:{rank}" for rank in range(world.size)]
    wanted = [d.name for d in devices.devices] if isinstance(devices, Cluster) else _wanted(devices, names)
    foreign = [name for name in wanted if name not in names]
    if foreign or len(wanted) > world.size:
        what = f"devices names {', '.join(foreign)}" if foreign else f"{len(wanted)} devices are asked for"
        raise ClusterError(
            f"{what}, and there are {world.size} ranks, one device each: {', '.join(names)}. Start as many "
            f"processes as there are to be devices: torchrun --nproc-per-node {len(wanted)} ..."
        )
    if isinstance(devices, Cluster):
        return limited(devices, memory)
    mine: list[Device] = []
    for turn in (True, False):  # the first of each host measures, the others read what it kept
        if (world.local_rank == 0) == turn:
            mine.append(describe_rank(world.name, world.local_rank, world.local_size))
        world.gather(None, "each host's first rank to measure")
    if mine[0].cores:
        torch.set_num_threads(len(mine[0].cores))
    hosts = list(dict.fromkeys(world.hosts))
    every = world.gather(mine[0], "the ranks' devices")
    placed = (replace(d, node=hosts.index(world.hosts[r])) for r, d in enumerate(every))
    links = tuple(Link(names[a], names[b], *figures) for (a, b), figures in links_between(world).items())
    chosen = tuple(d for d in placed if d.name in wanted)
    kept = {d.name for d in chosen}
    return limited(Cluster(chosen, tuple(x for x in links if {x.source, x.target} <= kept)), memory)


def _wanted(devices: int | str | Sequence[str], names: list[str]) -> list[str]:
    if isinstance(devices, str):
        text = devices.strip().lower()
        if text in ("auto", ""):
            return names
        devices = int(text) if text.isdecimal() else [part.strip() for part in text.split(",")]
    if isinstance(devices, int):
        if devices < 1:
            raise ClusterError(f"devices={devices} leaves nothing to run on; it must be at least 1")
        return (names + [f"{names[0].partition(':')[0]}:{i}" for i in range(len(names), devices)])[:devices]
    kind = names[0].partition(":")[0]
    words = [str(word).strip().lower() for word in devices]
    return [word if ":" in word else f"{kind}:{i}" for i, word in enumerate(words)]
