"""Runs the contests on each model and prints medians and ratios; every contest is one pair of processes, step by
step in turn."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.local_pipeline.stats import ratio

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("gpt10m", "vit", "mlp")
CONTESTS = ("data", "zero3", "tensor", "pipeline")


def contest(name: str, model: str, rounds: int, ranks: int, settings: dict[str, str]) -> dict[str, object]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "benchmarks.distributed.rank",
        name, model, str(rounds), json.dumps(settings),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{name} on {model} failed:\n{done.stderr[-3000:]}")
    found: dict[str, object] = json.loads(lines[-1])
    return found


def rows(found: dict[str, object]) -> dict[str, list[float]]:
    """Seconds a round of each contestant: of the slower rank."""
    each = [seconds for seconds, *_ in found["ranks"]]  # type: ignore[attr-defined]
    return {name: [max(r) for r in zip(*(e[name] for e in each), strict=True)] for name in each[0]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contests", default=",".join(CONTESTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--settings", type=Path, help="what was best of each contestant's settings: read where it is "
                        "there, so that none are tried, and written")  # fmt: skip
    options = parser.parse_args()
    known = json.loads(options.settings.read_text()) if options.settings and options.settings.exists() else {}
    console, everything = Console(width=130), []
    for name in options.contests.split(","):
        table = Table("model", "contestant", "median ms", "least ms", "CPU ms", "theirs / ours",
                      "sent MB (closed form)", "loss", "settings", title=f"{name}, {options.ranks} ranks")  # fmt: skip
        for model in options.models.split(","):
            found = contest(name, model, options.rounds, options.ranks, known.get(f"{name} {model}", {}))
            known[f"{name} {model}"] = found["chosen"]
            if options.settings:
                options.settings.write_text(json.dumps(known, indent=1))
            seconds = rows(found)
            everything.append({"contest": name, "model": model, "seconds": seconds, "found": found})
            ours = min((n for n in seconds if n.startswith("partita")), key=lambda n: median(seconds[n]), default="")
            for who, times in seconds.items():
                share = str(ratio(times, seconds[ours])) if ours and who != ours else ""
                losses = [x for _, loss, *_ in found["ranks"] if (x := loss.get(who)) is not None]  # type: ignore[attr-defined]
                sent = [s[who] for _, _, s, _ in found["ranks"] if who in s]  # type: ignore[attr-defined]
                amount = f"{max(sent) / 1e6:.2f}" if sent else ""
                if sent and found["expected"]:
                    amount += f" ({found['expected'] / 1e6:.2f})"  # type: ignore[operator]
                table.add_row(
                    model,
                    who,
                    f"{1e3 * median(times):.1f}",
                    f"{1e3 * min(times):.1f}",
                    f"{1e3 * max(median(busy[who]) for *_, busy in found['ranks']):.1f}",  # type: ignore[attr-defined]
                    share,
                    amount,
                    f"{sum(losses) / len(losses):.5f}",
                    str(found["notes"][who]),
                )  # type: ignore[index]
            for who, why in found["failed"].items():  # type: ignore[attr-defined]
                table.add_row(model, who, "failed", "", "", "", "", "", why)
        console.print(table)
    if options.json:
        print(json.dumps(everything))
    return 0
