"""The published formats are read as their authors mean them: colours, CPUs, unsupported and orphaned backward nodes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planner import piper, placements
from partita.planners.pipeline3d import Pipelined, pipeline3d
from partita.planners.placing.problem import shape


def node(name: int, fast: float, slow: float, **more: Any) -> dict[str, Any]:
    given = {"supportedOnFpga": 1, "isBackwardNode": 0, "size": 1.0, **more}
    return {"id": name, "fpgaLatency": fast, "cpuLatency": slow, **given}


def training() -> dict[str, Any]:
    """0 -> 1 -> 2 forward, their backward nodes in the same colours, one orphan 13 between two of them."""
    nodes = [
        node(0, 3.0, 9.0, colorClass=0), node(1, 2.0, 4.0, colorClass=1, supportedOnFpga=0),
        node(2, 4.0, 9.0, colorClass=2),
        node(10, 3.0, 9.0, colorClass=0, isBackwardNode=1), node(12, 4.0, 9.0, colorClass=2, isBackwardNode=1),
        node(13, 5.0, 9.0, isBackwardNode=1, size=2.0),
    ]  # fmt: skip
    pairs = [(0, 1, 0.5), (1, 2, 0.25), (2, 12, 1.0), (12, 13, 0.125), (13, 10, 2.0), (0, 10, 0.5)]
    edges = [{"sourceId": a, "destId": b, "cost": cost} for a, b, cost in pairs]
    return {"maxFPGAs": 2, "maxCPUs": 1, "maxSizePerFPGA": 4.0, "nodes": nodes, "edges": edges}


def test_orphaned_backward_nodes_are_ordered_by_turning_their_edges_round() -> None:
    assert set(placements.orderings(training())) == {(0, 1), (1, 2), (13, 12), (10, 13)}


@pytest.mark.parametrize("wanted", ["chain", "none"])
def test_answers_are_the_best_of_all_that_the_judge_finds_feasible(tmp_path: Path, wanted: str) -> None:
    path = tmp_path / "Tiny.json"
    path.write_text(json.dumps(training()), encoding="utf-8")
    instance = placements.read(path)
    best = float("inf")
    for devices in product(range(3), repeat=len(instance.ids)):
        machines = [[i for i, d in zip(instance.ids, devices, strict=True) if d == k] for k in range(3)]
        answer = {"fpgas": [{"nodes": machines[0]}, {"nodes": machines[1]}], "cpus": [{"nodes": machines[2]}]}
        load, wrong = placements.judge(instance.raw, answer)
        if not wrong and (wanted == "none" or shape(instance.placement, devices) == "chain"):
            best = min(best, load)
    contiguous = placements.contiguous(instance, 0.0)
    found = contiguous if wanted == "chain" else placements.anywhere(instance, contiguous, 0.5, 0.0)
    assert found.wrong == ()
    assert not hasattr(found.found, "reason")
    assert found.found.seconds == pytest.approx(best)


def test_more_memory_than_there_is_is_reported_as_infeasible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = training()
    del raw["nodes"][1]
    raw["edges"] = [edge for edge in raw["edges"] if 1 not in (edge["sourceId"], edge["destId"])]
    path = tmp_path / "Tiny.json"
    path.write_text(json.dumps({**raw, "maxCPUs": 0}), encoding="utf-8")
    assert placements.main([str(path), "--memory-scale", "0.25", "--seconds", "1"]) == 0
    assert capsys.readouterr().out.count("infeasible") == 2


def test_answers_are_written_in_the_authors_format_and_read_back_alike(tmp_path: Path) -> None:
    path = tmp_path / "Tiny.json"
    path.write_text(json.dumps(training()), encoding="utf-8")
    assert placements.main([str(path), "--seconds", "0.2", "-o", str(tmp_path / "out")]) == 0
    for kind in ("contiguous", "anywhere"):
        answer = json.loads((tmp_path / "out" / f"Tiny.{kind}.json").read_text(encoding="utf-8"))
        assert placements.judge(training(), answer) == (pytest.approx(answer["maxLoad"]), [])


def test_published_contiguous_optima_are_met() -> None:
    files = sorted((placements.DATA / "dnn-partitioning").glob("OperatorGraphs*bert*.json"))
    if not files:
        pytest.skip("no planner data beside the checkout")
    for path in files:
        instance = placements.read(path)
        found = placements.contiguous(instance, 0.0)
        assert found.wrong == ()
        theirs = placements.published(instance.name)["dp"]["max_load"]
        assert found.found.seconds == pytest.approx(theirs, rel=1e-9)
        assert found.found.proven


def test_the_published_pipeline_is_met_and_judged_alike() -> None:
    files = sorted((piper.DATA / "piper").glob("*.json"))
    if not files:
        pytest.skip("no planner data beside the checkout")
    raw = piper.configured(json.loads(files[0].read_text(encoding="utf-8")), 8 * piper.GIB, 8)
    problem = piper.read(raw)
    answer = pipeline3d(problem)
    assert isinstance(answer, Pipelined)
    seconds, wrong = piper.judge(raw, piper.written(raw, problem, answer))
    assert wrong == []
    assert seconds == pytest.approx(answer.seconds)
    assert seconds == pytest.approx(piper.published("bert32_8_8")[0], rel=1e-8)
