"""Plans that divide single ops where nothing else fits, found by themselves and run: the same numbers.

``python -m benchmarks.planner.automatic [--models gpt2,vit] [--devices 2,4]`` needs the zoo (``../shared/zoo`` or
PARTITA_ZOO). For each model and number of devices the least memory is found that plans of whole ops need; then
``find_plan``'s search is given less, unasked for any degree. What it finds runs here once, outputs and every named
gradient compared with the undivided model's. Exits 1 where numbers differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import partita
from benchmarks.planner.memory_limits import limited
from benchmarks.same_numbers.run import entries
from partita.capture import capture
from partita.cluster import Cluster
from partita.errors import InfeasibleError
from partita.lockstep import can_synchronise
from partita.measure import local_cluster
from partita.plan import Plan
from partita.planners.auto import auto
from partita.sharding.batch import layouts
from partita.units import format_bytes

MODELS = ("gpt2", "vit", "bert", "t5", "hm_cnn3", "hm_lstm_lm", "llama", "convnext")
PARTS = (0.6, 0.75, 0.85, 0.95)  # of the memory that whole ops need


@dataclass(frozen=True)
class Row:
    """``least``: bytes a device that plans of whole ops need; ``limit``: given. ``same``: None where nothing fits."""

    model: str
    devices: int
    least: int
    limit: int
    plan: str
    seconds: float
    same: bool | None


def words(plan: Plan) -> str:
    stages = ", ".join(f"{len(s.devices)} devices, tensor {s.tensor}" for s in plan.stages)
    return f"{len(plan.stages)} stages ({stages}), {plan.batch.microbatches} microbatches"


def find(graph: Any, where: Cluster, **options: Any) -> Plan:
    return auto(graph, layouts(graph), where, sync_batch_norm=can_synchronise(graph), **options)


def least_for_whole_ops(graph: Any, where: Cluster) -> int:
    """Bytes a device below which no plan of whole ops was found."""
    try:
        find(graph, limited(where, 1 << 10), constraints={"tensor": 1})
    except InfeasibleError as error:
        for remedy in error.remedies:
            if "cluster" in remedy.change and remedy.text.startswith("smallest memory"):
                devices: tuple[Any, ...] = remedy.change["cluster"].devices
                return min(d.memory_bytes for d in devices)
    return 0


def row_of(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> Row:
    where = replace(local_cluster(2))
    first = where.devices[0]
    where = replace(where, devices=tuple(replace(first, name=f"cpu:{i}") for i in range(count)))
    graph = capture(model, args, kwargs).graph
    least = least_for_whole_ops(graph, where)
    for part in PARTS:
        tight = limited(where, int(part * least))
        began = time.perf_counter()
        try:
            plan = find(graph, tight)
        except InfeasibleError:
            continue
        seconds = time.perf_counter() - began
        found = partita.verify(model, args, kwargs, plan=replace(plan, predicted=None), devices=tight)
        return Row(name, count, least, int(part * least), words(plan), seconds, bool(found.ok))
    return Row(name, count, least, int(PARTS[-1] * least), "none fits", 0.0, None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.planner.automatic", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default="2,4")
    asked = parser.parse_args(argv)
    wrong = 0
    known = entries()
    for name in asked.models.split(","):
        if name not in known:
            print(f"{name:16} is not in the zoo")
            continue
        for count in map(int, asked.devices.split(",")):
            model, args, kwargs = known[name].build()
            row = row_of(name, model, args, kwargs, count)
            same = "-" if row.same is None else "same numbers" if row.same else "DIFFERENT"
            print(
                f"{row.model:16} {row.devices} devices: whole ops need {format_bytes(row.least)}, given "
                f"{format_bytes(row.limit)}: {row.plan} ({row.seconds:.2f} s): {same}",
                flush=True,
            )
            wrong += row.same is False
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
