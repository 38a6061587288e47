"""Peak bytes of each device in one AdamW training step, predicted and measured, under a limit one device breaks."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

if __package__ in (None, ""):  # run as a file: python benchmarks/local_memory/run.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

import partita
from benchmarks.models import WORKLOADS, cross_entropy
from partita.runtime.memory import measure_memory
from partita.runtime.meter import MemoryMeter
from partita.units import format_bytes

ROOM = 1.35  # a device's limit: its equal share of what one device needs, times this


@dataclass(frozen=True)
class Row:
    """One device of one plan. ``limit`` 0: none was set."""

    devices: int
    device: str
    limit: int
    predicted: int
    measured: int
    plan: str


@dataclass(frozen=True)
class Outcome:
    """One number of devices. ``same``: the numbers are the unsplit model's; ``problem``: why there is no plan."""

    rows: tuple[Row, ...]
    same: bool
    problem: str = ""


def one_device(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> int:
    """Peak bytes of plain PyTorch: parameters, gradients, AdamW's state, activations, all on the one device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    meter = MemoryMeter()
    for step in range(2):
        if step == 1:  # the state is there now
            meter.hold([list(model.parameters()), [optimizer.state[p] for p in model.parameters()]])
        optimizer.zero_grad(set_to_none=True)
        with meter:
            cross_entropy(model(x), target).backward()
        optimizer.step()
        if step == 0:
            optimizer.zero_grad(set_to_none=True)
            meter = MemoryMeter()
    return meter.peak_bytes


def several(model: nn.Module, x: torch.Tensor, target: torch.Tensor, count: int, limit: int) -> Outcome:
    """The model over ``count`` devices with ``limit`` bytes each."""
    try:
        pm = partita.parallelize(
            model, example_args=(x,), devices=["cpu"] * count, memory=limit, loss_fn=cross_entropy, optimizer="adamw"
        )
    except partita.InfeasibleError as error:
        return Outcome((), False, str(error))
    same = partita.verify(model, (x,), plan=pm.plan).ok
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-5)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        pm.train_step(x, target)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured = measure_memory(pm, (x, target), optimizer=optimizer)
    pm.close()
    predicted = dict(pm.plan.predicted.memory) if pm.plan.predicted is not None else {}
    recomputed = any(s.recompute for s in pm.plan.stages)
    text = (
        f"{len(pm.plan.stages)} stages, {pm.plan.batch.microbatches} microbatches, {pm.plan.schedule}"
        f"{', recomputing' if recomputed else ''}"
    )
    rows = tuple(
        Row(count, device, limit, predicted.get(device, 0), nbytes, text)
        for device, nbytes in measured.items()
        if device != "caller"
    )
    return Outcome(rows, same)


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where a device went above its limit, a plan was missing, or numbers differed."""
    parser = argparse.ArgumentParser(prog="benchmarks.local_memory", description=__doc__)
    parser.add_argument("--model", default="gpt30m", choices=sorted(WORKLOADS))
    parser.add_argument("--devices", default="2,3,4", help="how many devices, one after the other")
    parser.add_argument("--room", type=float, default=ROOM, help="limit over equal share (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args(argv)
    model, x, target = WORKLOADS[given.model].build()
    alone = one_device(copy.deepcopy(model), x, target)
    outcomes = {}
    for count in (int(n) for n in given.devices.split(",")):
        outcomes[count] = several(copy.deepcopy(model), x, target, count, round(given.room * alone / count))
    good = all(
        o.same and not o.problem and all(r.measured <= r.limit < alone for r in o.rows) for o in outcomes.values()
    )
    if given.json:
        print(json.dumps({"one_device": alone, "devices": {n: asdict(o) for n, o in outcomes.items()}, "good": good}))
        return 0 if good else 1
    console = Console()
    console.print(f"{given.model}, batch {tuple(x.shape)}: one device needs {format_bytes(alone)}", highlight=False)
    shown = Table("devices", "device", "limit", "predicted", "measured", "measured / predicted", "plan")
    for count, outcome in outcomes.items():
        for row in outcome.rows:
            ratio = f"{row.measured / row.predicted:.2f}" if row.predicted else "-"
            over = " [red]above the limit[/red]" if row.measured > row.limit else ""
            shown.add_row(
                str(count), row.device, format_bytes(row.limit), format_bytes(row.predicted),
                format_bytes(row.measured) + over, ratio, row.plan,
            )  # fmt: skip
        shown.add_section()
    console.print(shown)
    for count, outcome in outcomes.items():
        if outcome.problem:
            console.print(f"{count} devices: {outcome.problem}", markup=False, highlight=False)
        else:
            numbers = "the unsplit model's numbers" if outcome.same else "NUMBERS DIFFER"
            print(f"{count} devices: {numbers}, training within the limit that one device breaks")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
