"""Layouts of large models: nothing better was passed over, memory holds, and the plan says what was chosen."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from partita import plan_file, plan_text
from partita.assign import assign
from partita.capture import capture
from partita.cluster import Cluster
from partita.cluster_file import describe
from partita.cost.roofline import Assumptions
from partita.errors import InfeasibleError, UsageError
from partita.graph import Graph
from partita.models import GPTSize
from partita.models.catalog import build
from partita.planners.large.degrees import Layout
from partita.planners.large.pools import pools
from partita.planners.large.result import plan_large
from partita.planners.large.search import Limits, Search
from partita.planners.large.units import units
from partita.schedules import schedule

DATA = Path(os.environ.get("PARTITA_PLANNER_DATA", Path(__file__).resolve().parents[2] / "shared" / "planner-data"))
MEGATRON = DATA / "published" / "megatron-sc21-table1.json"


def gpt(layers: int, hidden: int, heads: int, length: int = 512, **options: bool) -> Graph:
    tokens = torch.zeros(2, length, dtype=torch.int64, device="meta")
    return capture(build(GPTSize(layers, hidden, heads, 8192, **options)), (tokens, tokens)).graph  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> Graph:
    return gpt(12, 1024, 16)


@pytest.fixture(scope="module")
def large() -> Graph:
    return gpt(12, 8192, 64)


def search(graph: Graph, cluster: Cluster | str, batch: int, **options: object) -> Search:
    there = cluster if isinstance(cluster, Cluster) else describe(cluster)
    assume = Assumptions()
    return Search(graph, units(graph), pools(there, assume), batch=batch, assume=assume, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "memory"), [("4xA100", 80e9), ("4xA100", 6e9), ("2x2xV100", 6e9), ("2xA100 + 2xV100", 6e9)]
)
def test_no_layout_is_faster_than_the_one_found_and_no_bound_is_above_its_layout(
    small: Graph, spec: str, memory: float
) -> None:
    cluster = describe(spec)
    cluster = replace(cluster, devices=tuple(replace(d, memory_bytes=int(memory)) for d in cluster.devices))
    looking = search(small, cluster, 16)
    found = looking.run(60.0)
    assert found.layouts and found.gap <= 1e-9
    every = []
    for degrees in looking._all():
        rows = looking.rows(degrees)
        assert rows is not None
        layout = looking.pricer.price(degrees, rows)
        if layout is not None:
            every.append(layout.seconds)
            assert looking.pricer.bound(degrees, rows) <= layout.seconds * (1 + 1e-9)
            assert all(s.memory <= 0.95 * memory + 1 for s in layout.stages), degrees
    assert found.layouts[0].seconds == pytest.approx(min(every), rel=0.005)


def test_more_memory_never_makes_a_model_slower(large: Graph) -> None:
    seconds = []
    for memory in (40e9, 60e9, 80e9, 160e9):
        cluster = describe("4x8xA100")
        cluster = replace(cluster, devices=tuple(replace(d, memory_bytes=int(memory)) for d in cluster.devices))
        seconds.append(search(large, cluster, 128).run().layouts[0].seconds)
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("spec", ["4x8xA100", "6xA100", "7xA100", "8xA100-80GB + 2x8xV100-32GB"])
def test_the_plan_runs_every_op_once_on_devices_that_are_there(small: Graph, spec: str) -> None:
    cluster = describe(spec)
    made = plan_large(small, cluster, batch=64)
    names = {d.name for d in cluster.devices}
    stage_of = assign(made.plan, small)
    assert set(stage_of) == {op.name for op in small.ops}
    assert set(stage_of.values()) == set(range(len(made.plan.stages)))
    used = [d for stage in made.plan.stages[: made.layout.degrees.stages] for d in stage.devices]
    assert len(used) == len(set(used)) == made.layout.degrees.devices <= len(names)
    assert set(used) <= names
    assert plan_file.loads(plan_file.dumps(made.plan)).stages == made.plan.stages


def test_tensor_groups_lie_within_a_node(large: Graph) -> None:
    cluster = describe("4x8xA100-40GB")
    made = plan_large(large, cluster, batch=64, limits=Limits(degree=8))
    node = {d.name: d.node for d in cluster.devices}
    for stage in made.plan.stages:
        assert stage.tensor == 8
        assert all(len({node[d] for d in group}) == 1 for group in stage.groups)
    placed = dict(made.plan.stages[0].shard)
    assert placed["layers.*.mlp.up.weight"] == "Shard(0)" and placed["layers.*.mlp.down.weight"] == "Shard(1)"


def test_a_faster_pool_gets_more_of_the_model(large: Graph) -> None:
    made = plan_large(large, describe("8xA100-80GB + 8xV100-32GB"), batch=64, constraints={"stages": 2})
    share: dict[int, int] = {}
    for stage in made.layout.stages:
        pool = made.layout.degrees.groups[stage.group].pool
        share[pool] = share.get(pool, 0) + sum(b - a for a, b in stage.spans)
    assert share[0] > share[1] > 0


def test_reasons_say_what_binds_and_what_more_would_bring(large: Graph) -> None:
    cluster = describe("8xA100")
    cluster = replace(cluster, devices=tuple(replace(d, memory_bytes=int(24e9)) for d in cluster.devices))
    said = "\n".join(plan_large(large, cluster, batch=64).plan.reasons)
    for words in (
        "layout:",
        "Tflop/s a device",
        "is fullest with",
        "next best:",
        "had it been otherwise",
        "of that: weights",
    ):
        assert words in said
    complete = plan_text.complete(plan_large(large, cluster, batch=64).plan)
    more = [line for line in complete.reasons if line.startswith("half as much memory again: ")]
    assert len(more) == 1 and "samples a second" in more[0]
    again = plan_large(large, cluster, batch=64, limits=Limits(recompute="all")).plan
    assert "recomputed in backward" in "\n".join(again.reasons)
    assert any(stage.recompute for stage in again.stages)


def test_remedies_of_what_does_not_fit_do_fit(large: Graph) -> None:
    with pytest.raises(InfeasibleError, match="times as many devices fit") as caught:
        plan_large(large, describe("8xV100-16GB"), batch=64)
    times = int(str(caught.value).split(" times as many")[0].split()[-1])
    assert plan_large(large, describe(f"{times}x8xV100-16GB"), batch=64).plan.stages


def test_an_unknown_objective_is_refused(small: Graph) -> None:
    with pytest.raises(UsageError, match="inference"):
        plan_large(small, describe("8xA100"), objective="serve")


def test_inference_needs_no_gradients(large: Graph) -> None:
    train = plan_large(large, describe("8xA100-80GB"), batch=8, limits=Limits(degree=8))
    serve = plan_large(large, describe("8xA100-80GB"), batch=8, objective="inference", limits=Limits(degree=8))
    assert serve.layout.seconds < 0.5 * train.layout.seconds
    assert max(s.memory for s in serve.layout.stages) < max(s.memory for s in train.layout.stages)


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(12))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + F.relu(block(x))
        return self.head(x.mean((2, 3)))


def test_convolutions_are_planned_by_the_same_counts() -> None:
    with torch.device("meta"):
        graph = capture(ResNetLike(), (torch.zeros(4, 3, 64, 64),)).graph
    made = plan_large(graph, describe("7xT4"), batch=70)
    assert made.layout.degrees.devices == 7
    assert made.plan.predicted is not None and made.plan.predicted.step_seconds > 0


@pytest.mark.skipif(not MEGATRON.is_file(), reason="the data folder with published throughput is not there")
@pytest.mark.parametrize("row", [1, 3])
def test_published_throughput_is_predicted_within_a_tenth(row: int) -> None:
    """Narayanan et al. (2021), Table 1; rows the constant was not fitted on. All: benchmarks/planner/megatron.py."""
    from benchmarks.planner.megatron import as_published, assumptions, graph_of, runs

    run = runs()[row]
    assert len(json.loads(MEGATRON.read_text())["rows"]) == 10
    layout = as_published(run, graph_of(run), assumptions())
    assert layout is not None
    assert run.tflops(layout.seconds) == pytest.approx(run.achieved, rel=0.10)


def played(layout: Layout) -> float:
    """Seconds of the step's microbatches when the schedule's true order is played with a clock; sending is free."""
    degrees = layout.degrees
    p, v, m = degrees.stages, degrees.chunks, layout.microbatches
    placement = tuple((str(s % p),) for s in range(p * v))
    orders = schedule("interleaved" if v > 1 else "1f1b", placement, m)
    ended: dict[tuple[str, int, int], float] = {}
    clock, at = dict.fromkeys(orders, 0.0), dict.fromkeys(orders, 0)
    while any(at[d] < len(orders[d]) for d in orders):
        before = sum(at.values())
        for device, steps in orders.items():
            while at[device] < len(steps):
                step = steps[at[device]]
                back = step.kind == "B"
                needs = [("F", step.stage, step.microbatch)] if back else []
                beside = step.stage + 1 if back else step.stage - 1
                if 0 <= beside < p * v:
                    needs.append((step.kind, beside, step.microbatch))
                if any(need not in ended for need in needs):
                    break
                stage = layout.stages[step.stage % p]
                seconds = (stage.backward if back else stage.forward) / v
                clock[device] = max([clock[device], *(ended[need] for need in needs)]) + seconds
                ended[step.kind, step.stage, step.microbatch] = clock[device]
                at[device] += 1
        assert sum(at.values()) > before
    return max(clock.values())


@pytest.mark.parametrize(("stages", "chunks", "most"), [(4, 1, 0.02), (7, 1, 0.02), (4, 2, 0.06), (2, 5, 0.06)])
def test_the_closed_form_is_what_playing_the_schedule_takes(
    small: Graph, stages: int, chunks: int, most: float
) -> None:
    order = "1f1b" if chunks == 1 else ""
    looking = search(small, f"{stages}xA100", 28, limits=Limits(1, stages, 1, 1, chunks, order=order))
    layout = looking.run().layouts[0]
    free = replace(layout, stages=tuple(replace(s, transfer=0.0, tail=0.0) for s in layout.stages))
    times = looking.pricer._summed(layout.degrees, free.stages, layout.microbatches, 0.0)
    assert played(free) == pytest.approx(times.seconds, rel=most)
