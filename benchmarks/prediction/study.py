"""One model: plans predicted, then run in turn; what was predicted beside what was measured."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

import partita
from benchmarks.devices import finish
from benchmarks.models import WORKLOADS, as_args, cross_entropy
from benchmarks.prediction.plans import beside_host, families
from partita.capture import Captured, capture
from partita.cluster import Cluster
from partita.cost.measured import Measured
from partita.errors import PartitaError
from partita.measure import measure_call
from partita.plan import Plan
from partita.predict import predict
from partita.runtime import worker
from partita.runtime.memory import measure_memory
from partita.runtime.module import ParallelModule
from partita.trace import Event, Trace

CHOSEN = "chosen by the planner"


@dataclass
class Row:
    """One plan of one model. Seconds a step; bytes per device. ``traces``: measured, one a round. ``again``: what was
    predicted in each round by timings taken then."""

    model: str
    name: str
    trace: Trace
    predicted: float
    seconds: list[float] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    memory_predicted: dict[str, int] = field(default_factory=dict)
    memory_measured: dict[str, int] = field(default_factory=dict)

    def measured(self, best: bool) -> float:
        return min(self.seconds) if best else median(self.seconds)

    def error(self, best: bool) -> float:
        if self.again:
            return median(p / s for p, s in zip(self.again, self.seconds, strict=True)) - 1.0
        return self.predicted / self.measured(best) - 1.0

    def drift(self) -> float:
        """What timings taken in the rounds would have predicted, over what was predicted before them, less 1."""
        return median(self.again) / self.predicted - 1.0 if self.again else 0.0

    @property
    def memory_errors(self) -> list[float]:
        return [self.memory_predicted[d] / n - 1.0 for d, n in self.memory_measured.items() if n]

    def typical(self) -> Trace:
        """The measured trace of the middle round."""
        order = sorted(range(len(self.traces)), key=lambda i: self.seconds[i])
        return self.traces[order[len(order) // 2]]

    def stage_errors(self) -> list[float]:
        """Of F, B and W of each segment: predicted over measured seconds a step, less 1; small ones left out."""
        before = _by_stage(self.trace)
        after: dict[tuple[str, int, str], list[float]] = {}
        for trace in self.traces:
            for key, seconds in _by_stage(trace).items():
                after.setdefault(key, []).append(seconds)
        least = 0.02 * self.measured(False)
        return [
            before[key] / median(values) - 1.0
            for key, values in after.items()
            if key in before and median(values) > least
        ]

    def bubble_errors(self) -> list[float]:
        """Of each device: predicted less measured idle share."""
        devices = dict.fromkeys(e.device for e in self.trace.events)
        return [self.trace.bubble(d) - median(t.bubble(d) for t in self.traces) for d in devices]

    def transfers(self) -> tuple[list[float], list[float]]:
        """(predicted, measured) seconds from the end of a send to the end of its receive, where the receiver waited."""
        predicted = [e.end - e.start for e in self.trace.events if e.kind == "SEND"]
        return predicted, [s for trace in self.traces for s in _handovers(trace.events)]


def _by_stage(trace: Trace) -> dict[tuple[str, int, str], float]:
    """Seconds a step by (device, segment, F or BW): a step without W makes the weight gradients in B."""
    found: dict[tuple[str, int, str], float] = {}
    for e in trace.events:
        if e.kind in ("F", "B", "W"):
            key = (e.device, e.segment, "F" if e.kind == "F" else "BW")
            found[key] = found.get(key, 0.0) + e.end - e.start
    return found


def _handovers(events: Sequence[Event]) -> list[float]:
    sent = {_message(e): e.end for e in events if e.kind == "SEND"}
    received = [e for e in events if e.kind == "RECV" and _message(e) in sent]
    return [e.end - sent[_message(e)] for e in received if e.start < sent[_message(e)]]


def _message(event: Event) -> tuple[int, int, str]:
    return event.segment, event.microbatch, event.name.split()[0].lstrip("<>")


@dataclass(frozen=True)
class Setting:
    """A model ready to be divided: ``measured``: timings of its parts with its loss."""

    name: str
    model: nn.Module
    x: Any
    target: torch.Tensor
    captured: Captured
    measured: Measured | None

    @staticmethod
    def make(name: str, cluster: Cluster, *, batch: int = 0, timed: bool = True) -> Setting:
        """``batch``: samples, where not the workload's own number. ``timed``: its parts are measured."""
        model, x, target = WORKLOADS[name].build()
        if batch:
            x, target = tuple(t[:batch] for t in as_args(x)), target[:batch]
        args = as_args(x)

        def step(*given: torch.Tensor) -> torch.Tensor:
            return cross_entropy(model(*given[:-1]), given[-1])

        captured = capture(model, (*args, target), {}, forward=step)
        setting = Setting(name, model, args, target, captured, None)
        return replace(setting, measured=setting.timings(cluster)) if timed else setting

    def timings(self, cluster: Cluster, *, again: bool = False) -> Measured | None:
        """Of the parts with their loss. ``again``: taken now, whatever is kept."""
        return measure_call(self.captured, cluster, self.model, (*self.x, self.target), again=again)

    def plans(self, cluster: Cluster, *, few: bool = False) -> dict[str, Plan]:
        """What a person could pick: for two devices, or for one beside its host."""
        work, graph = WORKLOADS[self.name], capture(self.model, self.x, {}).graph
        names = [tuple(group) for group in work.names(self.model)]
        if len(cluster.devices) == 1:
            return beside_host(work, names, graph, cluster.devices[0].name, few=few)
        first, second = (d.name for d in cluster.devices[:2])
        return families(work, names, graph, (first, second), few=few)

    def run(self, cluster: Cluster, plan: Plan | None) -> partita.ParallelModule:
        """Divided by this plan, or the planner's."""
        if plan is None:
            return partita.parallelize(self.model, self.x, devices=cluster, loss_fn=cross_entropy)
        return ParallelModule(self.model, plan, cluster, loss_fn=cross_entropy)

    def step(self, parallel: partita.ParallelModule) -> float:
        """Seconds of one training step."""
        for parameter in self.model.parameters():
            parameter.grad = None
        finish()
        start = time.perf_counter()
        parallel.train_step(*self.x, self.target)
        finish()
        return time.perf_counter() - start


def study(
    name: str, rounds: int, cluster: Cluster, progress: Progress, *, few: bool, cpu: bool, retime: bool = False
) -> tuple[list[Row], str, dict[str, str]]:
    """Every plan of one model: predicted first, then measured in turn (``rounds`` 0: its memory alone). Also the
    planner's plan in words, and what could not run. ``retime``: its parts are timed in every round.
    """
    setting = Setting.make(name, cluster, timed=rounds > 0)
    plans: dict[str, Plan | None] = {**setting.plans(cluster, few=few), CHOSEN: None}
    rows, running, failed = [], [], {}
    words = ""
    task = progress.add_task(f"{name}: setting up", total=len(plans) * (rounds + 1))
    for title, plan in plans.items():
        try:
            parallel = setting.run(cluster, plan)
            trace = predict(
                setting.captured.graph, parallel.plan, cluster, optimizer="none", measured=setting.measured
            )  # fmt: skip
            setting.step(parallel)
            found = measure_memory(parallel, (*setting.x, setting.target))
        except PartitaError as error:
            failed[title] = str(error).splitlines()[0]
            continue
        if plan is None:
            words = describe(parallel.plan)
        if not rounds:
            parallel.close()
        row = Row(name, title, trace, busiest(trace) if cpu else trace.step_seconds)
        row.memory_predicted = dict(trace.memory)
        row.memory_measured = {d: n for d, n in found.items() if d in row.memory_predicted}
        rows.append(row)
        running.append(parallel)
        progress.advance(task)
    order = list(range(len(rows)))
    generator = random.Random(0)
    for number in range(rounds):
        generator.shuffle(order)
        if retime:
            progress.update(task, description=f"{name}: timing its parts again")
            now = setting.timings(cluster, again=True)
            for row, parallel in zip(rows, running, strict=True):
                row.again.append(
                    predict(setting.captured.graph, parallel.plan, cluster, optimizer="none", measured=now).step_seconds
                )
        for i in order:
            progress.update(task, description=f"{name}: round {number + 1} of {rounds}", advance=1)
            seconds, trace = recorded(setting, running[i], cpu=cpu)
            rows[i].seconds.append(busiest(trace) if cpu else seconds)
            rows[i].traces.append(trace)
    for parallel in running if rounds else ():
        parallel.close()
    progress.remove_task(task)
    return rows, words, failed


def describe(plan: Plan) -> str:
    """A plan in one line."""
    stages = "; ".join(f"{', '.join((*s.modules, *s.ops))} on {', '.join(s.devices)}" for s in plan.stages)
    return f"{plan.batch.microbatches} microbatches, {plan.schedule}: {stages}"


def busiest(trace: Trace) -> float:
    """Seconds the busiest device computes."""
    return max(trace.busy_seconds(d) for d in {e.device for e in trace.events})


def recorded(setting: Setting, parallel: partita.ParallelModule, *, cpu: bool) -> tuple[float, Trace]:
    """A step's seconds and its trace; with ``cpu`` by each worker thread's own clock: what other processes take is not
    in it."""
    parallel.record = True
    ordinary = worker.perf_counter
    if cpu:
        worker.perf_counter = time.thread_time
    try:
        seconds = setting.step(parallel)
    finally:
        worker.perf_counter = ordinary
        parallel.record = False
    assert parallel.trace is not None
    return seconds, parallel.trace
