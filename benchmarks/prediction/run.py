"""Predicted and measured time and memory of many plans of each model: quantiles of the errors, a table, a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.devices import DEVICES, cluster_of, skipped
from benchmarks.models import WORKLOADS
from benchmarks.prediction.page import page
from benchmarks.prediction.study import Row, study
from partita.units import format_bytes

MODELS = "gpt10m,gpt30m,vit,mlp,resnet,speech"


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value at least a share ``q`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


def summary(rows: Sequence[Row], best: bool) -> dict[str, float]:
    """Errors as shares, over all plans and devices; times of transfers in seconds."""
    times = [abs(r.error(best)) for r in rows]
    stages = [abs(e) for r in rows for e in r.stage_errors()]
    bubbles = [abs(e) for r in rows for e in r.bubble_errors()]
    found = {
        "step time: median error": median(times), "step time: 95th percentile": quantile(times, 0.95),
        "step time: largest error": max(times),
        "stages' forward and backward: median error": median(stages),
        "stages' forward and backward: 95th percentile": quantile(stages, 0.95),
        "idle share: median difference": median(bubbles), "idle share: 95th percentile": quantile(bubbles, 0.95),
        **memory_summary(rows),
    }  # fmt: skip
    if any(r.again for r in rows):
        found["drift of the machine's speed since the first timings: median"] = median(abs(r.drift()) for r in rows)
    both = [r.transfers() for r in rows]
    predicted, measured = ([s for pair in both for s in pair[i]] for i in (0, 1))
    if predicted and measured:
        found["transfer: predicted, median seconds"] = median(predicted)
        found["transfer: measured, median seconds"] = median(measured)
    return found


def memory_summary(rows: Sequence[Row]) -> dict[str, float]:
    """Errors of peaks as shares, over all plans and devices."""
    memory = [e for r in rows for e in r.memory_errors]
    return {
        "memory: median error": median(map(abs, memory)),
        "memory: 95th percentile": quantile([abs(e) for e in memory], 0.95),
        "memory: largest error": max(map(abs, memory)), "memory: furthest under-predicted": -min(0.0, min(memory)),
    }  # fmt: skip


def memory_line(row: Row) -> str:
    peaks = (
        f"{d} {format_bytes(row.memory_predicted[d])} for {format_bytes(n)} ({e:+.1%})"
        for (d, n), e in zip(((d, n) for d, n in row.memory_measured.items() if n), row.memory_errors, strict=True)
    )
    return f"{row.name}: {', '.join(peaks)}"


def shown(key: str, value: float) -> str:
    return f"{value * 1e6:.0f} µs" if key.startswith("transfer") else f"{value:.1%}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.prediction", description=__doc__)
    parser.add_argument("--models", default=MODELS, help="of: " + ", ".join(WORKLOADS))
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="two CPU devices, or one device and its host")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each plan, in turn (default 7)")
    parser.add_argument("--few", action="store_true", help="fewer plans of each model")
    parser.add_argument("--best", action="store_true", help="compare the fastest step, not the median: a busy machine")
    parser.add_argument(
        "--cpu", action="store_true", help="the busiest device's CPU seconds instead of the step's time"
    )
    parser.add_argument(
        "--retime", action="store_true", help="time the parts in every round too: a machine whose speed drifts"
    )
    parser.add_argument("--memory", action="store_true", help="bytes alone: no seconds, so no quiet machine is needed")
    parser.add_argument("--page", help="HTML page to write: the scatter, and timelines predicted above measured")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse_args(argv)
    models = given.models.split(",")
    for value in models:
        if value not in WORKLOADS:
            parser.error(f"'{value}' is not one of {', '.join(WORKLOADS)}")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if given.retime and (given.best or given.cpu or given.memory):
        parser.error("--retime goes with medians of the wall clock alone")
    if given.memory and (given.page or given.json):
        parser.error("--memory prints a table only")
    if skipped(given.device, "benchmarks.prediction"):
        return 0
    console = Console(stderr=given.json, width=None if sys.stdout.isatty() else 140)
    cluster = cluster_of(given.device)
    everything: list[Row] = []
    for name in models:
        with Progress(console=console, transient=True) as progress:
            rounds = 0 if given.memory else given.rounds
            rows, words, failed = study(
                name, rounds, cluster, progress, few=given.few, cpu=given.cpu, retime=given.retime
            )
        everything += rows
        if given.memory:
            for row in rows:
                console.print(f"{name}  {memory_line(row)}", highlight=False, markup=False, soft_wrap=True)
        elif not given.json:
            console.print(table(f"{name}: planner's choice {words}", rows, given.best))
            for title, reason in failed.items():
                console.print(f"left out: {title}: {reason}", highlight=False, markup=False)
    found = memory_summary(everything) if given.memory else summary(everything, given.best)
    if given.page:
        words = {key: shown(key, value) for key, value in found.items()}
        Path(given.page).write_text(page(everything, words), encoding="utf-8")
    if given.json:
        plans = [
            {"model": r.model, "plan": r.name, "predicted_seconds": r.predicted, "seconds": r.seconds,
             "memory_predicted": r.memory_predicted, "memory_measured": r.memory_measured}
            for r in everything
        ]  # fmt: skip
        print(json.dumps({"plans": plans, "errors": found}, indent=1))
        return 0
    console.print(f"{len(everything)} plans of {len(models)} models", highlight=False)
    for key, value in found.items():
        console.print(f"{key}: {shown(key, value)}", highlight=False)
    return 0


def table(title: str, rows: Sequence[Row], best: bool) -> Table:
    made = Table(title=title, title_justify="left")
    for column in ("plan", "predicted", "measured", "error", "memory predicted", "measured", "error"):
        made.add_column(column, justify="left" if column == "plan" else "right")
    for row in rows:
        made.add_row(
            row.name, f"{row.predicted * 1e3:.1f} ms", f"{row.measured(best) * 1e3:.1f} ms", f"{row.error(best):+.1%}",
            " ".join(format_bytes(n) for n in row.memory_predicted.values()),
            " ".join(format_bytes(n) for n in row.memory_measured.values()),
            " ".join(f"{e:+.1%}" for e in row.memory_errors),
        )  # fmt: skip
    return made


if __name__ == "__main__":
    raise SystemExit(main())
