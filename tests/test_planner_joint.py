"""Tensor degrees and ZeRO levels that the planner chooses itself: where they pay, where nothing else fits, and why."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_graphs import cluster, mlp

from partita.apart import passes, simulate_apart
from partita.assign import assign
from partita.check import check
from partita.cluster import Cluster, Link
from partita.errors import InfeasibleError, PlanError, UsageError
from partita.graph import Graph
from partita.plan import Plan
from partita.plan_text import complete
from partita.planners.auto import auto
from partita.planners.divided import part_of
from partita.planners.teams import partitions, teamings, teams_of
from partita.predict import predict
from partita.sharding.batch import layouts

ONE_SAMPLE = mlp(4, width=512, deep=True, batch=1)
DEEP = mlp(8, width=128, deep=True, batch=16)
WEIGHTS = 8 * 128 * 128 * 4


def plan(graph: Graph, where: Cluster, **options: Any) -> Plan:
    made = auto(graph, layouts(graph), where, **options)
    assert made.predicted is not None
    assert check(made, graph, where, layouts(graph), memory=dict(made.predicted.memory)) == ()
    return made


def degrees(made: Plan) -> list[int]:
    return [stage.tensor for stage in made.stages]


def nodes(count: int, per_node: int) -> Cluster:
    """GPUs with fast links inside a node and slow ones between."""
    found = cluster(count, kind="cuda")
    devices = tuple(replace(d, node=i // per_node) for i, d in enumerate(found.devices))
    links = [Link("*", "*", 1e8, 1e-5)]
    for first in range(0, count, per_node):
        mine = [d.name for d in devices[first : first + per_node]]
        links += [Link(a, b, 1e12, 0.0) for a in mine for b in mine if a < b]
    return Cluster(devices, tuple(links))


# -- tensor degrees ------------------------------------------------------------------------------------------------


def test_a_batch_of_one_is_shared_by_dividing_ops() -> None:
    made = plan(ONE_SAMPLE, cluster(2, kind="cuda"))
    assert degrees(made) == [2] and made.predicted is not None
    assert made.predicted.step_seconds < 0.6 * made.predicted.one_device_seconds
    assert any(line.startswith("stage 0: every 2 devices divide single ops") for line in made.reasons)


def test_an_op_whose_parameters_fit_on_no_device_is_divided() -> None:
    wide = mlp(1, width=512, deep=True, batch=8)
    where = cluster(2, memory=int(0.7 * 4 * 512 * 512 * 4))
    assert degrees(plan(wide, where)) == [2]
    with pytest.raises(InfeasibleError, match="tensor 2 instead of 1 works"):
        plan(wide, where, constraints={"tensor": 1})


def test_three_devices_make_a_team_of_two_and_leave_none_idle_where_that_pays() -> None:
    made = plan(mlp(3, width=510, deep=True, batch=1), cluster(3, kind="cuda"))
    assert sum(len(stage.devices) for stage in made.stages) == 3 and max(degrees(made)) > 1


def test_where_the_batch_shares_the_work_nothing_is_divided_and_the_plan_says_so() -> None:
    made = plan(mlp(6, width=256, deep=True, batch=64), cluster(2, kind="cuda"))
    assert degrees(made) == [1]
    said = next(line for line in made.reasons if line.startswith("single ops are not divided"))
    possible = float(re.search(r"more than (.+?)%", said)[1]) / 100  # type: ignore[index]
    assert made.predicted is not None
    assert made.predicted.one_device_seconds / 2 * (1 + possible) == pytest.approx(
        made.predicted.step_seconds, rel=1e-2
    )


def test_cores_of_one_process_divide_ops_only_where_nothing_else_fits() -> None:
    assert degrees(plan(ONE_SAMPLE, cluster(2), constraints={"max_stages": 1})) == [1]
    assert degrees(plan(ONE_SAMPLE, cluster(2), processes=True)) == [2]


def test_slow_links_between_members_make_division_not_worth_it() -> None:
    slow = cluster(2, kind="cuda")
    slow = replace(slow, links=(Link("*", "*", 1e6, 1e-3),))
    assert degrees(plan(ONE_SAMPLE, slow)) == [1]


def test_what_a_divided_plan_is_said_to_take_is_what_predict_gives() -> None:
    for where, options in (
        (cluster(2, kind="cuda"), {}), (cluster(4), {"constraints": {"tensor": 2, "stages": 2}}),
        (cluster(4), {"constraints": {"tensor": 2, "replicas": 2}}),
    ):  # fmt: skip
        graph = DEEP if options else ONE_SAMPLE
        made = plan(graph, where, **options)
        trace = predict(graph, made, where)
        assert made.predicted is not None and set(degrees(made)) == {2}
        assert trace.step_seconds == pytest.approx(made.predicted.step_seconds, rel=0.02)
        assert dict(trace.memory) == pytest.approx(dict(made.predicted.memory), rel=0.02)


def test_a_large_graph_is_divided_block_by_block_to_nearly_the_same_end() -> None:
    """Where equal blocks are priced once, the plan is as good as where the whole graph is divided at once."""
    deep = mlp(120, width=256, deep=True, batch=1)
    made = plan(deep, cluster(2, kind="cuda"))
    assert degrees(made) == [2] and made.predicted is not None
    assert made.predicted.step_seconds < 0.6 * made.predicted.one_device_seconds


def test_a_part_of_a_graph_has_what_its_ops_use_and_gives_what_others_use() -> None:
    part = part_of(DEEP, range(4, 8))
    assert [op.name for op in part.ops] == [op.name for op in DEEP.ops[4:8]]
    assert part.outputs == ("r3",) and part.producer("r1") is None
    assert {t.name for t in part.tensors} == {"r1", "w2", "h2", "r2", "w3", "h3", "r3"}


@given(st.integers(1, 9), st.sets(st.integers(1, 4), min_size=1))
def test_partitions_use_all_devices_but_fewer_than_the_smallest_team(count: int, sizes: set[int]) -> None:
    found = list(partitions(count, sorted(sizes)))
    assert len(found) == len(set(found))
    for teams in found:
        assert 0 <= count - sum(members * number for members, number in teams) < min(sizes)
    assert len(list(teamings([count, 2], [1, 2]))) == len(list(partitions(count, [1, 2]))) * 2


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans())
def test_teams_are_disjoint_and_of_neighbours(count: int, per_node: int, degree: int, near: bool, every: bool) -> None:
    where = nodes(count, per_node)
    for teaming in teams_of(where, degree=degree, within_node=near, every=every and count <= 5):
        members = Counter(d for team in teaming.teams.values() for d in team)
        members.update(d.name for d in teaming.cluster.devices if d.name not in teaming.teams)
        assert max(members.values()) == 1 and set(members) <= {d.name for d in where.devices}
        for team in teaming.teams.values():
            assert degree in (0, len(team))
            assert not near or len({where.device(d).node for d in team}) == 1


# -- ZeRO ----------------------------------------------------------------------------------------------------------


def ranks(part: float, **options: Any) -> Plan:
    """Four processes with this part of what parameters, gradients and AdamW's state take, one replica each."""
    where = cluster(4, memory=int(4 * WEIGHTS * part))
    return plan(DEEP, where, processes=True, constraints={"replicas": 4, "microbatches": 4, **options})


def test_zero_is_taken_as_far_as_memory_asks_and_no_further() -> None:
    levels = [ranks(part).zero for part in (2.0, 0.9, 0.4)]
    assert levels == [0, 2, 3]
    with pytest.raises(InfeasibleError):
        ranks(0.9, zero=0)


def test_zero_divides_what_the_paper_says_by_the_number_of_replicas() -> None:
    held = [dict(ranks(4.0, zero=level).predicted.memory)["cpu:1"] for level in range(4)]  # type: ignore[union-attr]
    assert held[0] - held[1] == pytest.approx(2 * WEIGHTS * 3 / 4)
    assert held[1] > held[2] > held[3]
    assert held[2] - held[3] == pytest.approx(WEIGHTS * 3 / 4 - 2 * WEIGHTS / 8)  # two of eight blocks are gathered


def test_zero_costs_the_passes_round_the_ring_that_the_paper_counts() -> None:
    assert [passes(level, once=True) for level in range(4)] == [2, 3, 2, 3]
    assert [passes(level, once=False) for level in range(4)] == [2, 3, 2, 2]
    slow = replace(cluster(4, kind="cuda"), links=(Link("*", "*", 1e8, 0.0),))
    fixed = {"replicas": 4, "microbatches": 4}
    times = [
        plan(DEEP, slow, processes=True, constraints={**fixed, "zero": level}).predicted.step_seconds  # type: ignore[union-attr]
        for level in range(4)
    ]
    assert times[1] - times[0] == pytest.approx(3 / 4 * WEIGHTS / 1e8, rel=1e-3)
    assert times[2] == pytest.approx(times[0]) and times[3] == pytest.approx(times[1])


def test_in_one_process_zero_is_never_chosen_but_offered_where_only_processes_would_help() -> None:
    where = cluster(4, memory=int(4 * WEIGHTS * 0.9))
    with pytest.raises(InfeasibleError) as caught:
        plan(DEEP, where, constraints={"max_stages": 1, "tensor": 1})
    offered = [r for r in caught.value.remedies if "with a process a device" in r.text]
    assert offered
    assert plan(DEEP, where, **offered[0].change).zero > 0
    assert plan(DEEP, cluster(4, memory=int(4 * WEIGHTS * 0.3))).zero == 0


def test_processes_hold_their_parameters_themselves() -> None:
    fixed = {"constraints": {"replicas": 2, "microbatches": 2, "tensor": 1}}
    shared, own = (plan(DEEP, cluster(2), processes=apart, **fixed).predicted for apart in (False, True))
    assert shared is not None and own is not None
    more = dict(own.memory)["cpu:1"] - dict(shared.memory)["cpu:1"]
    assert more == pytest.approx(4 * WEIGHTS, rel=0.01)  # weights, state, and gradients that replicas make once
    assert simulate_apart is not None


# -- constraints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraints",
    [
        {"keep_together": [["blocks.1", "blocks.6"]]}, {"split_before": ["blocks.3"]},
        {"place": {"blocks.5*": "cpu:3"}},
        {"recompute": ["blocks.2"]}, {"max_stages": 1}, {"microbatches": 4, "stages": 2}, {"replicas": 2},
        {"schedule": "gpipe", "stages": 2}, {"shard": {"blocks.*.fc.weight": "Shard(1)"}}, {"tp_within_node": True},
    ],
)  # fmt: skip
def test_constraints_hold_for_plans_of_divided_ops(constraints: dict[str, Any]) -> None:
    made = plan(DEEP, cluster(4), constraints={"tensor": 2, **constraints})
    stage = assign(made, DEEP)
    assert set(degrees(made)) == {2}
    if "keep_together" in constraints:
        assert stage["blocks.1.fc:linear"] == stage["blocks.6.act:relu"]
    if "split_before" in constraints:
        assert stage["blocks.2.act:relu"] + 1 == stage["blocks.3.fc:linear"]
    if "place" in constraints:
        assert "cpu:3" in made.stages[stage["blocks.5.fc:linear"]].devices
    if "recompute" in constraints:
        assert any("blocks.2" in s.recompute for s in made.stages)
    if "max_stages" in constraints:
        assert len(made.stages) == 1
    if "stages" in constraints:
        assert len(made.stages) == 2
    if "replicas" in constraints:
        assert [len(s.groups) for s in made.stages] == [2]
    if "shard" in constraints:
        found = {text for s in made.stages for name, text in s.shard if name.endswith("fc.weight")}
        assert found == {"Shard(1)"}


def test_teams_stay_on_one_node_where_that_is_asked() -> None:
    where = nodes(4, 2)
    made = plan(DEEP, where, constraints={"tensor": 2, "tp_within_node": True})
    assert all(len({where.device(d).node for d in group}) == 1 for s in made.stages for group in s.groups)
    with pytest.raises(PlanError, match="tensor 3 and tp_within_node contradict: a node has 2 devices"):
        plan(DEEP, where, constraints={"tensor": 3, "tp_within_node": True})


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ({"tensor": 1, "shard": {"blocks.0.fc.weight": "Shard(0)"}},
         "smallest conflicting set: tensor 1, shard 'blocks.0.fc.weight' as Shard\\(0\\)"),
        ({"zero": 2, "replicas": 1}, "smallest conflicting set: replicas 1, zero 2"),
        ({"stages": 2, "tensor": 3}, "smallest conflicting set: stages 2, tensor 3"),
        ({"replicas": 2, "tensor": 4}, "smallest conflicting set: replicas 2, tensor 4"),
        ({"split_before": ["blocks.2", "blocks.4"], "tensor": 2}, "3 stages with tensor 2 need 6 devices; there are 4"),
        ({"tensor": 5}, "tensor 5 needs 5 devices a stage; there are 4"),
        ({"shard": {"blocks.0.fc.weigth": "Shard(0)"}}, "did you mean 'blocks.0.fc.weight'"),
        ({"shard": {"blocks.0.fc.weight": "Shard(7)"}}, "which has dims 0 to 1"),
    ],
)  # fmt: skip
def test_contradictions_about_division_name_the_smallest_set_and_what_works(
    constraints: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        plan(DEEP, cluster(4), constraints=constraints)
    assert caught.value.remedies
    for remedy in caught.value.remedies:
        assert plan(DEEP, cluster(4), **remedy.change).stages


@pytest.mark.parametrize("written", [{"zero": 4}, {"tp_within_node": "yes"}, {"tensor": -1}])
def test_division_of_the_wrong_kind_is_refused(written: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(written))):
        plan(DEEP, cluster(4), constraints=written)


# -- explanations --------------------------------------------------------------------------------------------------


def reason(made: Plan, start: str) -> str:
    return next(line for line in complete(made).reasons if line.startswith(start))


def test_the_best_plan_of_the_other_kind_is_quoted_as_planned() -> None:
    made = plan(ONE_SAMPLE, cluster(2, kind="cuda"))
    whole = plan(ONE_SAMPLE, cluster(2, kind="cuda"), constraints={"tensor": 1})
    assert made.predicted is not None and whole.predicted is not None
    change = whole.predicted.step_seconds / made.predicted.step_seconds - 1
    assert f"({change:+.1%})" in reason(made, "without divided ops the best plan")
    made = plan(DEEP, cluster(2))
    divided = plan(DEEP, cluster(2), constraints={"tensor": 2})
    assert made.predicted is not None and divided.predicted is not None
    change = divided.predicted.step_seconds / made.predicted.step_seconds - 1
    assert f"({change:+.1%})" in reason(made, "with single ops divided by 2 the best plan")


def test_more_of_what_there_is_is_planned_for_divided_plans_too() -> None:
    made = plan(ONE_SAMPLE, cluster(2, kind="cuda"))
    three = plan(ONE_SAMPLE, cluster(3, kind="cuda"))
    assert made.predicted is not None and three.predicted is not None
    faster = three.predicted.step_seconds < 0.9995 * made.predicted.step_seconds
    assert ("no faster" in reason(made, "3 such devices instead of 2")) != faster
    assert reason(made, "1GiB more on every device") and reason(made, "links twice as fast")


def test_every_level_of_zero_is_priced_for_the_plan() -> None:
    made = ranks(4.0)
    lines = [line for line in complete(made).reasons if line.startswith("this plan with ZeRO")]
    assert [line[20] for line in lines] == ["1", "2", "3"]
