"""Predicted and measured time and memory of many plans of each model, and whether the planner chose the fastest."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import nn

if __package__ in (None, ""):  # run as a file: python benchmarks/prediction/run.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import partita
from benchmarks.models import WORKLOADS, Workload, cross_entropy
from partita.capture import Captured, capture
from partita.cluster import Cluster
from partita.manual import plan_from_cuts
from partita.measure import local_cluster, measure_call
from partita.plan import Batch, Plan, Stage
from partita.predict import predict
from partita.runtime import worker
from partita.runtime.memory import measure_memory
from partita.trace import Trace
from partita.units import format_bytes

MODELS = "gpt10m,gpt30m,vit,mlp,resnet"
CHOSEN = "chosen by the planner"


@dataclass
class Row:
    """One plan of one model. Seconds a step; bytes per device."""

    model: str
    name: str
    predicted: float
    seconds: list[float] = field(default_factory=list)
    memory_predicted: dict[str, int] = field(default_factory=dict)
    memory_measured: dict[str, int] = field(default_factory=dict)

    def measured(self, best: bool) -> float:
        return min(self.seconds) if best else median(self.seconds)

    def error(self, best: bool) -> float:
        return self.predicted / self.measured(best) - 1.0

    @property
    def memory_errors(self) -> list[float]:
        return [self.memory_predicted[d] / n - 1.0 for d, n in self.memory_measured.items() if n]


def families(work: Workload, model: nn.Module, captured: Captured, *, few: bool) -> dict[str, Plan]:
    """Plans a person could pick: one device, replicas, pipelines at the middle cut and beside it, recomputation."""
    graph, devices = captured.graph, ("cpu:0", "cpu:1")
    names = work.names(model)
    everything = tuple(n for group in names for n in group)
    batch = max(graph.batch, 1)

    def whole(count: int, microbatches: int) -> Plan:
        stage = Stage(devices[:count], modules=everything)
        return Plan((stage,), devices=devices[:count], batch=Batch(batch, microbatches))

    plans = {"one device": whole(1, 1), "2 replicas, 2 microbatches": whole(2, 2)}
    counts = (1,) if work.couples_batch else (1, 4) if few else (1, 4, 8)
    if not work.couples_batch:
        plans["2 replicas, 4 microbatches"] = whole(2, 4)
    middle = len(names) // 2
    for cut in (middle,) if few else (middle - 1, middle, middle + 1):
        for m in counts:
            for schedule in ("1f1b", "zero_bubble") if m > 1 else ("1f1b",):
                plans[f"cut at {names[cut][0]}, {m} x {schedule}"] = plan_from_cuts(
                    graph, names[cut][:1], devices, batch=batch, microbatches=m, schedule=schedule
                )
    if not work.couples_batch:
        base = plan_from_cuts(graph, names[middle][:1], devices, batch=batch, microbatches=4, schedule="1f1b")
        first = Stage(base.stages[0].devices, base.stages[0].modules, base.stages[0].ops, recompute=names[1])
        plans["recomputing one part, 4 x 1f1b"] = Plan(
            (first, *base.stages[1:]), devices=base.devices, batch=base.batch, schedule=base.schedule
        )
    return plans


def study(
    name: str, rounds: int, cluster: Cluster, progress: Progress, *, few: bool, cpu: bool
) -> tuple[list[Row], str]:
    """Every plan of one model: predicted first, then measured in turn. Also the planner's plan in words."""
    work = WORKLOADS[name]
    model, x, target = work.build()

    def step(*args: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(args[0]), args[1])

    captured = capture(model, (x, target), {}, forward=step)
    measured = measure_call(captured, cluster, model, (x, target))
    plans = families(work, model, capture(model, (x,), {}), few=few)
    own = partita.parallelize(model, (x,), devices=cluster, loss_fn=cross_entropy)
    plans[CHOSEN] = own.plan
    own.close()
    rows, running = [], []
    task = progress.add_task(f"{name}: setting up", total=len(plans) * (rounds + 1))
    for title, plan in plans.items():
        trace = predict(captured.graph, plan, cluster, optimizer="none", measured=measured)
        row = Row(name, title, busiest(trace) if cpu else trace.step_seconds, memory_predicted=dict(trace.memory))
        parallel = partita.parallelize(model, (x,), devices=cluster, plan=plan, loss_fn=cross_entropy)
        timed(model, parallel, x, target)
        found = measure_memory(parallel, (x, target))
        row.memory_measured = {d: n for d, n in found.items() if d != "caller"}
        rows.append(row)
        running.append(parallel)
        progress.advance(task)
    order = list(range(len(rows)))
    generator = random.Random(0)
    for number in range(rounds):
        generator.shuffle(order)
        for i in order:
            progress.update(task, description=f"{name}: round {number + 1} of {rounds}", advance=1)
            rows[i].seconds.append((busy if cpu else timed)(model, running[i], x, target))
    for parallel in running:
        parallel.close()
    progress.remove_task(task)
    stages = "; ".join(f"{', '.join((*s.modules, *s.ops))} on {', '.join(s.devices)}" for s in own.plan.stages)
    return rows, f"{own.plan.batch.microbatches} microbatches, {own.plan.schedule}: {stages}"


def busiest(trace: Trace) -> float:
    """Seconds the busiest device computes."""
    return max(trace.busy_seconds(d) for d in {e.device for e in trace.events})


def busy(model: nn.Module, parallel: partita.ParallelModule, x: torch.Tensor, target: torch.Tensor) -> float:
    """The same of a real step, by each worker thread's own CPU clock: what other processes take is not in it."""
    parallel.record = True
    ordinary = worker.perf_counter
    worker.perf_counter = time.thread_time
    try:
        timed(model, parallel, x, target)
    finally:
        worker.perf_counter = ordinary
        parallel.record = False
    assert parallel.trace is not None
    return busiest(parallel.trace)


def timed(model: nn.Module, parallel: partita.ParallelModule, x: torch.Tensor, target: torch.Tensor) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    start = time.perf_counter()
    parallel.train_step(x, target)
    return time.perf_counter() - start


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value at least a share ``q`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


def summary(rows: Sequence[Row], best: bool) -> dict[str, float]:
    times = [abs(r.error(best)) for r in rows]
    memory = [e for r in rows for e in r.memory_errors]
    return {
        "step time: median error": median(times), "step time: 95th percentile": quantile(times, 0.95),
        "memory: median error": median(map(abs, memory)), "memory: largest error": max(map(abs, memory)),
        "memory: furthest under-predicted": -min(0.0, min(memory)),
    }  # fmt: skip


def regret(rows: Sequence[Row], best: bool) -> float:
    """The planner's choice over the fastest of all plans, itself included."""
    chosen = next(r for r in rows if r.name == CHOSEN)
    return chosen.measured(best) / min(r.measured(best) for r in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.prediction", description=__doc__)
    parser.add_argument("--models", default=MODELS, help="of: " + ", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=9, help="steps of each plan, in turn (default 9)")
    parser.add_argument("--few", action="store_true", help="fewer plans of each model")
    parser.add_argument("--best", action="store_true", help="compare the fastest step, not the median: a busy machine")
    parser.add_argument(
        "--cpu", action="store_true", help="the busiest device's CPU seconds instead of the step's time"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse_args(argv)
    models = given.models.split(",")
    for value in models:
        if value not in WORKLOADS:
            parser.error(f"'{value}' is not one of {', '.join(WORKLOADS)}")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console(stderr=given.json, width=None if sys.stdout.isatty() else 140)
    cluster = local_cluster(2)
    everything: list[Row] = []
    regrets: dict[str, float] = {}
    for name in models:
        with Progress(console=console, transient=True) as progress:
            rows, words = study(name, given.rounds, cluster, progress, few=given.few, cpu=given.cpu)
        everything += rows
        regrets[name] = regret(rows, given.best)
        if given.json:
            continue
        shown = Table(title=f"{name}: planner's choice {words}", title_justify="left")
        for column in ("plan", "predicted", "measured", "error", "memory predicted", "measured", "error"):
            shown.add_column(column, justify="left" if column == "plan" else "right")
        for row in rows:
            shown.add_row(
                row.name, f"{row.predicted * 1e3:.1f} ms", f"{row.measured(given.best) * 1e3:.1f} ms",
                f"{row.error(given.best):+.1%}",
                " ".join(format_bytes(n) for n in row.memory_predicted.values()),
                " ".join(format_bytes(n) for n in row.memory_measured.values()),
                " ".join(f"{e:+.1%}" for e in row.memory_errors),
            )  # fmt: skip
        console.print(shown)
    found = summary(everything, given.best)
    if given.json:
        plans = [
            {"model": r.model, "plan": r.name, "predicted_seconds": r.predicted, "seconds": r.seconds,
             "memory_predicted": r.memory_predicted, "memory_measured": r.memory_measured}
            for r in everything
        ]  # fmt: skip
        print(json.dumps({"plans": plans, "errors": found, "regret": regrets}, indent=1))
        return 0
    for key, value in found.items():
        console.print(f"{key}: {value:.1%}", highlight=False)
    for name, value in regrets.items():
        console.print(f"{name}: the planner's choice takes {value:.3f} of the fastest plan's time", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
