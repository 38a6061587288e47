"""Every plan a person could pick, measured, against the planner's pick, in many settings."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import partita
from benchmarks.devices import DEVICES, cluster_of, skipped
from benchmarks.models import WORKLOADS, as_args, cross_entropy
from benchmarks.prediction.study import CHOSEN, Setting, describe
from partita.assign import assign
from partita.cluster import Cluster
from partita.errors import PartitaError
from partita.plan import Plan
from partita.predict import predict
from partita.runtime.memory import measure_memory
from partita.units import parse_bytes

SETTINGS = (
    "gpt10m", "gpt10m/4", "gpt10m/16/150MiB", "gpt30m", "gpt30m/4", "gpt30m/16/330MiB", "vit", "vit/4",
    "vit/16/220MiB", "mlp", "mlp/64", "resnet", "resnet/8", "speech", "speech/2",
)  # fmt: skip
"""model[/batch[/memory of each device, or per cent of what a device alone would need]]"""
ON_GPU = ("gpt125m/8/80%", "gpt125m/8/60%", "gpt125m/8/40%", "gpt30m/64/50%", "vit/64/60%", "resnet/64/60%")
"""Of one GPU: limits below the model's need."""

FIRST_ROUNDS = 3
STILL = 1.25


@dataclass
class Outcome:
    """One setting. ``plans``: tried and within memory. ``confirmed``: chosen over best, run again in turn."""

    setting: str
    plans: int
    chosen: str
    best: str
    first: float
    confirmed: float
    chosen_seconds: float
    best_seconds: float
    left_out: dict[str, str] = field(default_factory=dict)


def words_of(setting: str) -> tuple[str, int, str]:
    """(model, samples, memory of each device; '' for what there is)."""
    name, _, rest = setting.partition("/")
    batch, _, memory = rest.partition("/")
    return name, int(batch or 0), memory


def limit_of(memory: str, setting: Setting, cluster: Cluster, plan: Plan) -> int:
    """Bytes of each device; 0 for what there is. ``plan``: the one that per cent are of, on one device."""
    if not memory.endswith("%"):
        return parse_bytes(memory) if memory else 0
    graph = setting.captured.graph
    need = max(n for _, n in predict(graph, plan, cluster, optimizer="none", measured=setting.measured).memory)
    return int(need * float(memory[:-1]) / 100)


def study(name: str, rounds: int, ample: Cluster, progress: Progress) -> Outcome:
    """One setting: all plans a few times, the better ones on, the best against the chosen once more."""
    model, batch, words = words_of(name)
    setting = Setting.make(model, ample, batch=batch)
    grid: dict[str, Plan] = setting.plans(ample)
    memory = limit_of(words, setting, ample, next(iter(grid.values())))
    parallel = partita.parallelize(
        setting.model, setting.x, devices=ample, memory=memory or None, loss_fn=cross_entropy, optimizer="none"
    )  # fmt: skip
    running = {CHOSEN: parallel}
    chosen, own = describe(parallel.plan), kernel(parallel.plan, setting)
    outside: dict[str, str] = {}
    task = progress.add_task(f"{name}: setting up", total=len(grid) + 1)
    for title, plan in grid.items():
        progress.update(task, advance=1)
        if kernel(plan, setting) == own:  # the chosen plan in other words
            continue
        try:
            tried = setting.run(ample, plan)
            setting.step(tried)
            peaks = measure_memory(tried, (*as_args(setting.x), setting.target)) if memory else {}
        except PartitaError as error:
            outside[title] = str(error).splitlines()[0][:160]
            continue
        if any(n > memory for device, n in peaks.items() if device != "caller" and not device.startswith("host")):
            outside[title] = "takes more memory than there is"
            tried.close()
            continue
        running[title] = tried
    for parallel in running.values():
        setting.step(parallel)
    times: dict[str, list[float]] = {title: [] for title in running}
    alive = list(running)
    for number in range(rounds):
        progress.update(task, description=f"{name}: {len(alive)} plans, round {number + 1} of {rounds}")
        turn(setting, running, alive, times, random.Random(number))
        if number + 1 >= FIRST_ROUNDS:
            least = min(median(times[t]) for t in alive)
            alive = [t for t in alive if t == CHOSEN or median(times[t]) <= STILL * least]
    best = min(alive, key=lambda t: median(times[t]))
    first = median(times[CHOSEN]) / median(times[best])
    again: dict[str, list[float]] = {CHOSEN: [], best: []}
    progress.update(task, description=f"{name}: the best against the chosen")
    for number in range(rounds if best != CHOSEN else 0):
        turn(setting, running, list(again), again, random.Random(number))
    confirmed = median(a / b for a, b in zip(again[CHOSEN], again[best], strict=True)) if again[best] else 1.0
    for parallel in running.values():
        parallel.close()
    progress.remove_task(task)
    best_seconds = median(again[best] or times[best])
    return Outcome(
        name, len(running), chosen, best, first, max(confirmed, 1.0), median(again[CHOSEN] or times[CHOSEN]),
        best_seconds, outside,
    )  # fmt: skip


def kernel(plan: Plan, setting: Setting) -> tuple[object, ...]:
    """What of a plan decides how it runs: which ops where, how often, in which order."""
    stage_of = assign(plan, setting.captured.graph)
    stages = tuple((s.devices, s.tensor, s.recompute, s.offload) for s in plan.stages)
    order = plan.schedule if len(plan.stages) > 1 else ""
    return tuple(sorted(stage_of.items())), stages, plan.batch.microbatches, order


def turn(
    setting: Setting,
    running: dict[str, partita.ParallelModule],
    names: Sequence[str],
    times: dict[str, list[float]],
    generator: random.Random,
) -> None:
    """A step of each plan, in random order."""
    for title in generator.sample(list(names), len(names)):
        times[title].append(setting.step(running[title]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.regret", description=__doc__)
    parser.add_argument("--only", default="", help="settings: model[/batch[/memory]], of any kind")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="two CPU devices, or one device and its host")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each plan that is not dropped (default 9)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args(argv)
    settings = given.only.split(",") if given.only else ON_GPU if given.device == "cuda" else SETTINGS
    for setting in settings:
        if setting.partition("/")[0] not in WORKLOADS:
            parser.error(f"'{setting}' names no model of {', '.join(WORKLOADS)}")
    if given.rounds < FIRST_ROUNDS:
        parser.error(f"--rounds must be at least {FIRST_ROUNDS}")
    if skipped(given.device, "benchmarks.regret"):
        return 0
    console = Console(stderr=given.json, width=None if sys.stdout.isatty() else 150)
    ample, outcomes = cluster_of(given.device), []
    for setting in settings:
        with Progress(console=console, transient=True) as progress:
            outcomes.append(study(setting, given.rounds, ample, progress))
        found = outcomes[-1]
        console.print(
            f"{setting}: regret {found.confirmed:.3f} (first {found.first:.3f}); {found.plans} plans; chosen "
            f"{found.chosen_seconds * 1e3:.0f} ms [{found.chosen}]; best {found.best_seconds * 1e3:.0f} ms "
            f"[{found.best}]",
            highlight=False, markup=False,
        )  # fmt: skip
    if given.json:
        print(json.dumps([asdict(o) for o in outcomes], indent=1))
        return 0
    table = Table()
    for column in ("setting", "plans", "chosen", "best", "first", "confirmed"):
        table.add_column(column, justify="left" if column in ("setting", "chosen", "best") else "right")
    for o in outcomes:
        table.add_row(o.setting, str(o.plans), o.chosen, o.best, f"{o.first:.3f}", f"{o.confirmed:.3f}")
    console.print(table)
    regrets = [o.confirmed for o in outcomes]
    console.print(f"{len(regrets)} settings: regret median {median(regrets):.3f}, worst {max(regrets):.3f}")
    for o in outcomes:
        for title, reason in o.left_out.items():
            if "memory" not in reason:
                console.print(f"{o.setting}: left out {title}: {reason}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
