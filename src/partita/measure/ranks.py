"""The ranks of a run as a Cluster: each describes its own device, and the links between them are timed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from partita.cluster import Cluster, Device, Link
from partita.errors import ClusterError
from partita.measure.detect import Memory, describe_rank, limited
from partita.runtime.distributed import World

EVERY_PAIR = 8
SMALL, LARGE = 64, 1 << 20


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


def links_between(world: World) -> dict[tuple[int, int], tuple[float, float]]:
    """(bytes per second, seconds of latency) of each pair of ranks; of many ranks, one pair for each pair of hosts."""
    pairs = list(combinations(range(world.size), 2))
    stands_for: dict[tuple[str, str], tuple[int, int]] = {}
    for a, b in pairs:
        stands_for.setdefault((world.hosts[a], world.hosts[b]), (a, b))
    timed = pairs if world.size <= EVERY_PAIR else list(stands_for.values())
    own = {}
    for a, b in timed:
        if world.rank in (a, b):
            found = _time_link(world, b if world.rank == a else a, first=world.rank == a)
            if world.rank == a:
                own[a, b] = found
        world.gather(None, "the links to be timed")
    figures: dict[tuple[int, int], tuple[float, float]] = {}
    for found_here in world.gather(own, "the links' speeds"):
        figures.update(found_here)
    return {p: figures.get(p) or figures[stands_for[world.hosts[p[0]], world.hosts[p[1]]]] for p in pairs}


def _time_link(world: World, peer: int, *, first: bool) -> tuple[float, float]:
    """There and back, halved: small messages for the latency, large ones for the bandwidth."""

    def echo(size: int, rounds: int) -> float:
        buffer = torch.zeros(size, dtype=torch.uint8)
        times = []
        for _ in range(rounds):
            start = perf_counter()
            order: list[Any] = [dist.send, dist.recv] if first else [dist.recv, dist.send]
            for call in order:
                call(buffer, peer, group=world.control)
            times.append((perf_counter() - start) / 2)
        return statistics.median(times[1:])

    with world.watch.waiting(f"rank {peer} to time the link"):
        latency = echo(SMALL, 12)
        seconds = echo(LARGE, 6)
    return float(f"{LARGE / max(seconds - latency, 1e-9):.3g}"), float(f"{latency:.3g}")
