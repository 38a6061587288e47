"""Piper's problem: ``python -m benchmarks.planner.piper`` plans its BERT-32 in stages x tensor degrees x replicas.

The objective is that of Tarnawski et al. (NeurIPS 2021), time per sample: seconds of the slowest stage, under the
memory of every device. Every answer is judged by code that shares nothing with the planner; exit 1 where it disagrees
or differs from a published exact value.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from partita.planners.pipeline3d import Pipeline3D, Pipelined, Way, pipeline3d

Json = dict[str, Any]
DATA = Path(os.environ.get("PARTITA_PLANNER_DATA", Path(__file__).resolve().parents[3] / "shared" / "planner-data"))
GIB = float(2**30)
SETTINGS = ((8.0, 8), (80.0, 8), (4.0, 16))
BANDWIDTH, MICROBATCHES = 25 * GIB, 1920


def configured(raw: Json, memory: float, devices: int, transfer_scale: float = 1.0) -> Json:
    """The instance with these devices at the published bandwidth, transfers and gathers multiplied."""

    def way(option: Json) -> Json:
        sync = {key: {u: b * transfer_scale for u, b in option[key].items()} for key in ("syncTimeFw", "syncTimeBw")}
        return {**option, **sync}

    nodes = [
        {**node, "TMPCs": {degree: [way(o) for o in options] for degree, options in node["TMPCs"].items()}}
        for node in raw["nodes"]
    ]
    edges = [{**edge, "communicationCost": edge["communicationCost"] * transfer_scale} for edge in raw["edges"]]
    return {
        "nodes": nodes, "edges": edges, "maxDevices": devices, "maxMemoryPerDevice": memory, "bandwidth": BANDWIDTH,
        "mbsInBatch": MICROBATCHES,
    }  # fmt: skip


def read(raw: Json) -> Pipeline3D:
    """The planner's problem of an instance in the authors' format."""
    unit = {node["id"]: i for i, node in enumerate(raw["nodes"])}
    ends = [(unit[edge["sourceId"]], unit[edge["destId"]]) for edge in raw["edges"]]
    number = {pair: i for i, pair in enumerate(ends)}

    def way(me: int, option: Json) -> Way:
        taken = ((number[unit[int(u)], me], float(b)) for u, b in option["syncTimeFw"].items())
        given = ((number[me, unit[int(u)]], float(b)) for u, b in option["syncTimeBw"].items())
        return Way(
            option["id"], float(option["timePerSample"]), float(option["parameterSize"]), float(option["memoryUsageA"]),
            float(option["memoryUsageB"]), (*taken, *given),
        )  # fmt: skip

    ways = tuple(
        {int(degree): tuple(way(i, option) for option in options) for degree, options in node["TMPCs"].items()}
        for i, node in enumerate(raw["nodes"])
    )
    edges = tuple((*pair, float(edge["communicationCost"])) for pair, edge in zip(ends, raw["edges"], strict=True))
    return Pipeline3D(
        ways, edges, int(raw["maxDevices"]), float(raw["maxMemoryPerDevice"]), float(raw["bandwidth"]),
        int(raw["mbsInBatch"]),
    )  # fmt: skip


def written(raw: Json, problem: Pipeline3D, answer: Pipelined) -> Json:
    """The stages by the instance's names."""
    ids = [node["id"] for node in raw["nodes"]]
    stages = []
    for stage in answer.stages:
        names = {
            str(ids[unit]): problem.ways[unit][stage.degree][way].name
            for unit, way in zip(stage.units, stage.ways, strict=True)
        }
        stages.append({"nodes": [ids[u] for u in stage.units], "dp": stage.replicas, "tp": stage.degree, "tmpc": names})
    return {"stages": stages}


def judge(raw: Json, plan: Json) -> tuple[float, list[str]]:
    """(seconds per sample of the slowest stage, violations) of a plan, from the JSON texts alone."""
    home = {node: i for i, stage in enumerate(plan["stages"]) for node in stage["nodes"]}
    nodes = {node["id"]: node for node in raw["nodes"]}
    wrong = [] if set(home) == set(nodes) else ["not every node is in a stage"]
    if sum(stage["dp"] * stage["tp"] for stage in plan["stages"]) > raw["maxDevices"]:
        wrong.append("more devices than there are")
    batch = raw["mbsInBatch"]
    wrong += [f"{s['dp']} replicas do not divide the batch" for s in plan["stages"] if batch % s["dp"]]
    wrong += [
        f"edge {e['sourceId']} to {e['destId']} goes back"
        for e in raw["edges"]
        if home[e["sourceId"]] > home[e["destId"]]
    ]
    slowest, behind = 0.0, sum(stage["dp"] for stage in plan["stages"])
    if behind > batch:
        wrong.append("more replicas than samples")
    for i, stage in enumerate(plan["stages"]):
        copies = -(-behind // stage["dp"])
        behind -= stage["dp"]
        used = {
            node: next(o for o in nodes[node]["TMPCs"][str(stage["tp"])] if o["id"] == stage["tmpc"][str(node)])
            for node in stage["nodes"]
        }
        held = sum(o["memoryUsageA"] * copies + o["memoryUsageB"] for o in used.values())
        if held > raw["maxMemoryPerDevice"] * (1 + 1e-12):
            wrong.append(f"stage {i} holds {held:.6g} bytes")
        sent = 4.0 * (stage["dp"] - 1) / batch * sum(o["parameterSize"] for o in used.values())
        for edge in raw["edges"]:
            a, b, nbytes = edge["sourceId"], edge["destId"], edge["communicationCost"]
            if home[a] != home[b] and i == home[a]:
                sent += 2 * (nbytes + used[a]["syncTimeBw"][str(b)])
            if home[a] != home[b] and i == home[b]:
                sent += 2 * (nbytes + used[b]["syncTimeFw"][str(a)])
        busy = sum(o["timePerSample"] for o in used.values())
        slowest = max(slowest, (busy + sent / raw["bandwidth"]) / stage["dp"])
    return slowest, wrong


def judge_elsewhere(raw: Json, plan: Json) -> tuple[float, list[str]] | None:
    """The same by the evaluator that came with the data, where it is there."""
    path = DATA / "evaluate.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("planner_data_evaluate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.evaluate_piper(raw, plan)
    return found["objective"], found["violations"]


def published(name: str) -> tuple[float | None, float | None]:
    """(exact seconds per sample, seconds of the authors' program)."""
    path = DATA / "published" / "piper.json"
    if not path.exists():
        return None, None
    known = json.loads(path.read_text(encoding="utf-8"))
    return known["exact"].get(name), known["results"].get(name, {}).get("seconds")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="instances (default: those beside the checkout)")
    parser.add_argument("--devices", type=int, help="with --memory: one setting instead of the published three")
    parser.add_argument("--memory", type=float, help="GiB a device")
    parser.add_argument("--transfer-scale", type=float, default=1.0, help="multiplies transfers and gathers")
    parser.add_argument("--memory-scale", type=float, default=1.0, help="multiplies the devices' memory")
    parser.add_argument("-o", "--output", type=Path, help="a folder for the plans")
    args = parser.parse_args(argv)
    if (args.devices is None) != (args.memory is None):
        parser.error("--devices and --memory go together")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    files = args.files or sorted((DATA / "piper").glob("*.json"))
    if not files:
        print(f"no instances in {DATA}: name files, or set PARTITA_PLANNER_DATA")
        return 2
    settings = SETTINGS if args.devices is None else ((args.memory, args.devices),)
    as_published = args.transfer_scale == 1.0 and args.memory_scale == 1.0
    print(f"{'instance':14} {'GiB':>6} devices {'exact':>14} {'here':>14} stages {'theirs':>8} {'here':>8}")
    failed = False
    for path in files:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for memory, devices in settings:
            name = f"{path.stem.removesuffix('a100')}_{memory:g}_{devices}"
            exact, their_seconds = published(name) if as_published else (None, None)
            instance = configured(raw, memory * args.memory_scale * GIB, devices, args.transfer_scale)
            began = time.perf_counter()
            problem = read(instance)
            answer = pipeline3d(problem)
            took = time.perf_counter() - began
            wrong: list[str] = []
            here, stages = "infeasible", "-"
            if isinstance(answer, Pipelined):
                plan = written(instance, problem, answer)
                here, stages = f"{answer.seconds:.9f}", str(len(answer.stages))
                wrong = disagreements(instance, plan, answer.seconds, exact)
                if args.output:
                    args.output.mkdir(parents=True, exist_ok=True)
                    (args.output / f"{name}.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
            elif exact is not None:
                wrong = [f"infeasible here, but {exact} is possible"]
            print(
                f"{path.stem:14} {memory * args.memory_scale:6.4g} {devices:7} "
                f"{'-' if exact is None else format(exact, '.9f'):>14} {here:>14} {stages:>6} "
                f"{'-' if their_seconds is None else format(their_seconds, '.2f') + ' s':>8} {took:6.2f} s",
                flush=True,
            )
            for problem_found in wrong:
                failed = True
                print(f"    WRONG: {problem_found}")
    return int(failed)


def disagreements(raw: Json, plan: Json, seconds: float, exact: float | None) -> list[str]:
    problems = []
    for found in (judge(raw, plan), judge_elsewhere(raw, plan)):
        if found is not None:
            problems += found[1]
            if abs(found[0] - seconds) > 1e-9 * seconds:
                problems.append(f"claimed {seconds!r}, is {found[0]!r}")
    if exact is not None and abs(seconds - exact) > 1e-8 * exact:
        problems.append(f"not the exact value {exact!r}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
