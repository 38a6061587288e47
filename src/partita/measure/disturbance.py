"""Disturbance: what a transfer between hosts takes of the cores that compute meanwhile.

    alone     products, and nothing else              seconds a product
    beside    products while messages go both ways    what they took longer than so many alone: lost to the messages

The time of this process would miss what kernels, interrupts and other processes of a host do for a message, and count
what cores that have nothing to compute do for nothing. Where a rank has cores to spare nothing is lost.
"""

from __future__ import annotations

from math import inf
from statistics import median
from threading import Thread
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from partita.runtime.distributed import World

ROUNDS = 3
ALONE_SECONDS = 0.1
MESSAGE = 1 << 20
AIM_SECONDS, MOST = 0.12, 12  # of all messages one way
WIDTH = 256  # of a product: 1 ms or less on a core


def bytes_a_lost_second(world: World, peer: int, bandwidth: float) -> float:
    """Bytes sent or taken for each second that this rank or ``peer``, whichever loses more, is kept from computing;
    inf where nothing is lost. Both call it. ``bandwidth``: of the link, bytes per second.

    Some tenths of a second; on a slow link one.
    """
    count = max(2, min(MOST, round(AIM_SECONDS * bandwidth / MESSAGE)))
    messages = [torch.zeros(MESSAGE, dtype=torch.uint8) for _ in range(2 * count)]
    left = torch.randn(torch.get_num_threads(), WIDTH, WIDTH)
    product = torch.empty_like(left)
    lost = []
    for _ in range(ROUNDS):
        _meet(world, peer)
        each = _alone(left, product)
        _meet(world, peer)
        lost.append(_beside(left, product, each, world, peer, messages))
    worse = max(median(lost), _swapped(world, peer, median(lost)))
    return 2 * count * MESSAGE / worse if worse > 0 else inf


def _alone(left: torch.Tensor, product: torch.Tensor) -> float:
    """Seconds a product."""
    count, start = 0, perf_counter()
    while perf_counter() - start < ALONE_SECONDS:
        torch.bmm(left, left, out=product)
        count += 1
    return (perf_counter() - start) / count


def _beside(
    left: torch.Tensor, product: torch.Tensor, each: float, world: World, peer: int, messages: list[torch.Tensor]
) -> float:
    """Seconds that the messages, half of them sent and half taken, kept this rank from products."""
    failed: list[BaseException] = []

    def exchange() -> None:
        half = len(messages) // 2
        try:
            under_way: list[Any] = [dist.irecv(m, peer, group=world.control) for m in messages[:half]]
            under_way += [dist.isend(m, peer, group=world.control) for m in messages[half:]]
            for work in under_way:
                work.wait()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=exchange, name="partita exchange", daemon=True)
    count, start = 0, perf_counter()
    thread.start()
    while thread.is_alive():
        torch.bmm(left, left, out=product)
        count += 1
    whole = perf_counter() - start
    thread.join()
    if failed:
        raise failed[0]
    return whole - count * each


def _meet(world: World, peer: int) -> None:
    _swapped(world, peer, 0.0)


def _swapped(world: World, peer: int, figure: float) -> float:
    """The peer's figure for this rank's."""
    theirs = torch.zeros(1, dtype=torch.float64)
    coming: Any = dist.irecv(theirs, peer, group=world.control)
    dist.send(torch.tensor([figure], dtype=torch.float64), peer, group=world.control)
    coming.wait()
    return float(theirs)
