"""Drawn instances in the published format: equal to the best of all placements where small, answered where large."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from placement_graphs import Family, instance

from benchmarks.planner import placements
from partita.planners.placing.problem import Placed, shape
from partita.planners.problem import Infeasible

FAMILIES: tuple[Family, ...] = ("layered", "series-parallel")


def read(tmp_path: Path, raw: dict[str, Any], **scales: float) -> placements.Instance:
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return placements.read(path, **scales)


def least(found: placements.Instance) -> dict[str, float]:
    """The least load of all placements that the judge accepts, of all and of chains."""
    best = {"none": np.inf, "chain": np.inf}
    groups = max(found.colours) + 1
    count = len(found.placement.device_kinds)
    for places in product(range(count), repeat=groups):
        devices = tuple(places[group] for group in found.colours)
        machines: list[dict[str, list[int]]] = [{"nodes": []} for _ in range(count)]
        for name, device in zip(found.ids, devices, strict=True):
            machines[device]["nodes"].append(name)
        load, wrong = placements.judge(found.raw, {"fpgas": machines[:-1], "cpus": machines[-1:]})
        if not wrong and load < max(best.values()):
            best["none"] = min(best["none"], load)
            if shape(found.placement, devices) == "chain":
                best["chain"] = min(best["chain"], load)
    return best


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("transfer, memory", [(1.0, 2.0), (1000.0, 2.0), (1.0, 1.1)])
def test_small_instances_equal_the_best_of_all_placements(
    tmp_path: Path, family: Family, training: bool, transfer: float, memory: float
) -> None:
    for seed in range(2):
        raw = instance(seed, family, 5, training=training, devices=3, memory=memory)
        found = read(tmp_path, raw, transfer_scale=transfer)
        best = least(found)
        line = placements.contiguous(found, time.perf_counter())
        free = placements.anywhere(found, line, 0.5, time.perf_counter())
        for answer, notion in ((line, "chain"), (free, "none")):
            assert answer.wrong == ()
            if isinstance(answer.found, Infeasible):
                assert best[notion] == np.inf
            else:
                assert answer.found.seconds == pytest.approx(best[notion], rel=1e-9)
                assert answer.found.bound <= best[notion] * (1 + 1e-9)
        assert isinstance(line.found, Infeasible) or line.found.proven


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transfer", [1.0, 1000.0])
def test_large_instances_are_answered_in_time_with_a_bound(tmp_path: Path, family: Family, transfer: float) -> None:
    found = read(tmp_path, instance(7, family, 50, training=True, devices=4), transfer_scale=transfer)
    began = time.perf_counter()
    line = placements.contiguous(found, began, seconds=2.0)
    free = placements.anywhere(found, line, 1.0, time.perf_counter())
    for answer in (line, free):
        assert answer.wrong == ()
        assert isinstance(answer.found, Placed)
        assert 0.0 < answer.found.bound <= answer.found.seconds
    assert free.found.seconds <= line.found.seconds
