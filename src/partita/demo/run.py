"""Runs the demonstration: per model a plan with its reasons, proof of equal numbers, prediction and measurement."""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import partita
from partita.demo import data, models
from partita.demo.proof import curve, loss_fn, step_gradients_off, train_both
from partita.errors import PartitaError
from partita.runtime.memory import measure_memory
from partita.units import format_bytes, format_seconds

CURVE_TOLERANCE = 1e-3  # relative, of the loss, anywhere in the curve: rounding grows as training goes on
GRADIENT_TOLERANCE = 1e-4  # relative to the tensor's largest value
WARM_UP = 3


@dataclass(frozen=True)
class Workload:
    """A model, endless batches for it, and what it is about.

    ``smaller``: planned again with this share of the memory of its fullest device (0: not).
    """

    name: str
    about: str
    make: Callable[[], tuple[nn.Module, Iterator[data.Batch]]]
    smaller: float = 0.0
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class Outcome:
    """What the end summary says of one workload. ``failures``: every way in which numbers differed."""

    name: str
    plan: str
    gradient_off: float
    curve_off: float
    plain_seconds: float
    parallel_seconds: float
    predicted_seconds: float
    failures: tuple[str, ...]


def _text() -> tuple[nn.Module, Iterator[data.Batch]]:
    text = data.library_text()
    return models.CharGPT(len(set(text))), data.text_batches(text, batch=16, context=64)


def _digits() -> tuple[nn.Module, Iterator[data.Batch]]:
    return models.DigitViT(), data.digit_batches(batch=64)


def _speech() -> tuple[nn.Module, Iterator[data.Batch]]:
    return models.ToneReader(data.TONES), data.tone_batches(batch=16)


WORKLOADS = (
    Workload("text", "a character-level GPT on the Python standard library's sources", _text, 0.7),
    Workload("digits", "a vision transformer on scikit-learn's handwritten digits", _digits, learning_rate=1.5e-4),
    Workload("speech", "a wav2vec-style tone reader on generated audio", _speech),
)


def show(workload: Workload, console: Console, progress: Progress, *, devices: Sequence[str], steps: int) -> Outcome:
    """One workload from the plan to the figures."""
    console.rule(f"[bold]{workload.name}[/bold]: {workload.about}")
    torch.manual_seed(0)
    model, batches = workload.make()
    plain = copy.deepcopy(model)
    count = sum(p.numel() for p in model.parameters())
    x, target = next(batches)
    console.print(f"{count / 1e6:.1f} M parameters, batch {tuple(x.shape)}\n", highlight=False)

    task = progress.add_task("capturing, measuring, planning", total=None)
    start = perf_counter()
    parallel = partita.parallelize(model, example_args=(x,), devices=list(devices), loss_fn=loss_fn)
    progress.remove_task(task)
    console.print("[bold]1. the plan[/bold]", f"(found in {perf_counter() - start:.1f} s)", highlight=False)
    console.print(f"{parallel.plan.explain()}\n", markup=False, highlight=False, soft_wrap=True)

    failures: list[str] = []
    console.print("[bold]2. the same numbers[/bold]")
    task = progress.add_task("comparing with the unsplit model", total=None)
    fresh, fresh_target = next(batches)
    checked = partita.verify(model, (fresh,), plan=parallel.plan)
    worst, name, loss_off = step_gradients_off(plain, parallel, fresh, fresh_target)
    progress.remove_task(task)
    console.print(f"pm(x) and backward: {checked}", markup=False, highlight=False)
    if not checked.ok:
        failures.append("outputs or gradients of pm(x) differ from the unsplit model's")
    console.print(
        f"train_step: loss differs by {loss_off:.1e}, gradients by {worst:.1e} at most ({name or 'none differ'})",
        markup=False, highlight=False,
    )  # fmt: skip
    if not (worst <= GRADIENT_TOLERANCE and loss_off <= GRADIENT_TOLERANCE):
        failures.append(f"train_step differs from an ordinary step: loss by {loss_off:.1e}, '{name}' by {worst:.1e}")
    ours = torch.optim.AdamW(parallel.parameters(), lr=workload.learning_rate)
    updates = (torch.optim.AdamW(plain.parameters(), lr=workload.learning_rate), ours)
    losses, seconds = train_both(plain, parallel, updates, batches, steps, progress)
    curve_off = max(abs(a - b) / abs(a) for a, b in losses)
    console.print(
        f"{steps} steps of AdamW: loss {losses[0][1]:.3f} {curve(losses)} {losses[-1][1]:.3f}, "
        f"never further than {curve_off:.1e} from the unsplit model's\n",
        markup=False, highlight=False,
    )  # fmt: skip
    if not curve_off <= CURVE_TOLERANCE:
        failures.append(f"the loss curve is {curve_off:.1e} away from the unsplit model's")

    steady = seconds[WARM_UP:] if len(seconds) > WARM_UP else seconds
    ordinary, divided = median(a for a, _ in steady), median(b for _, b in steady)
    predicted = parallel.plan.predicted
    expected = predicted.step_seconds if predicted is not None else float("nan")
    console.print("[bold]3. predicted and measured[/bold]")
    memory = measure_memory(parallel, (x, target), optimizer=ours)
    console.print(figures(parallel.plan, expected, divided, memory))
    console.print(
        f"PyTorch with {torch.get_num_threads()} threads on the same cores: {format_seconds(ordinary)}; "
        f"divided it takes {format_seconds(divided)}, {ordinary / divided:.2f}x as fast "
        f"(medians of {len(steady)} steps each, taken in turn)\n",
        markup=False, highlight=False,
    )  # fmt: skip
    parallel.close()
    if workload.smaller and predicted is not None:
        limit = round(workload.smaller * max(nbytes for _, nbytes in predicted.memory))
        failures += squeeze(parallel.module, (fresh, fresh_target), ours, limit, console, progress, devices)
    return Outcome(workload.name, shape(parallel.plan), worst, curve_off, ordinary, divided, expected, tuple(failures))


def squeeze(
    model: nn.Module,
    batch: data.Batch,
    optimizer: torch.optim.Optimizer,
    limit: int,
    console: Console,
    progress: Progress,
    devices: Sequence[str],
) -> list[str]:
    """The same model where each device may use ``limit`` bytes; what failed of it."""
    console.print(f"[bold]4. with less memory[/bold] (at most {format_bytes(limit)} a device)", highlight=False)
    task = progress.add_task("planning within the limit", total=None)
    tight = partita.parallelize(model, (batch[0],), devices=list(devices), memory=limit, loss_fn=loss_fn)
    console.print(f"{tight.plan.explain()}\n", markup=False, highlight=False, soft_wrap=True)
    progress.update(task, description="comparing with the unsplit model")
    checked = partita.verify(model, (batch[0],), plan=tight.plan)
    used = {d: b for d, b in measure_memory(tight, batch, optimizer=optimizer).items() if d in tight.plan.devices}
    progress.remove_task(task)
    tight.close()
    peaks = ", ".join(f"{format_bytes(nbytes)} on {device}" for device, nbytes in used.items())
    console.print(f"{checked}\npeak memory measured: {peaks}\n", markup=False, highlight=False)
    failures = [] if checked.ok else ["the plan within the memory limit gives different numbers"]
    over = [d for d, nbytes in used.items() if nbytes > limit]
    return failures + [f"{d} used more than its limit of {format_bytes(limit)}" for d in over]


def shape(plan: partita.Plan) -> str:
    """A plan in two words."""
    stages = len(plan.stages)
    replicas = max(len(s.devices) for s in plan.stages)
    return "1 device" if stages == replicas == 1 else f"{replicas} replicas" if stages == 1 else f"{stages} stages"


def figures(plan: partita.Plan, expected: float, measured: float, memory: Mapping[str, int]) -> Table:
    """Step time, and peak memory of each device, as predicted and as measured."""
    shown = Table("", "predicted", "measured", "measured / predicted")
    shown.add_row("step", format_seconds(expected), format_seconds(measured), f"{measured / expected:.2f}")
    predicted = dict(plan.predicted.memory) if plan.predicted is not None else {}
    for device, nbytes in memory.items():
        there = predicted.get(device)
        if there is not None:
            ratio = f"{nbytes / there:.2f}"
            shown.add_row(f"peak memory, {device}", format_bytes(there), format_bytes(nbytes), ratio)
    return shown


def summary(outcomes: Sequence[Outcome]) -> Table:
    columns = ("model", "plan", "gradients", "loss curve", "PyTorch", "divided", "speed-up")
    shown = Table(*columns, title="Summary", title_justify="left")
    for o in outcomes:
        shown.add_row(
            o.name, o.plan, _verdict(o.gradient_off, GRADIENT_TOLERANCE), _verdict(o.curve_off, CURVE_TOLERANCE),
            format_seconds(o.plain_seconds), format_seconds(o.parallel_seconds),
            f"{o.plain_seconds / o.parallel_seconds:.2f}x",
        )  # fmt: skip
    return shown


def _verdict(off: float, tolerance: float) -> str:
    return f"same ({off:.0e})" if off <= tolerance else f"[red]off by {off:.0e}[/red]"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: every number equal; 1: some differ; 2: it could not run as asked."""
    known = [w.name for w in WORKLOADS]
    parser = argparse.ArgumentParser(prog="partita demo", description="Divide three models, check them, time them.")
    parser.add_argument("--only", default=",".join(known), help=f"of: {', '.join(known)} (default: all)")
    parser.add_argument("--devices", default="cpu,cpu", help="default: cpu,cpu, two groups of this machine's cores")
    parser.add_argument("--steps", type=int, default=20, help="training steps of the loss curve (default: 20)")
    given = parser.parse_args(argv)
    wanted = given.only.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"'{unknown[0]}' is not one of {', '.join(known)}")
    if given.steps < 1:
        parser.error("--steps must be at least 1")
    warnings.filterwarnings("ignore", module="torch")
    console = Console()
    start = perf_counter()
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            for workload in WORKLOADS:
                if workload.name in wanted:
                    devices = given.devices.split(",")
                    outcomes.append(show(workload, console, progress, devices=devices, steps=given.steps))
    except PartitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    console.print(summary(outcomes))
    console.print("gradients, loss curve: the largest relative difference from the unsplit model's", highlight=False)
    failures = [f"{o.name}: {failure}" for o in outcomes for failure in o.failures]
    for failure in failures:
        console.print(f"[red]{failure}[/red]", highlight=False)
    verdict = "DIFFERENT NUMBERS" if failures else "all numbers are the unsplit models'"
    console.print(f"{len(outcomes)} models in {perf_counter() - start:.0f} s: {verdict}", highlight=False)
    return 1 if failures else 0
