"""Links between ranks, timed: messages of several sizes there and back, and the line through their times.

    seconds one way = latency + bytes / bandwidth          (Hockney, 1994)

The slope is the median of the slopes between two large messages each, weighed by the bytes between them (Theil, 1950;
Sen, 1968): what windows that open slowly or a full bucket add or save once is no bandwidth, and a size whose messages
were held up does not turn it. The times are of messages as a step sends them, the process group's own work included:
what that adds to the link's own latency (``ping``) is the overhead. Of the repeats the least is taken for small
messages and the lower quartile for large ones: a core that is shared delays some. Each size goes there and back some
times before it is timed, so that windows are open as they are in a long transfer. What messages take of the ends' cores
is this process's own time on one host, and between hosts what computing beside them loses (``disturbance``): others do
part of the work there.
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
OPENING, SMALL_ROUNDS, LARGE_ROUNDS = 3, 25, 8  # of which the first rounds are not counted
SMALL, LARGE = 1 << 10, 1 << 18
LOW = 0.25
LONG_SECONDS = 0.06  # larger messages than one that takes this long say nothing new


def line(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(bytes per second, seconds beside them) of (bytes, seconds) of messages of several sizes.

    The bandwidth is the slope among large messages, the rest what small ones take beyond it; at least 0.
    """
    nbytes, seconds = (np.array(column, dtype=np.float64) for column in zip(*times, strict=True))
    large = sorted((n, s) for n, s in times if n >= LARGE)
    slopes = sorted(((d - b) / (c - a), c - a) for (a, b), (c, d) in combinations(large, 2))
    half = np.cumsum([weight for _, weight in slopes]) >= sum(weight for _, weight in slopes) / 2
    straight = (large[-1][1] - seconds[nbytes <= SMALL].mean()) / large[-1][0]  # were nothing paid once
    per_byte = max(slopes[int(np.argmax(half))][0], straight / 2, 1e-15)
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
    own: dict[tuple[int, int], Figures] = {}
    for a, b in timed:
        if world.rank == a:
            times, host = _ask(world, b)
            bandwidth, whole = line(times)
            with world.watch.waiting(f"rank {b} to time the link"):
                latency = ping.ask(b, world.control)
            latency = whole if latency is None else min(latency, whole)
            own[a, b] = _brief(bandwidth), _brief(latency), _brief(host), _brief(whole - latency)
        elif world.rank == b:
            _answer(world, a)
            with world.watch.waiting(f"rank {a} to time the link"):
                ping.answer(a, world.control)
        world.gather(None, "the links to be timed")
    every: dict[tuple[int, int], Figures] = {}
    for found_here in world.gather(own, "the links' speeds"):
        every.update(found_here)
    found = {p: every.get(p) or every[stands_for[world.hosts[p[0]], world.hosts[p[1]]]] for p in pairs}
    firsts = [world.hosts.index(host) for host in dict.fromkeys(world.hosts)]  # one rank of each host
    if len(firsts) < 2 or world.device.type != "cpu":
        return found
    between = [p for p in pairs if world.hosts[p[0]] != world.hosts[p[1]]]
    host = _brief(bytes_a_lost_second(world, firsts, min(found[p][0] for p in between)))
    return {p: (f[0], f[1], host, f[3]) if p in between else f for p, f in found.items()}


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
            found.append((size, float(np.quantile(times[OPENING:], LOW if size > SMALL else 0.0))))
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
