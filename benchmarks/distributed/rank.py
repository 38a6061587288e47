"""One rank: builds the contestants of a contest on one model, then steps them in turn, in an order drawn each round."""

from __future__ import annotations

import json
import os
import random
import sys
from time import perf_counter, process_time

import torch
import torch.distributed as dist

from benchmarks.distributed.contestants import CONTESTS, Ready, knowing
from benchmarks.distributed.megatron import sent_bytes
from benchmarks.models import WORKLOADS, Workload


def closed_form(contest: str, work: Workload, size: int) -> int:
    """Bytes a rank sends in a step: of gradients, for ZeRO 3 of parameters too; what crosses a cut one way; what
    Megatron's division sums."""
    model, x, _ = work.build()
    parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    share = (size - 1) / size
    if contest in ("data", "zero3"):
        return round((2 if contest == "data" else 3) * share * parameter_bytes)
    with torch.no_grad():
        chain = work.chain(model) if work.chain is not None else []
        for part in chain[: len(chain) // 2]:
            x = part(x)
    crossing: int = x.numel() * x.element_size()
    return crossing if contest == "pipeline" else sent_bytes(model, crossing, size)


def main(contest: str, workload: str, rounds: int, settings: dict[str, str]) -> None:
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
            with knowing(settings.get(name, "")):
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
    busy: dict[str, list[float]] = {name: [] for name in made}
    order, draw = list(made), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            dist.barrier()
            start, spent = perf_counter(), process_time()
            made[name].step()
            busy[name].append(process_time() - spent)
            dist.barrier()
            seconds[name].append(perf_counter() - start)
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (seconds, losses, sent, busy))
    if rank == 0:
        print(json.dumps({
            "ranks": every, "failed": failed, "notes": {n: r.note for n, r in made.items()},
            "chosen": {n: r.chosen for n, r in made.items() if r.chosen},
            "expected": closed_form(contest, work, dist.get_world_size()),
        }))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
