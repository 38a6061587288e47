"""The ASPLOS 2025 contest on intra-operator parallelism (google/iopddl), at its time limits, beside its teams' results.

``python -m benchmarks.planner.iopddl [FILES or letters] [--seconds S] [-o DIR]``. The instances and the published
costs lie in ``../shared/planner-data`` or where ``PARTITA_PLANNER_DATA`` says; any other file of the format is solved
too. Every answer is added up here from the file's own integers, and by the data's ``evaluate.py`` where it is.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.util
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partita.planners.labelling import Edge, Labelling, Problem, solve

FORBIDDEN = 10**18
DATA = Path(os.environ.get("PARTITA_PLANNER_DATA", Path(__file__).resolve().parents[3] / "shared" / "planner-data"))
SECONDS = 60.0  # where the contest states no limit
MARGIN = 2.0  # seconds kept for adding up, writing and ending
BUSY = 1.2  # times what reading took is counted: on a busy machine the solver ends late as well


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    answer: Labelling
    cost: int
    feasible: bool
    confirmed: bool | None
    seconds: float


def parse(path: Path) -> dict[str, Any]:
    text = path.read_bytes()
    gc.disable()  # millions of numbers, no cycles
    try:
        found: dict[str, Any] = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)["problem"]
    finally:
        gc.enable()
    return found


def problem_of(raw: dict[str, Any]) -> Problem:
    """The contest's problem in the library's terms."""
    costs = tuple(_costs(cost) for cost in raw["nodes"]["costs"])
    edges = []
    for ends, cost in zip(raw["edges"]["nodes"], raw["edges"]["costs"], strict=True):
        a, b = ends
        edges.append(Edge(a, b, _costs(cost).reshape(len(costs[a]), len(costs[b]))))
    limit = raw.get("usage_limit")
    return Problem(
        costs=costs,
        edges=tuple(edges),
        usages=tuple(np.array(usage, dtype=np.float64) for usage in raw["nodes"]["usages"]),
        intervals=tuple((begin, end) for begin, end in raw["nodes"]["intervals"]),
        limit=float("inf") if limit is None else float(limit),
    )


def _costs(numbers: Sequence[int]) -> np.ndarray:
    cost = np.array(numbers, dtype=np.float64)
    cost[cost >= FORBIDDEN] = np.inf
    return cost


def read(path: Path) -> Problem:
    return problem_of(parse(path))


def evaluate(raw: dict[str, Any], labels: Sequence[int]) -> tuple[int, bool]:
    """Cost in whole numbers, and whether no forbidden pair is chosen and no moment exceeds the limit."""
    nodes, edges = raw["nodes"], raw["edges"]
    if len(labels) != len(nodes["costs"]):
        return 0, False
    cost = sum(own[label] for own, label in zip(nodes["costs"], labels, strict=True))
    for (a, b), matrix in zip(edges["nodes"], edges["costs"], strict=True):
        cost += matrix[labels[a] * len(nodes["costs"][b]) + labels[b]]
    change: dict[int, int] = {}
    for (begin, end), usage, label in zip(nodes["intervals"], nodes["usages"], labels, strict=True):
        if begin < end:
            change[begin] = change.get(begin, 0) + usage[label]
            change[end] = change.get(end, 0) - usage[label]
    level, peak = 0, 0
    for moment in sorted(change):
        level += change[moment]
        peak = max(peak, level)
    limit = raw.get("usage_limit")
    return cost, cost < FORBIDDEN and (limit is None or peak <= limit)


def confirm(path: Path, labels: Sequence[int], cost: int) -> bool | None:
    """Whether the data's own evaluator agrees; None where it is not there."""
    script = DATA / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate", script) if script.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.evaluate_iopddl(module.load_iopddl(str(path)), list(labels))
    return bool(found["feasible"] and found["objective"] == cost and not found["forbidden_pairs"])


def running() -> float:
    """Seconds since this process began, where the system tells (Linux); else 0."""
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return 0.0
    ticks = int(stat.read_text(encoding="ascii").rpartition(")")[2].split()[19])  # since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run(path: Path, seconds: float, seed: int, output: Path | None, begun: float = 0.0) -> Row:
    """The answer ``seconds`` after the start at most, ``begun`` seconds of which are gone already."""
    started = time.monotonic() - begun
    raw = parse(path)
    problem = problem_of(raw)
    answer = solve(problem, seconds=max(1.0, seconds - MARGIN - BUSY * (time.monotonic() - started)), seed=seed)
    if output is not None and answer.labels:
        output.mkdir(parents=True, exist_ok=True)
        name = path.name.removesuffix(".gz").removesuffix(".json")
        (output / f"{name}.solution.txt").write_text(json.dumps(list(answer.labels)) + "\n", encoding="utf-8")
    taken = time.monotonic() - started
    cost, feasible = evaluate(raw, answer.labels)
    confirmed = confirm(path, answer.labels, cost) if answer.labels else None
    return Row(_name(path), answer, cost, feasible, confirmed, taken)


def _name(path: Path) -> str:
    match = re.search(r"iopddl-([A-Z])\.json", path.name)
    return match[1] if match else path.name.removesuffix(".gz").removesuffix(".json")


def _paths(wanted: Sequence[str]) -> list[Path]:
    folder = DATA / "iopddl"
    if not wanted:
        return sorted(folder.glob("asplos-2025-iopddl-?.json*"))
    return [folder / f"asplos-2025-iopddl-{w}.json.gz" if re.fullmatch("[A-Z]", w) else Path(w) for w in wanted]


def line(row: Row, problem_size: str, published: dict[str, Any] | None) -> str:
    best = published["best_known"] if published else None
    winner = published["contest_costs"].get("team01") if published else None
    bound = row.answer.lower_bound
    sound = {True: "yes", None: "-", False: "NO"}[row.confirmed]
    columns = [
        f"{row.name:<12.12}",
        problem_size,
        f"{row.cost if row.answer.labels else 'none':>14}",
        f"{best if best else '-':>14}",
        f"{winner if winner else '-':>14}",
        f"{best / row.cost:>7.4f}" if best and row.feasible else f"{'-':>7}",
        f"{bound:>16.0f}",
        f"{row.answer.gap:>7.2%}" if row.answer.labels else f"{'-':>7}",
        f"{row.answer.status:<10}",
        f"{row.seconds:>6.1f}",
        f"{'yes' if row.feasible else 'NO':>8}",
        f"{sound:>9}",
    ]
    return "  ".join(columns)


def header() -> str:
    return (
        f"{'instance':<12}  {'nodes':>6} {'edges':>7}  {'cost':>14}  {'best known':>14}  {'winner':>14}  {'ratio':>7}  "
        f"{'lower bound':>16}  {'gap':>7}  {'status':<10}  {'sec':>6}  {'feasible':>8}  {'confirmed':>9}"
    )


def scores(rows: Sequence[Row], published: dict[str, Any]) -> str:
    """The contest's score, best known over cost, summed over the instances run; ours and the published teams'."""
    known = [row for row in rows if row.name in published]
    if not known:
        return ""
    points = {"this": sum(published[r.name]["best_known"] / r.cost for r in known if r.feasible)}
    teams = sorted({team for r in known for team in published[r.name]["contest_costs"]})
    for team in teams:
        costs = {r.name: published[r.name]["contest_costs"].get(team) for r in known}
        points[team] = sum(published[b]["best_known"] / c for b, c in costs.items() if c and c < FORBIDDEN)
    ranked = sorted(points.items(), key=lambda item: -item[1])
    text = ", ".join(f"{team} {value:.4f}" for team, value in ranked)
    return f"score over {len(known)} instances (best known / cost): {text}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner.iopddl", description=__doc__)
    parser.add_argument("instances", nargs="*", help="files of the contest's format, or letters of the handed-out ones")
    parser.add_argument("--seconds", type=float, help="per instance, reading included (default: the contest's limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="folder for the answers in the contest's format")
    options = parser.parse_args(argv)
    paths = _paths(options.instances)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        parser.error(f"no such instance: {', '.join(missing) or DATA / 'iopddl'}")
    table = DATA / "published" / "iopddl.json"
    published = json.loads(table.read_text(encoding="utf-8"))["benchmarks"] if table.is_file() else {}
    print(header(), flush=True)
    rows = []
    for number, path in enumerate(paths):
        known = published.get(_name(path))
        limit = options.seconds or (float(known["timeout_s"]) if known else SECONDS)
        row = run(path, limit, options.seed, options.output, running() if number == 0 else 0.0)
        raw = parse(path)
        size = f"{len(raw['nodes']['costs']):>6} {len(raw['edges']['costs']):>7}"
        print(line(row, size, known), flush=True)
        rows.append(row)
    print(scores(rows, published))
    return 0 if all(row.feasible and row.confirmed is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
