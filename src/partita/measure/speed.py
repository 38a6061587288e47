"""Quick figures of this machine: flops and memory bandwidth of a core, hand-over time between threads, GPU links.

A fraction of a second in all; medians of several short runs, so that a busy neighbour does not decide.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def _median(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_own_thread(run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run with one intra-op thread, leaving the caller's setting as it was."""
    before = torch.get_num_threads()

    def body() -> dict[str, float]:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                return run()
        finally:
            torch.set_num_threads(before)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body).result()


def core_speed() -> dict[str, float]:
    """``flops`` of a 384x384 float32 product and ``bandwidth`` (bytes per second, read plus write) on one core."""

    def run() -> dict[str, float]:
        n = 384
        a, b, c = (torch.ones(n, n) for _ in range(3))
        flops = 2 * n**3 / _median(lambda: torch.mm(a, b, out=c))
        source, target = (torch.ones(8 << 20) for _ in range(2))
        bandwidth = 2 * source.numel() * 4 / _median(lambda: target.copy_(source))
        one = torch.ones(8)
        small = _median(lambda: [torch.add(one, one) for _ in range(200)]) / 200
        return {"flops": flops, "bandwidth": bandwidth, "overhead": small}

    return in_own_thread(run)


def all_cores_bandwidth(cores: int) -> float:
    """Bytes per second, read plus write, with every core copying at once."""
    count = max(1, min(cores, 64))
    pairs = [(torch.ones(4 << 20), torch.ones(4 << 20)) for _ in range(count)]

    def copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        pair[1].copy_(pair[0])

    before = torch.get_num_threads()

    def run() -> None:
        list(pool.map(copy, pairs))

    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        seconds = _median(run, 5)
    torch.set_num_threads(before)
    return sum(2 * a.numel() * 4 for a, _ in pairs) / seconds


def handover_seconds() -> float:
    """Seconds from putting a message into another thread's queue to that thread having it."""
    there: queue.SimpleQueue[int] = queue.SimpleQueue()
    back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def echo() -> None:
        while (word := there.get()) >= 0:
            back.put(word)

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()

    def round_trip() -> None:
        there.put(1)
        back.get()

    seconds = _median(round_trip, 200) / 2
    there.put(-1)
    thread.join()
    return seconds


def cuda_speed(index: int) -> dict[str, float]:
    """``flops`` and ``bandwidth`` of one GPU, and ``host``: bytes per second from pinned memory to it."""
    device = torch.device("cuda", index)

    def timed(run: Callable[[], object]) -> float:
        def synced() -> None:
            run()
            torch.cuda.synchronize(device)

        return _median(synced)

    with torch.inference_mode():
        n = 4096
        a, b, c = (torch.ones(n, n, device=device) for _ in range(3))
        flops = 2 * n**3 / timed(lambda: torch.mm(a, b, out=c))
        source, target = (torch.ones(64 << 20, device=device) for _ in range(2))
        bandwidth = 2 * source.numel() * 4 / timed(lambda: target.copy_(source))
        pinned = torch.ones(16 << 20).pin_memory()
        near = torch.empty(16 << 20, device=device)
        host = pinned.numel() * 4 / timed(lambda: near.copy_(pinned, non_blocking=True))
    return {"flops": flops, "bandwidth": bandwidth, "host": host}


def cuda_link(source: int, target: int) -> float:
    """Bytes per second between two GPUs."""
    a = torch.ones(16 << 20, device=torch.device("cuda", source))
    b = torch.empty(16 << 20, device=torch.device("cuda", target))

    def run() -> None:
        b.copy_(a, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)

    return a.numel() * 4 / _median(run)
