"""Runs every contestant on every model, step by step in turn, and prints who is faster by how much."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from time import sleep

import torch

if __package__ in (None, ""):  # run as a file: python benchmarks/local_pipeline/run.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.local_pipeline.contestants import CONTESTANTS
from benchmarks.local_pipeline.host import Failed, Guest
from benchmarks.local_pipeline.stats import ratio
from benchmarks.models import WORKLOADS

RIVALS = (
    "plain2", "plain2-free", "compile1", "compile2", "torchgpipe", "pipelining", "ddp", "fsdp2", "tensor", "accelerate"
)  # fmt: skip
SLOW = ("compile1", "compile2", "fsdp2", "tensor")  # left to benchmarks.rivals
REFERENCE = "plain1"
TURN_SECONDS = 0.15
QUIET_SECONDS = 0.01
SAME = 0.02  # of a gradient's norm: one ReLU whose input is 0 up to rounding may open or close and move 1e-3 to 1e-2

PIPELINES = ("partita-1f1b", "partita-zb")


def bubble_limited(name: str, note: str) -> float:
    """The speed-up over one device that the schedule's bubble leaves two equal stages, with B = 2 F (W half of B).

    ``note`` says how many microbatches the plan has.
    """
    found = re.search(r"2 stages, (\d+) microbatches", note)
    count = int(found[1]) if found else 0
    return 2 * count / (count + 1) if name == "partita-1f1b" else 2 * 3 * count / (3 * count + 1)


@dataclass
class Result:
    """One contestant on one model: seconds a step per round; how far loss and gradients are from plain PyTorch's."""

    note: str = ""
    seconds: list[float] = field(default_factory=list)
    loss_off: float = float("nan")
    gradient_off: float = float("nan")
    missing: int = 0
    error: str = ""
    details: str = ""

    @property
    def same_numbers(self) -> bool:
        return self.loss_off < 1e-4 and self.gradient_off < SAME and not self.missing


Gradients = dict[str, torch.Tensor]


def compare(result: Result, loss: float, grads: Gradients, wanted: Gradients, want_loss: float) -> None:
    """The largest relative difference (of norms) of any parameter's gradient, and that of the loss."""
    result.loss_off = abs(loss - want_loss) / abs(want_loss)
    result.missing = len(wanted.keys() - grads.keys())
    result.gradient_off = max(
        ((grads[n] - w).norm() / w.norm().clamp_min(1e-8)).item() for n, w in wanted.items() if n in grads
    )


def measure(model: str, names: list[str], rounds: int, *, optimizer: bool, progress: Progress) -> dict[str, Result]:
    """Every contestant on one model: set up one after another, then ``rounds`` turns each in random order."""
    results = {name: Result() for name in names}
    guests: dict[str, Guest] = {}
    task = progress.add_task(f"{model}: setting up", total=len(names) + rounds * len(names))
    with tempfile.TemporaryDirectory() as folder:
        wanted: Gradients = {}
        want_loss = first = 0.0

        def attempt(name: str, turn: object) -> None:
            try:
                turn()  # type: ignore[operator]
            except Failed as error:
                results[name].error, results[name].details = str(error), error.details
                guests.pop(name).end()

        def enter(name: str) -> None:
            nonlocal wanted, want_loss, first
            guest = guests[name]
            guest.wait_ready()
            results[name].note = guest.note
            _, loss = guest.step()
            grads = guest.gradients()
            if name == REFERENCE:
                wanted, want_loss = grads, loss
            compare(results[name], loss, grads, wanted, want_loss)
            seconds, _ = guest.step()
            first = seconds if name == REFERENCE else first

        try:
            for name in names:
                progress.update(task, description=f"{model}: setting up {name}")
                guests[name] = Guest(name, model, folder=Path(folder), optimizer=optimizer)
                attempt(name, lambda name=name: enter(name))
                progress.advance(task)
            count = max(1, ceil(TURN_SECONDS / max(first, 1e-4)))
            generator = random.Random(0)
            for number in range(rounds):
                order = list(guests)
                generator.shuffle(order)
                for name in order:
                    progress.update(task, description=f"{model}: round {number + 1} of {rounds}, {name}", advance=1)
                    sleep(QUIET_SECONDS)  # threads of the one before stop spinning
                    guest = guests[name]
                    attempt(name, lambda guest=guest, name=name: results[name].seconds.append(guest.step(count)[0]))
        finally:
            for guest in guests.values():
                guest.end()
            progress.remove_task(task)
    return results


def table(model: str, results: dict[str, Result]) -> Table:
    shown = Table(title=f"{model}: one training step", title_justify="left")
    for column in ("contestant", "median", "min", "x one thread", "settings", "numbers"):
        shown.add_column(column, justify="right" if column in ("median", "min") else "left")
    base = results[REFERENCE].seconds
    for name, result in results.items():
        title = CONTESTANTS[name].title
        if result.error:
            shown.add_row(title, "-", "-", "-", f"failed: {result.error.splitlines()[0][:200]}", "-")
            continue
        numbers = "same" if result.same_numbers else f"differ: gradients by {result.gradient_off:.1e}"
        if result.missing:
            numbers = f"differ: {result.missing} gradients missing"
        shown.add_row(
            title, f"{median(result.seconds) * 1e3:.1f} ms", f"{min(result.seconds) * 1e3:.1f} ms",
            str(ratio(base, result.seconds)), result.note, numbers,
        )  # fmt: skip
    return shown


def bars(model: str, results: dict[str, Result]) -> dict[str, object]:
    """The figures the claim is about: against each rival, and as a share of what two cores can give."""
    found: dict[str, object] = {}
    good = {n: r for n, r in results.items() if r.seconds and not r.error}
    for own in ("partita", "partita-call"):
        if own not in good:
            continue
        for rival in RIVALS:
            if rival in good:
                other = "" if good[rival].same_numbers else " (which computes other numbers)"
                found[f"{own}: times as fast as {rival}{other}"] = ratio(good[rival].seconds, good[own].seconds)
        if REFERENCE in good:
            found[f"{own}: share of 2x one thread"] = _halved(good[REFERENCE].seconds, good[own].seconds, 2.0)
    for own in PIPELINES:
        ideal = bubble_limited(own, good[own].note) if own in good else 0.0
        if ideal and REFERENCE in good:
            key = f"{own}: share of its bubble-limited {ideal:.2f}x"
            found[key] = _halved(good[REFERENCE].seconds, good[own].seconds, ideal)
    return found


def _halved(base: list[float], own: list[float], ideal: float) -> object:
    whole = ratio(base, own)
    return type(whole)(whole.value / ideal, whole.low / ideal, whole.high / ideal)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.local_pipeline", description=__doc__)
    parser.add_argument("--models", default="gpt30m,gpt10m,vit,resnet,mlp", help="of: " + ", ".join(WORKLOADS))
    parser.add_argument(
        "--only",
        default=",".join(n for n in CONTESTANTS if n not in SLOW),
        help="contestants; plain1 is always among them",
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant (default 9)")
    parser.add_argument("--optimizer", action="store_true", help="AdamW's step is part of a training step")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse_args(argv)
    models = given.models.split(",")
    names = [REFERENCE, *(n for n in given.only.split(",") if n != REFERENCE)]
    for value, known in [*((m, WORKLOADS) for m in models), *((n, CONTESTANTS) for n in names)]:
        if value not in known:
            parser.error(f"'{value}' is not one of {', '.join(known)}")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console(stderr=given.json)
    collected: dict[str, object] = {}
    for model in models:
        with Progress(console=console, transient=True) as progress:
            results = measure(model, names, given.rounds, optimizer=given.optimizer, progress=progress)
        found = bars(model, results)
        collected[model] = {
            "contestants": {
                n: {
                    "median_seconds": median(r.seconds) if r.seconds else None,
                    "min_seconds": min(r.seconds, default=None), "settings": r.note, "error": r.error,
                    "same_numbers": r.same_numbers, "gradient_difference": r.gradient_off,
                }
                for n, r in results.items()
            },
            "bars": {k: [v.value, v.low, v.high] for k, v in found.items()},  # type: ignore[attr-defined]
        }  # fmt: skip
        if given.json:
            continue
        console.print(table(model, results))
        for name, result in results.items():
            if result.error:
                console.print(f"{CONTESTANTS[name].title} failed:", style="bold")
                last = (result.details or result.error).splitlines()[-8:]
                console.print("\n".join(last), markup=False, highlight=False, soft_wrap=True)
        for key, value in found.items():
            console.print(f"  {key}: {value}", markup=False, highlight=False)
        console.print()
    if given.json:
        print(json.dumps(collected, indent=1))
    else:
        step = "zero_grad, forward, loss, backward" + (", AdamW" if given.optimizer else " (no optimizer)")
        console.print(
            f"A step is {step}. {given.rounds} rounds, contestants in turn in random order; medians, and in brackets "
            "the 95 % bootstrap interval over rounds. 'differ': not the numbers of plain PyTorch on the same batch.",
            markup=False, highlight=False,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
