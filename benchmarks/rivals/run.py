"""All rivals on all models, in turn: throughput, memory, time to the first step, lines to write."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import sys
import tempfile
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.devices import DEVICES, name_of, skipped
from benchmarks.local_pipeline.contestants import CONTESTANTS
from benchmarks.local_pipeline.guest import EVERYONE
from benchmarks.local_pipeline.host import Failed, Guest
from benchmarks.local_pipeline.stats import ratio
from benchmarks.models import WORKLOADS
from benchmarks.rivals.one_device import ONE_DEVICE
from partita.units import format_bytes

OWN = ("partita", "partita-call", "partita-one")
MODELS = "gpt30m,vit,resnet,mlp,speech"
LEFT_OUT = ("partita-1f1b", "partita-zb")  # plans the planner did not choose are benchmarks.local_pipeline's
TURN_SECONDS = 0.15
QUIET_SECONDS = 0.01


@dataclass
class Result:
    """One contestant on one model; seconds of a step and of an inference, one a round."""

    train: list[float] = field(default_factory=list)
    infer: list[float] = field(default_factory=list)
    memory: int = 0
    first: float = 0.0
    note: str = ""
    error: str = ""
    no_inference: str = ""


@dataclass(frozen=True)
class Where:
    """One device of this name within so many bytes (0: what there is); '': contestants have two CPU cores."""

    device: str = ""
    limit: int = 0

    def guest(self, name: str, model: str, folder: Path, *, quick: bool = False) -> Guest:
        return Guest(name, model, folder=folder, optimizer=False, quick=quick, device=self.device, limit=self.limit)


def limit_of(model: str, where: Where, share: float) -> Where:
    """Within this share of what plain PyTorch needs, measured."""
    with tempfile.TemporaryDirectory() as folder:
        guest = where.guest("plain", model, Path(folder))
        try:
            guest.wait_ready()
            guest.step()
            return Where(where.device, int(share * guest.peak_bytes()))
        finally:
            guest.end()


def first_step(name: str, model: str, folder: Path, where: Where) -> float:
    """Seconds from starting a fresh process to the end of its first step."""
    began = perf_counter()
    guest = where.guest(name, model, folder, quick=True)
    try:
        guest.wait_ready()
        guest.step()
        return perf_counter() - began
    finally:
        guest.end()


def measure(
    model: str, names: list[str], rounds: int, where: Where, *, first: bool, progress: Progress
) -> dict[str, Result]:
    """Every contestant on one model."""
    results = {name: Result() for name in names}
    guests: dict[str, Guest] = {}
    task = progress.add_task(model, total=(1 + first) * len(names) + rounds * len(names))

    def enter(name: str) -> None:
        guests[name] = guest = where.guest(name, model, Path(folder))
        guest.wait_ready()
        results[name].note = guest.note
        guest.step()
        turns[name] = max(1, ceil(TURN_SECONDS / max(guest.step()[0], 1e-4)))
        results[name].memory = guest.peak_bytes()

    def attempt(name: str, what: str) -> None:
        result, guest = results[name], guests.get(name)
        try:
            if what == "first":
                result.first = first_step(name, model, Path(folder), where)
            elif guest is None:
                enter(name)
                if not result.no_inference:
                    try:
                        guests[name].infer()  # the first one may make a plan or compile
                    except Failed as error:  # its process is gone
                        result.no_inference = str(error).splitlines()[0]
                        guests.pop(name).end()
                        enter(name)
            else:
                result.train.append(guest.step(turns[name])[0])
                if not result.no_inference:
                    result.infer.append(guest.infer(turns[name]))
        except Failed as error:
            result.error = str(error).splitlines()[0]
            gone = guests.pop(name, None)
            if gone is not None:
                gone.end()

    turns: dict[str, int] = {}
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                progress.update(task, description=f"{model}: setting up {name}", advance=1)
                attempt(name, "set up")
            for number in range(rounds):
                order = list(guests)
                generator.shuffle(order)
                for name in order:
                    progress.update(task, description=f"{model}: round {number + 1} of {rounds}, {name}", advance=1)
                    sleep(QUIET_SECONDS)  # threads of the one before stop spinning
                    attempt(name, "turn")
        finally:
            for guest in guests.values():
                guest.end()
        for name in names if first else ():
            if not results[name].error:
                progress.update(task, description=f"{model}: first step of {name}", advance=1)
                attempt(name, "first")
    progress.remove_task(task)
    return results


def rows(model: str, results: dict[str, Result]) -> list[tuple[str, ...]]:
    """The table of one model as text."""
    batch = WORKLOADS[model].batch
    found = []
    for name, r in results.items():
        about = EVERYONE[name]
        if r.error or not r.train:
            found.append((about.title, "-", "-", "-", "-", "-", "-", str(about.lines), f"failed: {r.error[:150]}"))
            continue
        own = results.get("partita") or results.get("partita-one")
        compared = ["-", "-"]
        for i, what in enumerate(("train", "infer")):
            mine, theirs = getattr(own, what, []), getattr(r, what)
            if name not in OWN and mine and len(mine) == len(theirs):
                compared[i] = str(ratio(theirs, mine))
        found.append(
            (
                about.title, f"{batch / median(r.train):.1f}", compared[0],
                f"{batch / median(r.infer):.1f}" if r.infer else "-", compared[1], f"{r.memory / 2**20:.0f} MiB",
                f"{r.first:.1f} s" if r.first else "-", str(about.lines), r.no_inference or r.note,
            )
        )  # fmt: skip
    return found


HEAD = ("contestant", "train", "partita is", "infer", "partita is", "memory", "first step", "lines", "settings")


def section(model: str, table: list[tuple[str, ...]], rounds: int, where: Where) -> str:
    """One model of the result file."""
    title = f"{model} on {where.device} within {format_bytes(where.limit)}" if where.device else model
    lines = [
        f"## {title}", "", f"{rounds} rounds, {datetime.datetime.now():%Y-%m-%d %H:%M}.", "",
        "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD),
    ]  # fmt: skip
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table]) + "\n"


def save(sections: dict[str, str]) -> Path:
    """Write today's result file; models it has from an earlier run of the day stay, those run again are replaced."""
    path = Path(__file__).parent / "results" / f"{datetime.date.today().isoformat()}.md"
    path.parent.mkdir(exist_ok=True)
    earlier = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.exists() else []
    found = {text.partition("\n")[0]: f"## {text.rstrip()}\n" for text in earlier}
    found |= {text.partition("\n")[0].removeprefix("## "): text for text in sections.values()}
    head = (
        f"# Rivals, {datetime.date.today().isoformat()}\n\n`python -m benchmarks.rivals --save`; "
        f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}. "
        "Samples a second (medians); 'partita is': its throughput over the rival's, with a 95 % bootstrap interval "
        "over rounds.\n"
    )
    path.write_text("\n".join([head, *found.values()]), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.rivals", description=__doc__)
    parser.add_argument("--models", default=MODELS, help="of: " + ", ".join(WORKLOADS))
    parser.add_argument("--only", default="", help="contestants")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="two CPU cores, or one device and its host")
    parser.add_argument("--share", type=float, default=0.6, help="of one device: memory, of plain PyTorch's need (0.6)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant (default 7)")
    parser.add_argument("--no-first", action="store_true", help="leave out the time to the first step")
    parser.add_argument("--save", action="store_true", help="write results/DATE.md beside this program, model by model")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse_args(argv)
    there = CONTESTANTS if given.device == "cpu" else ONE_DEVICE
    asked = given.only.split(",") if given.only else [n for n in there if n not in LEFT_OUT]
    models = given.models.split(",")
    for value, known in [*((m, WORKLOADS) for m in models), *((n, there) for n in asked)]:
        if value not in known:
            parser.error(f"'{value}' is not one of {', '.join(known)}")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if skipped(given.device, "benchmarks.rivals"):
        return 0
    console = Console(stderr=given.json)
    one = Where(name_of(given.device))
    sections: dict[str, str] = {}
    raw: dict[str, object] = {}
    for model in models:
        with Progress(console=console, transient=True) as progress:
            where = limit_of(model, one, given.share) if one.device else one
            results = measure(model, asked, given.rounds, where, first=not given.no_first, progress=progress)
        sections[model] = section(model, rows(model, results), given.rounds, where)
        raw[model] = {n: vars(r) for n, r in results.items()}
        if not given.json:
            print(sections[model], flush=True)
        if given.save:
            print(f"written to {save(sections)}", file=sys.stderr)
    if given.json:
        print(json.dumps(raw, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
