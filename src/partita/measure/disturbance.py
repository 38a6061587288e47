"""Disturbance: what a transfer between hosts takes of the cores that compute meanwhile.

    alone     products, and nothing else                           seconds a product
    beside    products while tensors are summed over the hosts     what they took longer than so many alone

The time of this process would miss what kernels, interrupts and other processes of a host do for a message, and count
what cores that have nothing to compute do for nothing. Where a rank has cores to spare nothing is lost. Sums are timed,
since they are what moves most beside computing, and cost more than messages of as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from partita.runtime.distributed import World
from partita.runtime.distributed.world import Group

ROUNDS = 3
ALONE_SECONDS = 0.1
SUMMED = 1 << 20  # bytes of a tensor
AIM_SECONDS, MOST = 0.12, 12  # of all sums together
WIDTH = 256  # of a product: 1 ms or less on a core


def bytes_a_lost_second(world: World, ranks: Sequence[int], bandwidth: float) -> float:
    """Bytes sent or taken for each second that one of these ranks, one of each host, is kept from computing, whichever
    loses most; inf where nothing is lost. Collective, over all ranks. ``bandwidth``: of the slowest link among them,
    bytes per second.

    Some tenths of a second; on a slow link one or two.
    """
    group, lost = world.group(ranks, "" if len(ranks) == world.size else "the cores' disturbance"), 0.0
    count = max(2, min(MOST, round(AIM_SECONDS * bandwidth / SUMMED)))
    if world.rank in ranks:
        with world.watch.waiting("the other hosts to sum beside computing"):
            lost = _lost(group, count)
    worst = max(world.gather(lost, "what sums take of the cores"))
    moved = 4 * (len(ranks) - 1) / len(ranks) * count * SUMMED
    return moved / worst if worst > 0 else inf


def _lost(group: Group, count: int) -> float:
    """Seconds that so many sums keep this rank from computing."""
    tensors = [torch.zeros(SUMMED // 4) for _ in range(count)]
    left = torch.ones(torch.get_num_threads(), WIDTH, WIDTH)  # not drawn: the generator is the user's
    product = torch.empty_like(left)
    found = []
    for _ in range(ROUNDS):
        dist.barrier(group=group)
        each = _alone(left, product)
        dist.barrier(group=group)
        found.append(_beside(left, product, each, group, tensors))
    return median(found)


def _alone(left: torch.Tensor, product: torch.Tensor) -> float:
    """Seconds a product."""
    count, start = 0, perf_counter()
    while perf_counter() - start < ALONE_SECONDS:
        torch.bmm(left, left, out=product)
        count += 1
    return (perf_counter() - start) / count


def _beside(
    left: torch.Tensor, product: torch.Tensor, each: float, group: Group, tensors: Sequence[torch.Tensor]
) -> float:
    """Seconds that the sums of these kept this rank from products."""
    count, start = 0, perf_counter()
    under_way: list[Any] = [dist.all_reduce(t, group=group, async_op=True) for t in tensors]
    while not all(work.is_completed() for work in under_way):
        torch.bmm(left, left, out=product)
        count += 1
    whole = perf_counter() - start
    for work in under_way:
        work.wait()
    return whole - count * each
