"""What planning skips for speed loses nothing: relaxations bound, equal modules are priced once, plans stay best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planning_graphs import cluster, mlp, normed

from partita.cost.blocks import Block, blocks, legal_cuts, repeated
from partita.cost.ops import op_cost
from partita.cost.table import cost_table
from partita.graph import Graph, Op
from partita.planners import auto as planning
from partita.planners.auto import auto
from partita.planners.constraints import Constraints
from partita.planners.joint import Later, joint
from partita.planners.objective import candidate_bytes
from partita.planners.pricing import price, rank
from partita.planners.problem import Candidate, Infeasible, Problem, StageChoice
from partita.planners.resolved import Resolved
from partita.planners.task import Task
from partita.sharding.batch import layouts


def pairs(count: int, **options: Any) -> Graph:
    """``count`` modules of two linear layers each."""
    graph = mlp(2 * count, deep=True, **options)

    def named(op: Op) -> Op:
        _, number, what = op.module.split(".")
        module = f"layers.{int(number) // 2}.{what}{int(number) % 2}"
        return replace(op, module=module, name=f"{module}:{op.name.rpartition(':')[2]}")

    return replace(graph, ops=tuple(map(named, graph.ops)))


def task_of(graph: Graph, devices: int, **options: Any) -> Task:
    found, where = layouts(graph), cluster(devices, kind="cuda", **options)
    return Task(
        graph, found, found, where, cost_table(graph, where), "adamw", Constraints(), Resolved(), graph.batch, "exact",
        True, False,
    )  # fmt: skip


WIDE = pairs(60, width=512, batch=4)


@pytest.mark.parametrize("graph", [mlp(4, deep=True, batch=1), normed(6), WIDE], ids=["mlp", "normed", "wide"])
def test_no_division_is_faster_or_holds_less_than_its_relaxation(graph: Graph) -> None:
    for found in task_of(graph, 4).divided(coarse=0 if len(graph.ops) < 200 else 8):
        for least, real in zip(found.relaxed.problem.shares, found.exact().problem.shares, strict=True):
            for a, b in ((least.single, real.single), (least.split, real.split)):
                for name in ("forward", "backward", "weight", "saved", "kept", "transient"):
                    low, high = (getattr(t, name) @ np.array([1.0, graph.batch]) for t in (a, b))
                    assert (low <= high * (1 + 1e-9)).all(), name
            held = {w.blocks: w.nbytes for w in real.weights}
            assert all(w.nbytes <= held[w.blocks] for w in least.weights)


def test_teams_that_cannot_win_are_not_priced() -> None:
    problem = next(task_of(mlp(4, deep=True), 2).divided()).exact().problem
    slow = replace(problem, latency=problem.latency + 1.0, seconds_per_byte=1.0, max_stages=0)
    asked: list[int] = []

    def priced(number: int, what: Problem) -> Problem:
        asked.append(number)
        return what

    alone = joint([problem]).outcome
    assert not isinstance(alone, Infeasible)
    least = replace(slow, single=replace(slow.single, forward=slow.single.forward + alone.best.seconds))
    found = joint([problem, Later(least, lambda: priced(1, slow))])
    assert found.index == 0 and asked == [] and found.outcome == alone
    found = joint([Later(problem, lambda: priced(2, problem)), Later(least, lambda: priced(3, slow))])
    assert found.index == 0 and asked == [2] and found.outcome == alone


def test_a_block_of_equal_layers_is_priced_by_one_of_them() -> None:
    whole = Block(0, len(WIDE.ops), "layers", "")
    parts = repeated(WIDE, whole, legal_cuts(WIDE))
    assert [len(p.ops) for p in parts] == [4] * 60 and len({p.signature for p in parts[1:]}) == 1
    single = mlp(60, deep=True)  # a layer of one product: what it gives must not be made whole before the next
    assert repeated(single, Block(0, 120, "blocks", ""), legal_cuts(single)) == (Block(0, 120, "blocks", ""),)


def test_ops_alike_cost_what_each_costs_by_itself() -> None:
    graph, where = normed(6), cluster(2, kind="cuda")
    table = cost_table(graph, where)
    for i, op in enumerate(graph.ops):
        cost = op_cost(graph, op, where.devices[0])
        assert tuple(table.forward["cuda"][i]) == (cost.forward.fixed, cost.forward.per_sample)
        assert tuple(table.weight["cuda"][i]) == (cost.weight.fixed, cost.weight.per_sample)


def test_where_simulation_rejects_the_first_plans_whole_ops_are_tried_again_before_teams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, where = pairs(4, width=64, batch=64), cluster(2, kind="cuda")
    wanted = auto(graph, layouts(graph), where)
    calls: list[int] = []

    def first_rejected(task: Task, listed: Any) -> Any:
        calls.append(1)
        return ([], 1.1) if len(calls) == 1 else rank(task, listed)

    monkeypatch.setattr(planning, "rank", first_rejected)
    made = auto(graph, layouts(graph), where)
    assert made.predicted is not None and wanted.predicted is not None and len(calls) > 1
    assert [s.tensor for s in made.stages] == [1] * len(made.stages)
    assert made.predicted.step_seconds <= 1.05 * wanted.predicted.step_seconds


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_the_closed_form_counts_what_waits_for_its_weight_gradients(schedule: str, recompute: bool) -> None:
    task = task_of(pairs(12, width=32, batch=256), 4)
    built = task.build(coarse=12)
    assert len(built.blocks) == 12
    again = [tuple(range(3 * s, 3 * s + 3)) for s in range(4)]
    stages = tuple(StageChoice(blocks, 0, 1, blocks if recompute else ()) for blocks in again)
    candidate = Candidate(stages, 8, schedule)
    found = price(task, built, candidate)
    assert found is not None
    simulated = dict(found.memory)
    for s, closed in enumerate(candidate_bytes(built.problem, candidate)):
        assert 0.9 * simulated[f"cuda:{s}"] <= closed <= 1.6 * simulated[f"cuda:{s}"]


def test_blocks_of_a_graph_still_cover_every_op_once() -> None:
    for limit in (1, 7, 64):
        parts = blocks(WIDE, limit=limit, exact=0)
        inner = [unit for part in parts for unit in repeated(WIDE, part, legal_cuts(WIDE))]
        assert [i for unit in inner for i in unit.ops] == list(range(len(WIDE.ops)))
