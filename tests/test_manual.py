"""A person's split points: names that are modules, module calls or ops; every mistake named at once, with a remedy."""

from __future__ import annotations

import pytest
import torch
from dividing import cluster
from torch import nn

import partita
from partita.assign import assign
from partita.capture import capture
from partita.errors import PlanError
from partita.graph import Graph
from partita.manual import plan_from_cuts, plan_live, stage_names
from partita.plan import Plan, Stage


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.embed(x))
        for block in self.blocks:
            x = self.act(block(x))
        return self.head(x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(Net(), (torch.randn(4, 6),)).graph


def stages(graph: Graph, at: list[str]) -> list[list[str]]:
    plan = plan_from_cuts(graph, at, [f"cpu:{i}" for i in range(len(at) + 1)])
    stage_of = assign(plan, graph)
    return [[op.name for op in graph.ops if stage_of[op.name] == k] for k in range(len(at) + 1)]


def test_stage_k_begins_where_its_split_point_begins(graph: Graph) -> None:
    names = [op.name for op in graph.ops]
    for at in (["blocks.1"], ["blocks.1.fc2"], ["blocks.0", "head"], ["act@2"], [names[4]]):
        found = stages(graph, at)
        assert sum(found, []) == names, "contiguous, in the model's order"
        for k, name in enumerate(at):
            first = next(op for op in graph.ops if op.name == found[k + 1][0])
            assert first.name == name or first.module == name or first.module.startswith(f"{name}."), (at, found)


def test_whole_modules_are_listed_whole_and_come_back_from_the_plan_file(graph: Graph, tmp_path: object) -> None:
    plan = plan_from_cuts(graph, ["blocks.1"], ["cpu:0", "cpu:1"])
    assert "embed" in plan.stages[0].modules and "blocks.0" in plan.stages[0].modules
    assert "blocks.1" in plan.stages[1].modules and "head" in plan.stages[1].modules
    assert not any("fc" in name for stage in plan.stages for name in stage.modules)
    path = f"{tmp_path}/plan.yaml"
    plan.save(path)
    assert assign(partita.Plan.load(path), graph) == assign(plan, graph)


def test_any_map_of_ops_to_stages_can_be_written_in_names_and_read_back(graph: Graph) -> None:
    for cut in range(1, len(graph.ops)):
        stage_of = {op.name: int(i >= cut) for i, op in enumerate(graph.ops)}
        names = stage_names(graph, stage_of, 2)
        plan = Plan(tuple(Stage((f"cpu:{k}",), modules=m, ops=o) for k, (m, o) in enumerate(names)))
        assert assign(plan, graph) == stage_of, graph.ops[cut].name


def test_every_wrong_split_point_is_named_at_once_with_what_is_near(graph: Graph) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_cuts(graph, ["block.1", "head", "blocks.0", "embed"], [f"cpu:{i}" for i in range(5)])
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "'block.1' names no module or op that runs; did you mean blocks.1" in text
    assert "'blocks.0' runs before 'head'" in text
    assert "'embed' is the very beginning of the model" in text


def test_too_few_devices_says_how_many_are_needed(graph: Graph) -> None:
    with pytest.raises(
        PlanError, match="2 split points make 3 stages, but there are 2 devices: give 3 devices or fewer"
    ):
        plan_from_cuts(graph, ["blocks.1", "head"], ["cpu:0", "cpu:1"])


def test_a_live_plan_gives_each_device_near_equal_bytes_or_begins_where_it_is_told() -> None:
    children = (("a", 10), ("b", 10), ("c", 10), ("d", 10))
    even = plan_live(children, "Net", ["cpu:0", "cpu:1"])
    assert [stage.modules for stage in even.stages] == [("a", "b"), ("c", "d")]
    told = plan_live(children, "Net", ["cpu:0", "cpu:1"], at=("d",))
    assert [stage.modules for stage in told.stages] == [("a", "b", "c"), ("d",)]
    with pytest.raises(PlanError, match="split point 'dd' is not a module; did you mean d"):
        plan_live(children, "Net", ["cpu:0", "cpu:1"], at=("dd",))


def test_split_runs_the_model_with_its_own_numbers() -> None:
    model, x = Net(), torch.randn(4, 6)
    parallel = partita.split(model, (x,), at=["blocks.1", "head"], devices=cluster(3), microbatches=2)
    torch.testing.assert_close(parallel(x), model(x), rtol=1e-5, atol=1e-6)
    assert [stage.devices for stage in parallel.plan.stages] == [("cpu:0",), ("cpu:1",), ("cpu:2",)]
