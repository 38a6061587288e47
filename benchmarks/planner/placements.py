"""Published placements: ``python -m benchmarks.planner.placements`` solves the instances of Tarnawski et al. (2020).

The objective is the paper's max-load (section 3): seconds of the busiest device, which pays for its nodes and, on an
accelerator, once for every tensor that crosses its border either way. Backward nodes count with the forward ones of
their colour class. Every answer is judged by code that shares nothing with the planner; exit 1 where it disagrees.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partita.planners.placing.partition import partition
from partita.planners.placing.problem import Kind, Net, Placed, Placement, contract, shape
from partita.planners.placing.scatter import scatter
from partita.planners.problem import Infeasible

Json = dict[str, Any]
DATA = Path(os.environ.get("PARTITA_PLANNER_DATA", Path(__file__).resolve().parents[3] / "shared" / "planner-data"))
SECONDS = 60.0
CONTIGUOUS_SECONDS = 300.0


@dataclass(frozen=True)
class Instance:
    """``placement``: of single nodes; ``colours``: the group of each, which shares a device; ``ids``: their names."""

    name: str
    raw: Json
    placement: Placement
    colours: tuple[int, ...]
    ids: tuple[int, ...]


def read(path: Path, transfer_scale: float = 1.0, memory_scale: float = 1.0) -> Instance:
    """An instance in the authors' format, with transfers and accelerator memory multiplied."""
    raw = scaled(json.loads(path.read_text(encoding="utf-8")), transfer_scale, memory_scale)
    nodes = raw["nodes"]
    index = {node["id"]: i for i, node in enumerate(nodes)}
    colour_number: dict[Any, int] = {}
    colours = tuple(colour_number.setdefault(colour(node), len(colour_number)) for node in nodes)
    takers: dict[int, set[int]] = {}
    seconds: dict[int, float] = {}
    for edge in raw["edges"]:
        source = index[edge["sourceId"]]
        takers.setdefault(source, set()).add(index[edge["destId"]])
        seconds.setdefault(source, float(edge["cost"]))
    nets = tuple(Net(tuple(sorted(ends | {source})), seconds[source]) for source, ends in takers.items())
    fast = np.array([float(n["fpgaLatency"]) if n["supportedOnFpga"] else np.inf for n in nodes])
    slow = np.array([float(n["cpuLatency"]) for n in nodes])
    kinds = (
        Kind("accelerator", int(raw["maxFPGAs"]), fast, float(raw["maxSizePerFPGA"])),
        Kind("CPU", int(raw["maxCPUs"]), slow, transfer=0.0),
    )
    size = np.array([float(node.get("size", 0.0)) for node in nodes])
    order = tuple((index[a], index[b]) for a, b in orderings(raw))
    return Instance(path.stem, raw, Placement(kinds, size, nets, order), colours, tuple(n["id"] for n in nodes))


def scaled(raw: Json, transfer: float, memory: float) -> Json:
    edges = [{**edge, "cost": float(edge["cost"]) * transfer} for edge in raw["edges"]]
    return {**raw, "edges": edges, "maxSizePerFPGA": float(raw["maxSizePerFPGA"]) * memory}


def colour(node: Json) -> tuple[str, int]:
    return ("class", node["colorClass"]) if "colorClass" in node else ("node", node["id"])


def orderings(raw: Json) -> Iterator[tuple[int, int]]:
    """Pairs of nodes that contiguity is about: forward edges, and edges between backward nodes turned round where a
    colour class has no forward node that could stand for it (the authors' artificial forward nodes).
    """
    backward = {node["id"] for node in raw["nodes"] if node["isBackwardNode"]}
    colours = {node["id"]: colour(node) for node in raw["nodes"]}
    led = {colours[node["id"]] for node in raw["nodes"] if node["id"] not in backward}
    for edge in raw["edges"]:
        a, b = edge["sourceId"], edge["destId"]
        if a not in backward and b not in backward:
            yield a, b
        elif a in backward and b in backward and not (colours[a] in led and colours[b] in led):
            yield b, a


# -- answers in the authors' format, and what they are worth


def split(instance: Instance, answer: Placed) -> Json:
    """The authors' output format."""
    machines: list[list[int]] = [[] for _ in instance.placement.device_kinds]
    for node, device in zip(instance.ids, answer.devices, strict=True):
        machines[device].append(node)
    count = instance.placement.kinds[0].count
    parts = [{"nodes": sorted(nodes)} for nodes in machines]
    return {"maxLoad": answer.seconds, "fpgas": parts[:count], "cpus": parts[count:]}


def judge(raw: Json, answer: Json) -> tuple[float, list[str]]:
    """(max-load, violations) of an answer, from the JSON texts alone."""
    place: dict[int, tuple[str, int]] = {}
    for kind in ("fpgas", "cpus"):
        for number, machine in enumerate(answer[kind]):
            place.update(dict.fromkeys(machine["nodes"], (kind, number)))
    wrong = []
    nodes = {node["id"]: node for node in raw["nodes"]}
    if set(place) != set(nodes):
        wrong.append("not every node is placed")
    if len(answer["fpgas"]) > raw["maxFPGAs"] or len(answer["cpus"]) > raw["maxCPUs"]:
        wrong.append("more devices than there are")
    load: dict[tuple[str, int], float] = {}
    held: dict[tuple[str, int], float] = {}
    homes: dict[Any, set[tuple[str, int]]] = {}
    for name, node in nodes.items():
        device = place[name]
        homes.setdefault(colour(node), set()).add(device)
        load[device] = load.get(device, 0.0) + node["fpgaLatency" if device[0] == "fpgas" else "cpuLatency"]
        if device[0] == "fpgas":
            held[device] = held.get(device, 0.0) + node.get("size", 0.0)
            if not node["supportedOnFpga"]:
                wrong.append(f"node {name} cannot run on an accelerator")
    wrong += [f"{shown} is on several devices" for shown, devices in homes.items() if len(devices) > 1]
    wrong += [f"{d} holds {b:.6g} bytes" for d, b in held.items() if b > raw["maxSizePerFPGA"] * (1 + 1e-12)]
    moved = {}
    for edge in raw["edges"]:
        source, taker = place[edge["sourceId"]], place[edge["destId"]]
        if source != taker:
            for device in (source, taker):
                if device[0] == "fpgas":
                    moved[device, edge["sourceId"]] = float(edge["cost"])
    for (device, _), cost in moved.items():
        load[device] = load.get(device, 0.0) + cost
    return max(load.values()), wrong


def judge_elsewhere(raw: Json, answer: Json, contiguity: str) -> tuple[float, list[str]] | None:
    """The same by the evaluator that came with the data, where it is there."""
    path = DATA / "evaluate.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("planner_data_evaluate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    instance = module.DnnInstance(raw)
    found = module.evaluate_throughput(instance, module.read_split(instance, answer), contiguity)
    return found["objective"], found["violations"]


# -- one instance, one row


@dataclass(frozen=True)
class Answer:
    """``notion``: the contiguity that the placement has; ``took``: seconds, reading included."""

    found: Placed | Infeasible
    took: float
    notion: str = ""
    wrong: tuple[str, ...] = ()


def contiguous(instance: Instance, began: float, seconds: float = CONTIGUOUS_SECONDS) -> Answer:
    joined = contract(instance.placement, instance.colours)
    return checked(instance, partition(joined, seconds=seconds), began, contiguous=True)


def anywhere(instance: Instance, start: Answer, seconds: float, began: float) -> Answer:
    joined = contract(instance.placement, instance.colours)
    first = None
    if isinstance(start.found, Placed):
        place = dict(zip(instance.colours, start.found.devices, strict=True))
        first = tuple(place[group] for group in range(joined.num_units))
    return checked(instance, scatter(joined, first, seconds=seconds), began, contiguous=False)


def checked(instance: Instance, found: Placed | Infeasible, began: float, *, contiguous: bool) -> Answer:
    """The answer for groups of nodes as one for nodes, judged."""
    took = time.perf_counter() - began
    if isinstance(found, Infeasible):
        return Answer(found, took)
    answer = Placed(tuple(found.devices[group] for group in instance.colours), found.seconds, found.bound)
    notion = shape(instance.placement, answer.devices)
    wrong = ["is not contiguous"] if contiguous and notion != "chain" else []
    raw, text = instance.raw, split(instance, answer)
    named = {"chain": "chain", "convex": "device", "none": "none"}[notion]
    for judged in (judge(raw, text), judge_elsewhere(raw, text, named)):
        if judged is not None:
            wrong += judged[1]
            if abs(judged[0] - answer.seconds) > 1e-9 * max(1.0, answer.seconds):
                wrong.append(f"claimed {answer.seconds!r}, is {judged[0]!r}")
    return Answer(answer, took, notion, tuple(wrong))


def published(name: str) -> Json:
    """What the authors' programs found on an instance: {program: {max_load, seconds}}."""
    path = DATA / "published" / "dnn-partitioning.json"
    if not path.exists():
        return {}
    known: Mapping[str, Json] = json.loads(path.read_text(encoding="utf-8"))["instances"]
    found: Json = known.get(name.replace("Graphs-", "Graphs/"), {}).get("authors_code_run_here", {})
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="instances (default: those beside the checkout)")
    parser.add_argument("--transfer-scale", type=float, default=1.0, help="multiplies every transfer")
    parser.add_argument("--memory-scale", type=float, default=1.0, help="multiplies the accelerators' memory")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="an instance, for the search without contiguity; 0: only contiguous",
    )
    parser.add_argument("-o", "--output", type=Path, help="a folder for the answers, in the authors' format")
    return parser.parse_args(argv)


HEAD = (
    f"{'':34} {'':>5} | {'the authors':^36} | {'contiguous, here':^27} | not necessarily contiguous, here\n"
    f"{'instance':34} {'nodes':>5} | {'dp':>11} {'s':>6} {'best other':>17} | {'max-load':>11} {'proof':>7} {'s':>7} | "
    f"{'max-load':>11} {'bound':>11} {'gap':>7} {'shape':>6} {'s':>6}"
)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    files = args.files or sorted((DATA / "dnn-partitioning").glob("*Graphs*.json"))
    if not files:
        print(f"no instances in {DATA}: name files, or set PARTITA_PLANNER_DATA")
        return 2
    as_published = args.transfer_scale == 1.0 and args.memory_scale == 1.0
    print(HEAD)
    failed = False
    for path in files:
        began = time.perf_counter()
        instance = read(path, args.transfer_scale, args.memory_scale)
        answers = {"contiguous": contiguous(instance, began)}
        if args.seconds > 0:
            answers["anywhere"] = anywhere(instance, answers["contiguous"], args.seconds, time.perf_counter())
        theirs = published(instance.name) if as_published else {}
        failed |= slower(theirs.get("dp"), answers["contiguous"]) or worse(theirs, answers)
        print(row(instance, theirs, answers), flush=True)
        for kind, answer in answers.items():
            for problem in answer.wrong:
                failed = True
                print(f"    WRONG, {kind}: {problem}")
            if args.output and isinstance(answer.found, Placed):
                args.output.mkdir(parents=True, exist_ok=True)
                text = json.dumps(split(instance, answer.found), indent=1)
                (args.output / f"{instance.name}.{kind}.json").write_text(text, encoding="utf-8")
    return int(failed)


def slower(dp: Json | None, answer: Answer) -> bool:
    """Whether the authors' program was better, or as good and (where it takes over a second) faster."""
    if dp is None or dp.get("max_load") is None:
        return False
    load = answer.found.seconds if isinstance(answer.found, Placed) else np.inf
    return bool(load > dp["max_load"] * (1 + 1e-9) or (dp["seconds"] > 1 and answer.took > dp["seconds"]))


def worse(theirs: Json, answers: Mapping[str, Answer]) -> bool:
    """Whether some program of the authors found a better placement than the best one here."""
    known = [r["max_load"] for r in theirs.values() if r.get("max_load") is not None and "warning" not in r]
    if not known or "anywhere" not in answers:
        return False
    found = answers["anywhere"].found
    return isinstance(found, Infeasible) or found.seconds > min(known) * (1 + 1e-6)


def row(instance: Instance, theirs: Json, answers: Mapping[str, Answer]) -> str:
    dp = theirs.get("dp")
    load, seconds = ("-", "-") if dp is None else (number(dp.get("max_load")), f"{dp['seconds']:.2f}")
    others = [(r["max_load"], name) for name, r in theirs.items() if name != "dp" and r.get("max_load") is not None]
    best = f"{min(others)[0]:.4f} {min(others)[1][:8]}" if others else "-"
    text = f"{instance.name:34} {len(instance.ids):5} | {load:>11} {seconds:>6} {best:>17} | "
    for kind, answer in answers.items():
        found = answer.found
        if isinstance(found, Infeasible):
            text += f"infeasible: {found.reason} ({answer.took:.2f} s) | "
        elif kind == "contiguous":
            proof = "proven" if found.proven else f"{found.gap:.2%}"
            text += f"{found.seconds:11.5f} {proof:>7} {answer.took:7.2f} | "
        else:
            gap = "proven" if found.proven else f"{found.gap:.2%}"
            text += f"{found.seconds:11.5f} {found.bound:11.5f} {gap:>7} {answer.notion:>6} {answer.took:6.1f}"
    return text.rstrip(" |")


def number(value: float | None) -> str:
    return "no answer" if value is None else f"{value:.5f}"


if __name__ == "__main__":
    sys.exit(main())
