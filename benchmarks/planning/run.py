"""How long planning takes: ``python benchmarks/planning/run.py`` prints a table; exit 1 where a plan takes over 2 s.

Capture is not part of it. Three memory limits: ample, tight (another cut or recomputation is needed), none that works.
"""

from __future__ import annotations

import sys
import time

from models import cnn, gpt

from partita.cluster import Cluster, Device, Link
from partita.errors import InfeasibleError
from partita.graph import Graph
from partita.planners.auto import auto
from partita.sharding.batch import layouts
from partita.units import format_bytes, format_seconds

LIMIT_SECONDS = 2.0


def cluster(count: int, memory: float) -> Cluster:
    devices = tuple(Device(f"cuda:{i}", "GPU", int(memory), 6e13, 1.5e12, overhead_seconds=4e-6) for i in range(count))
    return Cluster(devices, (Link("*", "*", 2e11, 5e-6),))


def row(graph: Graph, devices: int, memory: float, optimizer: str = "adamw") -> float:
    found = layouts(graph)
    began = time.perf_counter()
    try:
        plan = auto(graph, found, cluster(devices, memory), optimizer=optimizer)
    except InfeasibleError as error:
        seconds = time.perf_counter() - began
        print(f"{graph.name:18} {len(graph.ops):5} {devices:3} {format_bytes(memory):>8} {seconds:6.2f} s  {error}")
        return 0.0
    seconds = time.perf_counter() - began
    assert plan.predicted is not None
    widths = "+".join(str(len(stage.devices)) for stage in plan.stages)
    again = sum(len(stage.recompute) for stage in plan.stages)
    print(
        f"{graph.name:18} {len(graph.ops):5} {devices:3} {format_bytes(memory):>8} {seconds:6.2f} s  "
        f"{len(plan.stages)} stages on {widths}, {plan.batch.microbatches} microbatches, {plan.schedule}, "
        f"{again} recomputed, {format_seconds(plan.predicted.step_seconds)} a step, {plan.status}"
        f"{f', gap {plan.gap:.2%}' if plan.gap else ''}"
    )
    return seconds


def main() -> int:
    print(f"{'model':18} {'ops':>5} {'dev':>3} {'memory':>8} {'time':>8}  plan")
    worst = 0.0
    for graph, tight in ((gpt(), 1.2e9), (cnn(), 3e8)):
        for memory in (80e9, tight, tight / 2, tight / 20):
            worst = max(worst, row(graph, 8, memory))
    print(f"slowest plan: {worst:.2f} s (limit {LIMIT_SECONDS} s)")
    return int(worst > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
