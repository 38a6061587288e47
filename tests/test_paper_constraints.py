"""Constraints on described clusters: each is met by every plan, names that mean nothing and contradictions are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.assign import assign
from partita.capture import capture
from partita.cli import main
from partita.cluster_file import describe
from partita.errors import InfeasibleError, PlanError, UsageError
from partita.graph import Graph
from partita.models import GPTSize
from partita.models.catalog import build
from partita.plan import Plan
from partita.planners.large.result import plan_large


@pytest.fixture(scope="module")
def graph() -> Graph:
    tokens = torch.zeros(2, 512, dtype=torch.int64, device="meta")
    return capture(build(GPTSize(12, 1024, 16, 8192)), (tokens, tokens)).graph


def planned(graph: Graph, spec: str = "2x4xA100", batch: int = 32, **constraints: Any) -> Plan:
    return plan_large(graph, describe(spec), batch=batch, constraints=constraints, seconds=2.0).plan


def stage_with(plan: Plan, graph: Graph, module: str) -> set[int]:
    stage_of = assign(plan, graph)
    return {stage_of[op.name] for op in graph.ops if op.module == module or op.module.startswith(module + ".")}


def test_degrees_are_as_fixed(graph: Graph) -> None:
    plan = planned(graph, stages=2, tensor=2, replicas=2, zero=1, microbatches=8, schedule="1f1b")
    assert len(plan.stages) == 2 and plan.zero == 1 and plan.batch.microbatches == 8 and plan.schedule == "1f1b"
    assert all(stage.tensor == 2 and len(stage.groups) == 2 for stage in plan.stages)
    assert len(planned(graph, max_stages=3, tensor=1, replicas=2).stages) <= 3
    dealt = planned(graph, stages=8, stages_per_device=2)
    assert len(dealt.stages) == 8 and len({s.devices for s in dealt.stages}) == 4 and dealt.schedule == "interleaved"
    assert planned(graph, schedule="zero_bubble", stages=4).schedule == "zero_bubble"
    assert planned(graph, schedule="gpipe", stages=2).schedule == "gpipe"
    assert planned(graph, microbatches=7).batch.microbatches == 7


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_stage_begins_where_it_must(graph: Graph, schedule: str) -> None:
    plan = planned(graph, split_before=["layers.3", "layers.9"], schedule=schedule)
    for name, before in (("layers.3", "layers.2"), ("layers.9", "layers.8")):
        assert min(stage_with(plan, graph, name)) > max(stage_with(plan, graph, before))


def test_what_is_kept_together_is_in_one_stage(graph: Graph) -> None:
    each = planned(graph, keep_together=["layers.*"], stages=4)
    assert all(len(stage_with(each, graph, f"layers.{i}")) == 1 for i in range(12))
    both = planned(graph, keep_together=[["layers.0", "layers.8"]], stages=3, schedule="1f1b")
    assert len(stage_with(both, graph, "layers.0") | stage_with(both, graph, "layers.8")) == 1


def test_a_placed_module_runs_there(graph: Graph) -> None:
    plan = planned(graph, stages=4, place={"layers.11": "node0/cuda:0", "layers.0": "node1/cuda:3"})
    for module, device in (("layers.11", "node0/cuda:0"), ("layers.0", "node1/cuda:3")):
        assert all(device in plan.stages[s].devices for s in stage_with(plan, graph, module))
    assert len({d for s in plan.stages for d in s.devices}) == sum(len(s.devices) for s in plan.stages)
    mixed = planned(graph, "2xA100-80GB + 2xV100-16GB", place={"layers.0": "V100-16GB"}, stages=2)
    assert all(d.startswith("node1/") for s in stage_with(mixed, graph, "layers.0") for d in mixed.stages[s].devices)


def test_what_is_to_be_recomputed_is_and_nothing_else(graph: Graph) -> None:
    plan = planned(graph, recompute=["layers.2", "layers.3"])
    assert {name for stage in plan.stages for name in stage.recompute} == {"layers.2", "layers.3"}
    part = planned(graph, recompute=["layers.*.attention"], stages=2, schedule="1f1b")
    again = {name for stage in part.stages for name in stage.recompute}
    assert {f"layers.{i}.attention" for i in range(12)} <= again and not any("mlp" in name for name in again)


def test_a_parameter_is_divided_as_asked(graph: Graph) -> None:
    free = dict(planned(graph, tensor=4).stages[0].shard)
    assert free["layers.*.mlp.up.weight"] == "Shard(0)"
    asked = planned(graph, shard={"layers.*.mlp.up.weight": "Shard(1)"})
    assert all(stage.tensor > 1 for stage in asked.stages)
    assert dict(asked.stages[-1].shard)["layers.*.mlp.up.weight"] == "Shard(1)"
    whole = planned(graph, shard={"layers.*.mlp.up.weight": "Replicate"}, tensor=4)
    assert "layers.*.mlp.up.weight" not in dict(whole.stages[0].shard)


def test_degrees_go_over_nodes_only_where_allowed(graph: Graph) -> None:
    with pytest.raises(PlanError, match="tensor 8 cannot be met by itself"):
        planned(graph, tensor=8)
    assert planned(graph, tensor=8, tp_within_node=False).stages[0].tensor == 8


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        ({"stages": 3, "max_stages": 2, "zero": 1}, "smallest conflicting set: max_stages 2, stages 3\n"),
        ({"split_before": ["layers.3"], "max_stages": 1},
         "smallest conflicting set: split_before 'layers.3', max_stages 1"),
        ({"keep_together": ["layers"], "split_before": ["layers.4"], "tensor": 2},
         "smallest conflicting set: keep_together 'layers', split_before 'layers.4'\n"),
        ({"replicas": 8, "tensor": 2}, "smallest conflicting set: replicas 8, tensor 2"),
        ({"microbatches": 4, "replicas": 8}, "smallest conflicting set: microbatches 4, replicas 8"),
        ({"tensor": 3}, "tensor 2 instead of 3 works"),
        ({"split_before": ["layer.3"]}, "did you mean layers.3"),
        ({"shard": {"layers.0.mlp.upp.weight": "Shard(0)"}}, "names no parameter"),
        ({"place": {"layers.1": "H100"}}, "no device or kind 'H100'"),
    ],
)  # fmt: skip
def test_contradictions_are_told_with_the_smallest_set_and_what_works(
    graph: Graph, constraints: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        planned(graph, **constraints)
    assert said in str(caught.value)
    for remedy in caught.value.remedies[:2]:
        assert plan_large(graph, describe("2x4xA100"), batch=32, seconds=2.0, **remedy.change).plan.stages


def test_what_memory_forbids_names_the_constraint_and_offers_what_fits(graph: Graph) -> None:
    asked = {"max_stages": 1, "tensor": 1, "zero": 0}
    cluster = describe("4xV100-16GB")
    cluster = replace(cluster, devices=tuple(replace(d, memory_bytes=int(4.6e9)) for d in cluster.devices))
    with pytest.raises(InfeasibleError, match="within the devices' memory these cannot be met: max_stages 1") as caught:
        plan_large(graph, cluster, batch=64, constraints=asked)
    assert caught.value.remedies
    for remedy in caught.value.remedies:
        change = {
            "cluster": cluster,
            "batch": 64,
            "constraints": {"max_stages": 1, "tensor": 1, "zero": 0},
            **remedy.change,
        }
        assert plan_large(graph, change.pop("cluster"), seconds=2.0, **change).plan.stages


def test_a_mistake_in_writing_is_refused(graph: Graph) -> None:
    for wrong in ({"split_befor": ["x"]}, {"zero": 4}, {"tp_within_node": "no"}, {"shard": {"a": "Split(0)"}}):
        with pytest.raises(UsageError, match="constraints: "):
            planned(graph, **wrong)


def test_the_command_line_takes_constraints_with_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("tensor: 2\nstages: 2\n")
    words = ["plan", "gpt2", "--seq", "128", "--cluster", "2x4xA100", "--batch", "32", "--constraints", str(rules)]
    assert main([*words, "--constraint", "schedule=1f1b", "-o", str(tmp_path / "p.yaml"), "--json"]) == 0
    plan = Plan.load(tmp_path / "p.yaml")
    assert len(plan.stages) == 2 and {s.tensor for s in plan.stages} == {2} and plan.schedule == "1f1b"
    capsys.readouterr()
    assert main([*words, "--constraint", "max_stages=1"]) == 2
    assert "smallest conflicting set: max_stages 1, stages 2" in capsys.readouterr().err
