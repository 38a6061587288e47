"""Scale: large models planned for large and odd clusters from captured meta models, with time and memory.

    python -m benchmarks.planner.scale             the cases, then growth with layers and with devices
    python -m benchmarks.planner.scale --cases     the cases only
    python -m benchmarks.planner.scale --growth -o growth.svg     growth only, drawn (--rows FILE: goes on from there)

Every line runs in a process of its own: ``peak`` is that process's largest resident memory, imports included (torch
alone takes about 0.25 GiB). ``capture`` includes making the model; ``plan`` everything from the captured graph to the
finished Plan in the model's names, with its reasons. Both by the wall and, in brackets, in seconds of the process: one
thread, so the two agree where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.planner.plot import Line, Panel, svg
from partita.capture import capture
from partita.cluster import Cluster
from partita.models import GPTSize, make
from partita.models.catalog import build
from partita.planners.large.explain import spell
from partita.planners.large.result import plan_large
from partita.units import format_seconds


@dataclass(frozen=True, slots=True)
class Case:
    """``model``: a name, or layers of a GPT of hidden size 4096. ``batch``: samples a step, of ``length`` tokens."""

    model: str | int
    cluster: str
    batch: int
    length: int


CASES = (
    Case("llama-405b", "2048x8xH100", 2048, 8192),
    Case("gpt-39b", "8x8xV100-16GB", 1024, 1024),
    Case("gpt3-13b", "32x8xA100-40GB + 32x8xV100-16GB", 2048, 2048),
    Case("gpt3-6.7b", "8xA100-80GB + 2x8xV100-16GB", 256, 2048),
    Case(1000, "64x8xH100", 1024, 2048),
    Case("gpt2-xl", "6xA100-40GB", 64, 1024),
    Case("gpt2-xl", "7xA100-40GB", 64, 1024),
)
LAYERS = tuple(Case(n, "8x8xH100", 256, 2048) for n in (32, 125, 250, 500, 1000))
DEVICES = tuple(Case("gpt3-175b", f"{n}x8xH100", 8 * n, 2048) for n in (8, 32, 128, 512, 2048))


def _model(case: Case) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    if isinstance(case.model, str):
        return make(case.model, 2, case.length)
    tokens = torch.zeros(2, case.length, dtype=torch.int64, device="meta")
    return build(GPTSize(case.model, 4096, 32)), (tokens, tokens)


def _now() -> tuple[float, float]:
    """Seconds by the wall and of this process."""
    return time.perf_counter(), time.process_time()


def measure(case: Case) -> dict[str, Any]:
    began = _now()
    model, args = _model(case)
    graph = capture(model, args).graph
    captured = _now()
    cluster = Cluster.parse(case.cluster)
    made = plan_large(graph, cluster, batch=case.batch)
    ended = _now()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ops": len(graph.ops),
        "capture": captured[0] - began[0],
        "plan": ended[0] - captured[0],
        "capture_cpu": captured[1] - began[1],
        "plan_cpu": ended[1] - captured[1],
        "devices": len(cluster.devices),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "step": made.layout.seconds,
        "gap": made.found.gap,
        "layout": spell(made.layout.degrees),
        "tflops": made.flops / made.layout.seconds / len(cluster.devices) / 1e12,
    }


def _apart(case: Case) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case,))


def _kept(case: Case, file: Path | None) -> dict[str, Any]:
    """The row of ``file`` for this case, or a new one, which is added there."""
    key = f"{case.model}, {case.cluster}, {case.batch} x {case.length}"
    known = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file and file.is_file() else []
    for row in known:
        if row["case"] == key:
            return dict(row)
    row = {"case": key, "layers": case.model, **_apart(case)}
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    return row


def _line(case: Case, row: dict[str, Any]) -> str:
    name = case.model if isinstance(case.model, str) else f"gpt, {case.model} layers"
    return (
        f"{name:17s}  {row['parameters'] / 1e9:6.1f}  {row['devices']:6d}  {row['ops']:6d}  "
        f"{row['capture']:6.1f} ({row['capture_cpu']:4.1f}) s  {row['plan']:5.1f} ({row['plan_cpu']:3.1f}) s  "
        f"{row['peak'] / 2**30:4.2f} GiB  {format_seconds(row['step']):>8s}  {row['tflops']:5.0f}  "
        f"{100 * row['gap']:4.1f} %"
    )


HEADER = "model              billion  devices   ops   capture (cpu)     plan (cpu)      peak      step  Tflop/s   gap"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="no growth")
    parser.add_argument("--growth", action="store_true", help="growth only")
    parser.add_argument("--rows", type=Path, help="file of growth's rows to go on with")
    parser.add_argument("--out", "-o", type=Path, help="SVG to draw growth into")
    options = parser.parse_args()
    if not options.growth:
        print(HEADER)
    for case in CASES if not options.growth else ():
        row = _apart(case)
        print(
            f"{_line(case, row)}\n    {case.cluster}, batch {case.batch} x {case.length}: {row['layout']}", flush=True
        )
    if options.cases:
        return
    panels = []
    for title, key, cases in (("layers (64 H100)", "layers", LAYERS), ("devices (GPT-3 175B)", "devices", DEVICES)):
        print(f"\ngrowth with {title}\n{HEADER}")
        rows = []
        for case in cases:
            rows.append(_kept(case, options.rows))
            print(f"{_line(case, rows[-1])}  {'#' * round(8 * rows[-1]['plan_cpu'])}", flush=True)
        lines = tuple(
            Line(name, tuple((row[key], row[what]) for row in rows))
            for name, what in (("capture, s", "capture_cpu"), ("plan, s", "plan_cpu"), ("memory, GiB", "peak_gib"))
        )
        panels.append(Panel(f"growth with {title}", key, "seconds of the process, GiB", lines))
    if options.out is not None:
        options.out.write_text(svg(panels), encoding="utf-8")


if __name__ == "__main__":
    main()
