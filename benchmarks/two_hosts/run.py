"""Starts two hosts, shapes the link between them, and prints for each shape what was found, chosen and measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.local_pipeline.stats import ratio
from benchmarks.two_hosts.link import ROOT, Hosts, die_with_parent, link, shape, why_not

SHORTEST = 5e-5  # of a veth pair, which needs no relay
GIGABITS = (10.0, 1.0, 0.1)
MILLISECONDS = (0.05, 0.5, 5.0)


def sockets(hosts: Hosts) -> dict[str, float]:
    """What plain sockets find the link to be."""
    words = [sys.executable, "-m", "benchmarks.two_hosts.sockets"]
    server = subprocess.Popen(hosts.inside(0, [*words, "serve"]), cwd=ROOT)
    try:
        asked = subprocess.run(
            hosts.inside(1, [*words, "ask", hosts.addresses[0]]), cwd=ROOT, capture_output=True, text=True, check=True,
            timeout=120,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    found: dict[str, float] = json.loads(asked.stdout)
    return found


def ranks(hosts: Hosts, arguments: Sequence[str], timeout: float) -> list[dict[str, Any]]:
    """One rank on each host through torchrun's c10d rendezvous; the JSON lines of rank 0, as far as it came."""
    started, folder = [], Path(hosts.control).parent
    for host in (0, 1):
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-id", "two-hosts", "--rdzv-endpoint", f"{hosts.addresses[0]}:29400",
            "--rdzv-conf", f"is_host={'false' if host else 'true'}", "--local-addr", hosts.addresses[host],
            "-m", "benchmarks.two_hosts.rank", *arguments,
        ]  # fmt: skip
        with open(folder / f"errors{host}", "w") as errors:
            started.append(
                subprocess.Popen(
                    hosts.inside(host, torchrun), cwd=ROOT, env=hosts.environment(host), text=True, stderr=errors,
                    stdout=subprocess.DEVNULL if host else subprocess.PIPE, preexec_fn=die_with_parent,
                )
            )  # fmt: skip
    late = threading.Timer(timeout, started[0].kill)
    late.start()
    found = []
    try:
        for line in started[0].stdout or ():
            if line.startswith("{"):
                found.append(json.loads(line))
                print(summary(found[-1]), file=sys.stderr, flush=True)
    finally:
        late.cancel()
        for process in started:  # the ranks end with their launchers
            process.kill()
            process.wait()
    if not found:
        raise SystemExit("\n".join((folder / f"errors{host}").read_text()[-3000:] for host in (0, 1)))
    return found


def measured(hosts: Hosts) -> dict[str, float]:
    """The link as ``partita measure`` finds it."""
    command = [sys.executable, "-m", "partita.cli", "measure", "--json"]
    asked = [
        subprocess.Popen(
            hosts.inside(h, command), cwd=ROOT, env=hosts.rank(h), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=die_with_parent,
        )
        for h in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300) for rank in asked]
    if any(rank.returncode for rank in asked):
        raise SystemExit("\n".join(errors[-2000:] for _, errors in said))
    (found,) = json.loads(said[0][0])["links"]
    return found  # type: ignore[no-any-return]


def links(shapes: Sequence[tuple[float, float]], rounds: int) -> Table:
    """The links alone, each in hosts of its own, so many times: what sockets find and what ``partita measure`` does."""
    table = Table("set", "sockets", "partita measure", "software a message", title="links between two hosts")
    for bits, latency in shapes:
        with link(bits, latency if latency > SHORTEST else 0.0) as hosts:
            for _ in range(rounds):
                plain, found = sockets(hosts), measured(hosts)
                row = (
                    words(bits, latency), words(8 * plain["bandwidth"], plain["latency"]),
                    words(8 * found["bandwidth"], found["latency_seconds"]),
                    f"{1e3 * found['overhead_seconds']:.3f} ms",
                )  # fmt: skip
                print(*row, sep="   ", file=sys.stderr, flush=True)
                table.add_row(*row)
    return table


def summary(row: dict[str, Any]) -> str:
    """One setting in a line."""
    times = {name: median(s) for name, s in row["seconds"].items() if len(s) > 1}
    best = min(times, key=lambda n: times[n])
    return (
        f"set {words(row['bits'], row['latency'])}, found {words(*row['found'])}: {row['chosen']} "
        f"{1e3 * times[row['as']]:.0f} ms (predicted {1e3 * row['predicted'][row['as']]:.0f}), best {best} "
        f"{1e3 * times[best]:.0f} ms"
    )


def settings(options: argparse.Namespace) -> list[tuple[float, float]]:
    """(bits per second, seconds) in groups of one kind of link."""
    speeds = [1e9 * float(g) for g in options.gigabits.split(",")]
    return [(bits, 1e-3 * float(ms)) for ms in options.milliseconds.split(",") for bits in speeds]


def group(model: str, shapes: list[tuple[float, float]], rounds: int, timeout: float) -> list[dict[str, Any]]:
    """The shapes, all with or all without a relay, in one pair of ranks."""
    relayed = [(bits, latency if latency > SHORTEST else 0.0) for bits, latency in shapes]
    with link(*relayed[0]) as hosts:
        plain = []
        for bits, latency in relayed:
            shape(hosts.control, bits, latency)
            plain.append(sockets(hosts))
        words = [f"{bits},{latency}" for bits, latency in relayed]
        found = ranks(hosts, [model, hosts.control, str(rounds), *words], timeout)
    return [
        {**row, "latency": latency, "sockets": socket}
        for row, (_, latency), socket in zip(found, shapes, plain, strict=False)
    ]


def show(console: Console, model: str, found: list[dict[str, Any]], full: bool) -> None:
    table = Table("set", "sockets", "partita measure", "chosen plan", "ms", "predicted", "best by hand", "ms",
                  "chosen / best", title=f"{model}, two hosts of one core")  # fmt: skip
    for row in found:
        times = {name: median(s) for name, s in row["seconds"].items() if len(s) > 1}
        best = min((n for n in times if n != "chosen"), key=lambda n: times[n])
        own = row["as"]
        table.add_row(
            words(row["bits"], row["latency"]), words(8 * row["sockets"]["bandwidth"], row["sockets"]["latency"]),
            words(*row["found"]), row["chosen"], f"{1e3 * times[own]:.0f}",
            f"{1e3 * row['predicted'][own]:.0f}", best, f"{1e3 * times[best]:.0f}",
            str(ratio(*paired(row["seconds"], own, best))),
        )  # fmt: skip
    console.print(table)
    amounts = Table("plan", "on the wire, MB", "tensors, MB", "closed form, MB", title=f"{model}, sent in one step")
    for name, (wire, tensors) in found[0]["sent"].items():
        expected = found[0]["expected"].get("pipeline" if name.startswith("cut") else name, 0)
        shown = f"{expected / 1e6:.2f}" if expected else ""
        if not name.startswith("cut") or "8 microbatches" in name:
            amounts.add_row(name, f"{wire / 1e6:.2f}", f"{tensors / 1e6:.2f}", shown)
    console.print(amounts)
    for row in found if full else ():
        each = Table("plan", "ms", "predicted", title=words(row["bits"], row["latency"]))
        for name, seconds in sorted(row["seconds"].items(), key=lambda pair: median(pair[1])):
            each.add_row(name, f"{1e3 * median(seconds):.0f}", f"{1e3 * row['predicted'].get(name, 0.0):.0f}")
        console.print(each)


def paired(seconds: dict[str, list[float]], own: str, best: str) -> tuple[list[float], list[float]]:
    """Of two plans the rounds in which both stepped, the last ones."""
    count = min(len(seconds[own]), len(seconds[best]))
    return seconds[own][-count:], seconds[best][-count:]


def words(bits: float, latency: float) -> str:
    return f"{bits / 1e6:.0f} Mbit/s, {1e3 * latency:.3f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_hosts", description=__doc__)
    parser.add_argument("--models", default="gpt3m")
    parser.add_argument("--gigabits", default=",".join(map(str, GIGABITS)))
    parser.add_argument("--milliseconds", default=",".join(map(str, MILLISECONDS)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for the ranks of one kind of link")
    parser.add_argument("--links", action="store_true", help="only what the links are found to be")
    parser.add_argument("--full", action="store_true", help="every plan that was tried")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        return 0
    console = Console(width=200)
    if options.links:
        console.print(links(settings(options), options.rounds))
        return 0
    for model in options.models.split(","):
        shapes, found = settings(options), []
        for kind in (True, False):
            mine = [s for s in shapes if (s[1] <= SHORTEST) == kind]
            found += group(model, mine, options.rounds, options.timeout) if mine else []
        show(console, model, found, options.full)
        if options.json:
            print(json.dumps(found))
    return 0
