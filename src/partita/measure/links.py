"""Links between ranks, timed: messages of several sizes there and back, and the line through their times.

    seconds one way = latency + bytes / bandwidth          (Hockney, 1994)

The slope is fitted by least squares of the relative deviations among large messages, with an intercept of its own: what
windows that open slowly or a full bucket add or save once is no bandwidth. The times are of messages as a step sends
them, the process group's own work included: what that adds to the link's own latency (``ping``) is the overhead.
Of the repeats the least is taken for small messages and the lower quartile for large ones: a core that is shared
delays some. What messages take of the ends' cores is this process's own time on one host, and between hosts what
computing beside them loses (``disturbance``): others do part of the work there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import inf
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from partita.measure import ping
from partita.measure.disturbance import bytes_a_lost_second
from partita.runtime.distributed import World

EVERY_PAIR = 8
SIZES = (64, 1 << 10, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 24)
SMALL_ROUNDS, LARGE_ROUNDS = 25, 6
SMALL, LARGE = 1 << 10, 1 << 18
LOW = 0.25
LONG_SECONDS = 0.06  # larger messages than one that takes this long say nothing new


def line(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(bytes per second, seconds beside them) of (bytes, seconds) of messages of several sizes.

    The bandwidth is the slope among large messages, the rest what small ones take beyond it; at least 0.
    """
    nbytes, seconds = (np.array(column, dtype=np.float64) for column in zip(*times, strict=True))
    large = nbytes >= LARGE
    rows = np.stack([np.ones(large.sum()), nbytes[large]], axis=1) / seconds[large, None]
    (_, per_byte), *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    per_byte = max(float(per_byte), 1e-15)
    return 1.0 / per_byte, max(0.0, float((seconds - nbytes * per_byte)[nbytes <= SMALL].mean()))


Figures = tuple[float, float, float, float]


def links_between(world: World) -> dict[tuple[int, int], Figures]:
    """(bytes per second, seconds of the link's latency, bytes per second of an end's processor, seconds that software
    adds to a message) of each pair of ranks; of many ranks, one pair for each pair of hosts.

    Collective. Some seconds for a slow link, tenths of one for a fast one.
    """
    pairs = list(combinations(range(world.size), 2))
    stands_for: dict[tuple[str, str], tuple[int, int]] = {}
    for a, b in pairs:
        stands_for.setdefault((world.hosts[a], world.hosts[b]), (a, b))
    timed = pairs if world.size <= EVERY_PAIR else list(stands_for.values())
    busy: dict[tuple[str, str], float] = {}  # of each two hosts whose cores do the work
    own: dict[tuple[int, int], Figures] = {}
    for a, b in timed:
        hosts = world.hosts[a], world.hosts[b]
        apart = hosts[0] != hosts[1] and stands_for[hosts] == (a, b) and world.device.type == "cpu"
        if world.rank == a:
            times, host = _ask(world, b)
            bandwidth, whole = line(times)
            with world.watch.waiting(f"rank {b} to time the link"):
                latency = ping.ask(b, world.control)
                if apart:
                    dist.send(torch.tensor([bandwidth], dtype=torch.float64), b, group=world.control)
                    busy[hosts] = _brief(bytes_a_lost_second(world, b, bandwidth))
            latency = whole if latency is None else min(latency, whole)
            own[a, b] = _brief(bandwidth), _brief(latency), _brief(host), _brief(whole - latency)
        elif world.rank == b:
            _answer(world, a)
            with world.watch.waiting(f"rank {a} to time the link"):
                ping.answer(a, world.control)
                if apart:
                    told = torch.zeros(1, dtype=torch.float64)
                    dist.recv(told, a, group=world.control)
                    bytes_a_lost_second(world, a, float(told))
        world.gather(None, "the links to be timed")
    every: dict[tuple[int, int], Figures] = {}
    for found_here, busy_here in world.gather((own, busy), "the links' speeds"):
        every.update(found_here)
        busy.update(busy_here)
    found: dict[tuple[int, int], Figures] = {}
    for a, b in pairs:
        hosts = world.hosts[a], world.hosts[b]
        bandwidth, latency, host, overhead = every.get((a, b)) or every[stands_for[hosts]]
        found[a, b] = bandwidth, latency, busy.get(hosts, host), overhead
    return found


def _brief(figure: float) -> float:
    return float(f"{figure:.3g}")


def _ask(world: World, peer: int) -> tuple[list[tuple[float, float]], float]:
    """(bytes, seconds one way) of messages to ``peer``, which answers each with as many; bytes sent or taken in a
    second of this process's own time."""
    found: list[tuple[float, float]] = []
    host = inf
    group = world.control
    with world.watch.waiting(f"rank {peer} to time the link"):
        for size in SIZES:
            if size > 2 * LARGE and found[-1][1] > LONG_SECONDS:
                break
            rounds = SMALL_ROUNDS if size <= SMALL else LARGE_ROUNDS
            dist.send(torch.tensor([size, rounds]), peer, group=group)
            message, answer, times = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), []
            spent = process_time()
            for _ in range(rounds):
                coming: Any = dist.irecv(answer, peer, group=group)
                start = perf_counter()
                dist.send(message, peer, group=group)
                coming.wait()
                times.append((perf_counter() - start) / 2)
            host = 2 * size * rounds / max(process_time() - spent, 1e-9)  # of the largest messages, in the end
            found.append((size, float(np.quantile(times[1:], LOW if size > SMALL else 0.0))))
        dist.send(torch.tensor([0, 0]), peer, group=group)
    return found, host


def _answer(world: World, peer: int) -> None:
    """As a step does, receives are posted before messages come: Gloo then needs no word back first."""
    group = world.control
    with world.watch.waiting(f"rank {peer} to time the link"):
        while True:
            head = torch.zeros(2, dtype=torch.int64)
            dist.recv(head, peer, group=group)
            size, rounds = head.tolist()
            if not rounds:
                return
            message, other = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
            coming: Any = dist.irecv(message, peer, group=group)
            for left in reversed(range(rounds)):
                coming.wait()
                if left:
                    coming = dist.irecv(other, peer, group=group)
                dist.send(message, peer, group=group)
                message, other = other, message
