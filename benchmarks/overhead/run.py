"""What partita adds to the work itself: on one device, per instruction, when it records, at import and first use."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import partita
from benchmarks.models import WORKLOADS, cross_entropy
from partita.measure import local_cluster
from partita.program import Instruction
from partita.runtime.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("device", "instruction", "recording", "import", "first")
MICROBATCHES = 64
Step = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``, at most ``bar`` wanted (None: told for information)."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{self.value:+.2%}"
        return f"{self.value * 1e6:.1f} µs" if self.unit == "µs" else f"{self.value:.2f} s"

    @property
    def limit(self) -> str:
        if self.bar is None:
            return ""
        shown = {"%": f"{self.bar:.0%}", "µs": f"{self.bar * 1e6:.0f} µs"}.get(self.unit, f"{self.bar:g} s")
        return f"{shown}: {'met' if self.value <= self.bar else 'missed'}"


def in_turn(steps: Mapping[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of the whole process) of each step, one after the other in every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for number in range(rounds):
        for name in list(steps) if number % 2 else reversed(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def excess(times: Mapping[str, list[tuple[float, float]]], over: str, name: str, which: int) -> float:
    """How much longer ``name`` takes than ``over``: the median over rounds of their ratio, less 1."""
    pairs = zip(times[name], times[over], strict=True)
    return median(mine[which] / plain[which] for mine, plain in pairs) - 1.0


def device(models: list[str], rounds: int) -> list[Figure]:
    """A model on one core, through partita and plain."""
    found = []
    core = local_cluster(2).devices[:1]
    cluster = partita.Cluster(core, ())
    for name in models:
        model, x, target = WORKLOADS[name].build()
        parameters = list(model.parameters())
        parallel = partita.parallelize(model, (x,), devices=cluster, loss_fn=cross_entropy)

        def clear(parameters: list[nn.Parameter] = parameters) -> None:
            for parameter in parameters:
                parameter.grad = None

        def call(module: nn.Module, x: torch.Tensor = x, target: torch.Tensor = target) -> None:
            clear()
            cross_entropy(module(x), target).backward()

        def step(module: partita.ParallelModule = parallel, x: torch.Tensor = x, target: torch.Tensor = target) -> None:
            clear()
            module.train_step(x, target)

        with closing(parallel):
            steps: dict[str, Step] = {
                "plain": lambda: call(model), "step": step, "call": lambda: call(parallel)  # noqa: B023
            }  # fmt: skip
            times = in_turn(steps, rounds)
        for what, words in (("step", "train_step"), ("call", "pm(x) + backward")):
            wall, cpu = (excess(times, "plain", what, i) for i in (0, 1))
            found.append(Figure(f"one device, {name}, {words}", cpu, "%", 0.02, f"wall clock {wall:+.1%}"))
    return found


class Scale(nn.Module):
    """One multiplication by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def instruction(rounds: int) -> list[Figure]:
    """CPU seconds per instruction of a pipeline whose stages do next to nothing, less what they do."""
    model = nn.Sequential(Scale(), Scale())
    x = torch.ones(MICROBATCHES, 1)
    parallel = partita.split(
        model, (x,), at=["1"], devices=["cpu", "cpu"], microbatches=MICROBATCHES, loss_fn=lambda out, _: out.sum()
    )
    spent: dict[str, tuple[float, int]] = {}
    walk = Worker.walk

    def timed(worker: Worker, instructions: tuple[object, ...]) -> None:
        began = time.thread_time()
        walk(worker, instructions)  # type: ignore[arg-type]
        spent[worker.name] = (time.thread_time() - began, len(instructions))

    figures = []
    with closing(parallel):
        for what in ("train_step", "forward"):
            counts = []
            for _ in range(rounds + 2):
                Worker.walk = timed  # type: ignore[method-assign, assignment]
                try:
                    if what == "train_step":
                        parallel.train_step(x, x)
                    else:
                        with torch.no_grad():
                            parallel(x)
                finally:
                    Worker.walk = walk  # type: ignore[method-assign]
                counts.append(dict(spent))
            rows = counts[2:]
            bare = _bare(x, rounds, train=what == "train_step")
            costs = {
                d: median(r[d][0] for r in rows) / rows[0][d][1] - bare * MICROBATCHES / rows[0][d][1] for d in rows[0]
            }
            worst = max(costs, key=costs.__getitem__)
            note = f"{rows[0][worst][1]} instructions on {worst}; the ops themselves {bare * 1e6:.0f} µs a microbatch"
            figures.append(Figure(f"instruction, {what}", costs[worst], "µs", 30e-6, note))
    return figures


def _bare(x: torch.Tensor, rounds: int, *, train: bool) -> float:
    """CPU seconds of one microbatch of one stage, without partita."""
    weight = torch.ones((), requires_grad=True)
    part = x[:1]
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(MICROBATCHES):
            if train:
                leaf = part.detach().requires_grad_()
                out = leaf * weight
                torch.autograd.backward([out], [part])
            else:
                with torch.no_grad():
                    part * weight
        times.append((time.thread_time() - began) / MICROBATCHES)
    return median(times)


def recording(rounds: int) -> list[Figure]:
    """CPU seconds that workers spend on noting events, as a share of the step's."""
    model, x, target = WORKLOADS["gpt10m"].build()
    parallel = partita.parallelize(
        model, (x,), devices=["cpu", "cpu"], loss_fn=cross_entropy,
        constraints={"replicas": False, "microbatches": 8, "schedule": "1f1b"},
    )  # fmt: skip
    spent: list[float] = []
    record = Worker.record

    def timed(worker: Worker, instruction: Instruction, start: float) -> None:
        began = time.thread_time()
        record(worker, instruction, start)
        spent.append(time.thread_time() - began)

    shares = []
    Worker.record = timed  # type: ignore[method-assign]
    try:
        with closing(parallel), parallel.tracing():
            for _ in range(rounds):
                parallel.zero_grad(set_to_none=True)
                spent.clear()
                began = time.process_time()
                parallel.train_step(x, target)
                shares.append(sum(spent) / (time.process_time() - began))
    finally:
        Worker.record = record  # type: ignore[method-assign]
    note = f"{len(spent)} events a step, {sum(spent) / len(spent) * 1e6:.1f} µs each with the clock that times them"
    return [Figure("recording a trace", median(shares), "%", 0.01, note)]


def _as_installed() -> dict[str, str]:
    """The environment of a process for which partita's bytecode is kept, as an installer leaves it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def importing() -> list[Figure]:
    """Seconds that ``import partita`` adds to ``import torch``: the least of five processes."""
    code = (
        "import torch, time; a = time.perf_counter(); import partita; b = time.perf_counter(); "
        "import partita.api; print(b - a, time.perf_counter() - a)"
    )
    rows = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_as_installed()
        ).stdout.split()
        for _ in range(6)
    ][1:]
    names, everything = (min(float(row[i]) for row in rows) for i in (0, 1))
    return [
        Figure("import partita", names, "s", 0.3, "beyond import torch"),
        Figure("import partita.api", everything, "s", None, "what the first use of parallelize loads"),
    ]


def first(model: str = "gpt30m") -> list[Figure]:
    """From ``parallelize``, with what it imports, to the end of the first step: no timings kept on disk, and with them.

    Partita is in bytecode, as an installer leaves it: the first import of a checkout compiles.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**_as_installed(), "PARTITA_CACHE": folder}
        subprocess.run(
            [sys.executable, "-c", "import benchmarks.overhead.first_use, partita.api"], check=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip
        for words in ("nothing measured before", "timings kept on disk"):
            answer = subprocess.run(
                [sys.executable, "-m", "benchmarks.overhead.first_use", model], capture_output=True, text=True,
                check=True, env=environment, cwd=ROOT,
            ).stdout  # fmt: skip
            row = json.loads(answer.splitlines()[-1])
            total = row["import"] + row["parallelize"] + row["step"]
            note = (
                f"what it imports {row['import']:.1f} s, parallelize {row['parallelize']:.1f} s, first step "
                f"{row['step']:.1f} s; CPU {row['cpu']:.1f} s"
            )
            found.append(Figure(f"first use of {model}, {words}", total, "s", 10.0, note))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="of: " + ", ".join(PARTS))
    parser.add_argument("--models", default="gpt10m,resnet,mlp", help="for one device; of: " + ", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=11, help="steps of each kind, in turn (default 11)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args(argv)
    asked, models = given.only.split(","), given.models.split(",")
    for value, known in [*((a, PARTS) for a in asked), *((m, tuple(WORKLOADS)) for m in models)]:
        if value not in known:
            parser.error(f"'{value}' is not one of {', '.join(known)}")
    torch.set_num_threads(1)
    run: dict[str, Callable[[], list[Figure]]] = {
        "device": lambda: device(models, given.rounds), "instruction": lambda: instruction(given.rounds),
        "recording": lambda: recording(given.rounds), "import": importing, "first": first,
    }  # fmt: skip
    figures = [figure for name in asked for figure in run[name]()]
    if given.json:
        print(json.dumps([asdict(f) for f in figures], indent=1))
        return 0
    table = Table()
    for column in ("what", "measured", "bar", "about"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for figure in figures:
        table.add_row(figure.name, str(figure), figure.limit, figure.note)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
