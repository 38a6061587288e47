"""One rank: under each shape of the link, what it finds the link to be, the plan it chooses, and how long steps of that
and of every plan written by hand take.

    torchrun --nnodes 2 ... -m benchmarks.two_hosts.rank MODEL CONTROL ROUNDS BITS,LATENCY [BITS,LATENCY ...]
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import partita
from benchmarks.models import WORKLOADS, Workload, cross_entropy
from benchmarks.two_hosts.link import die_with_parent, shape
from partita.assign import assign
from partita.capture import capture
from partita.graph import Graph
from partita.measure import kept_timings
from partita.measure.ranks import rank_cluster
from partita.plan import Batch, Plan, Stage
from partita.predict import predict
from partita.runtime.distributed import join_world

BOTH = ("cpu:0", "cpu:1")
NEAR = 1.5  # after the first step, only plans this near to the best go on
FINALISTS = 4


@dataclass
class Ready:
    """``sent``: partita's own count."""

    plan: Plan
    step: Callable[[], float]
    sent: Any


def by_hand(work: Workload) -> dict[str, Plan]:
    """One device, replicas, divided ops, and pipelines cut in the middle and beside it."""
    names = work.names(work.make())
    found = {
        "one device": Plan((Stage(("cpu:0",), ("",)),), batch=Batch(work.batch, 1)),
        "data parallel": Plan((Stage(BOTH, ("",)),), batch=Batch(work.batch, 2)),
        "tensor parallel": Plan((Stage(BOTH, ("",), tensor=2),), batch=Batch(work.batch, 1)),
    }
    middle = len(names) // 2
    for cut in (middle - 1, middle, middle + 1):
        ends = (names[:cut], names[cut:])
        stages = tuple(Stage((d,), tuple(n for p in part for n in p)) for d, part in zip(BOTH, ends, strict=True))
        for schedule in ("1f1b", "zero_bubble", "gpipe"):
            for count in (2, 4, 8) if cut == middle and schedule != "gpipe" else (4,):
                key = f"cut at {names[cut][0]}, {count} microbatches, {schedule}"
                found[key] = Plan(stages, batch=Batch(work.batch, count), schedule=schedule)
    return found


def ready(work: Workload, plan: Plan | None, cluster: Any) -> Ready:
    model, x, target = work.build()
    pm = partita.parallelize(model, (x,), devices=cluster, plan=plan, loss_fn=cross_entropy)

    def step() -> float:
        pm.zero_grad(set_to_none=True)
        return pm.train_step(x, target).item()

    return Ready(pm.plan, step, pm.sent)


def same(graph: Graph, one: Plan, other: Plan) -> bool:
    """Whether two plans do the same: ops, devices, microbatches and order."""

    def what(plan: Plan) -> object:
        where = [(stage.devices, stage.tensor) for stage in plan.stages]
        order = plan.schedule if len(plan.stages) > 1 else ""
        return where, assign(plan, graph), plan.batch.split(plan.batch.size), order

    return what(one) == what(other)


def words(plan: Plan) -> str:
    if len(plan.stages) == 1:
        stage = plan.stages[0]
        if len(stage.devices) == 1:
            return "one device"
        return "tensor parallel" if stage.tensor > 1 else f"data parallel, {plan.batch.microbatches} microbatches"
    last = plan.stages[1]
    first = (*last.modules, *last.ops)[0]
    return f"{len(plan.stages)} stages, cut at {first}, {plan.batch.microbatches} microbatches, {plan.schedule}"


def on_the_wire(host: int) -> int:
    """Bytes that this host's device has sent, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    row = next(line for line in lines if line.strip().startswith(f"host{host}:"))
    return int(row.split(":")[1].split()[8])


def bytes_sent(world: Any, run: Ready) -> tuple[int, int]:
    """(on the wire, of tensors by partita's count) in one step, of the rank that sends more."""
    dist.barrier(group=world.control)
    before = on_the_wire(world.rank), run.sent.payload
    run.step()
    dist.barrier(group=world.control)
    mine = on_the_wire(world.rank) - before[0], run.sent.payload - before[1]
    both: list[Any] = [None, None]
    dist.all_gather_object(both, mine, group=world.control)
    return max(both)


def timed(world: Any, run: Ready) -> float:
    """Seconds from both ranks' common start to the later end; they read one clock."""
    dist.barrier(group=world.control)
    start = time.perf_counter()
    run.step()
    end = time.perf_counter()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (start, end), group=world.control)
    return max(e for _, e in both) - max(s for s, _ in both)


def contest(world: Any, runs: dict[str, Ready], chosen: str, rounds: int) -> dict[str, list[float]]:
    """Steps in turn, in an order drawn anew each round: all plans, then those near the best, then the best few."""
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def round_of(names: list[str]) -> None:
        draw.shuffle(names)
        for name in names:
            seconds[name].append(timed(world, runs[name]))

    runs[chosen].step()  # windows and buffers as they are after a step
    round_of(list(runs))
    least = min(s[0] for s in seconds.values())
    near = [n for n, s in seconds.items() if s[0] <= NEAR * least or n == chosen]
    for _ in range(2):
        round_of(near)
    last = sorted(near, key=lambda n: median(seconds[n]))[:FINALISTS]
    last = list(dict.fromkeys((*last, chosen)))
    for _ in range(rounds):
        round_of(last)
    return seconds


def closed_form(work: Workload) -> dict[str, int]:
    """Bytes a rank must send in a step: gradients once (2 (n-1)/n for n = 2), or what crosses a cut one way."""
    model, x, _ = work.build()
    whole = 0
    with torch.no_grad():
        chain = work.chain(model) if work.chain is not None else []
        for part in chain[: len(chain) // 2]:
            x = part(x)
            whole = x.numel() * x.element_size()
    return {"data parallel": sum(p.numel() * p.element_size() for p in model.parameters()), "pipeline": whole}


def main(model: str, control: str, rounds: int, settings: list[tuple[float, float]]) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    world = join_world()
    work = WORKLOADS[model]
    cluster = rank_cluster(world, "auto")
    built, x, _ = work.build()
    captured = capture(built, (x,), {})
    hand = {name: ready(work, plan, cluster) for name, plan in by_hand(work).items()}
    for run in hand.values():
        run.step()
    sent = {name: bytes_sent(world, run) for name, run in hand.items()}
    for bits, latency in settings:
        if world.rank == 0:
            shape(control, bits, latency)
        dist.barrier(group=world.control)
        cluster = rank_cluster(world, "auto")
        answer = ready(work, None, cluster)
        name = next((n for n, run in hand.items() if same(captured.graph, run.plan, answer.plan)), "chosen")
        runs = {**hand, name: hand.get(name, answer)}
        seconds = contest(world, runs, name, rounds)
        said: dict[str, float] = {}
        if world.rank == 0:
            measured = kept_timings(captured, cluster)
            said = {
                n: predict(captured.graph, replace(r.plan, predicted=None), cluster, measured=measured).step_seconds
                for n, r in runs.items()
            }
        link = cluster.links[0]
        row = {
            "bits": bits, "latency": latency, "found": (8 * link.bandwidth, link.latency_seconds),
            "chosen": words(answer.plan), "as": name, "seconds": seconds, "predicted": said, "sent": sent,
            "expected": closed_form(work),
        }  # fmt: skip
        if world.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    shapes = [tuple(map(float, text.split(","))) for text in sys.argv[4:]]
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), shapes)  # type: ignore[arg-type]
