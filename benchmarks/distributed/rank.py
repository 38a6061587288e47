"""One rank: builds the contestants of a contest on one model, then steps them in turn, in an order drawn each round."""

from __future__ import annotations

import json
import os
import random
import sys
from time import perf_counter

import torch
import torch.distributed as dist

from benchmarks.distributed.contestants import CONTESTS, Ready
from benchmarks.models import WORKLOADS


def closed_form(contest: str, parameter_bytes: int, size: int) -> int | None:
    """Bytes this rank sends in a step of partita's: of gradients, for ZeRO 3 of parameters too."""
    share = (size - 1) / size
    if contest == "data":
        return round(2 * share * parameter_bytes)
    return round(3 * share * parameter_bytes) if contest == "zero3" else None


def main(contest: str, workload: str, rounds: int) -> None:
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # before any thread is made: theirs too
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = WORKLOADS[workload]
    made: dict[str, Ready] = {}
    failed: dict[str, str] = {}
    for name, build in CONTESTS[contest].items():
        try:
            made[name] = build(work)
            made[name].step()
        except Exception as error:  # a rival that cannot run this model is listed with its words
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            made.pop(name, None)
        dist.barrier()
    losses = {name: ready.step() for name, ready in made.items()}
    sent = {}
    for name, ready in made.items():
        if ready.sent is not None:
            before = ready.sent.payload
            ready.step()
            sent[name] = ready.sent.payload - before
    seconds: dict[str, list[float]] = {name: [] for name in made}
    order, draw = list(made), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            dist.barrier()
            start = perf_counter()
            made[name].step()
            dist.barrier()
            seconds[name].append(perf_counter() - start)
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (seconds, losses, sent))
    if rank == 0:
        size = sum(p.numel() * p.element_size() for p in work.make().parameters())
        print(json.dumps({
            "ranks": every, "failed": failed, "notes": {n: r.note for n, r in made.items()},
            "expected": closed_form(contest, size, dist.get_world_size()),
        }))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
