"""What a plan's explanation says is so: neighbours, other clusters, the gap and what binds, against planning them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from planning_graphs import cluster, mlp

from partita.assign import assign
from partita.cluster import Cluster
from partita.plan import Plan, Stage
from partita.plan_text import complete
from partita.planners import auto as auto_module
from partita.planners.auto import auto
from partita.planners.whatif import GIB
from partita.predict import predict
from partita.sharding.batch import layouts
from partita.units import format_seconds

GRAPH = mlp(6, deep=True, batch=16)
WIDE = mlp(8, width=256, deep=True, batch=16)
PIPELINE = {"replicas": False, "microbatches": 8}


def plan(where: Cluster, graph=GRAPH, **options) -> Plan:
    return auto(graph, layouts(graph), where, **options)


def line(made: Plan, start: str) -> str:
    found = [reason for reason in complete(made).reasons if reason.startswith(start)]
    assert found, complete(made).reasons
    return found[0]


def with_cut(made: Plan, cut: int) -> Plan:
    """Two stages of the same plan, cut before op number ``cut``."""
    names = [op.name for op in GRAPH.ops]
    parts = (tuple(names[:cut]), tuple(names[cut:]))
    stages = tuple(Stage(s.devices, ops=ops) for s, ops in zip(made.stages, parts, strict=True))
    return replace(made, stages=stages, predicted=None, reasons=())


def test_a_neighbours_cost_is_what_predict_gives_for_the_plan_cut_there() -> None:
    where = cluster(2)
    made = plan(where, constraints=PIPELINE)
    cut = list(assign(made, GRAPH).values()).count(0)
    text = line(made, "simulated, the cut before blocks.3.fc:linear")
    quoted = re.search(r"one part earlier (.+?) a step .*one part later (.+?) a step", text)
    assert quoted, text
    for shift, words in zip((-1, 1), quoted.groups(), strict=True):
        assert format_seconds(predict(GRAPH, with_cut(made, cut + shift), where).step_seconds) == words
    assert made.predicted is not None
    assert predict(GRAPH, with_cut(made, cut), where).step_seconds == pytest.approx(made.predicted.step_seconds)


def test_a_neighbour_that_does_not_fit_says_where_and_by_how_much() -> None:
    alone = plan(cluster(2), WIDE, constraints=PIPELINE)
    assert alone.predicted is not None
    most = max(need for _, need in alone.predicted.memory)
    made = plan(cluster(2, memory=int(most / 0.88)), WIDE, constraints=PIPELINE)
    assert re.search(r"one part (earlier|later) .* too much for cpu:[01]", line(made, "simulated, the cut before"))


@pytest.mark.parametrize("memory", [10**9, 5_000_000])
def test_what_more_memory_and_another_device_would_bring_is_what_planning_for_them_gives(memory: int) -> None:
    where = cluster(2, memory=memory)
    made = plan(where, WIDE)
    roomy = replace(where, devices=tuple(replace(d, memory_bytes=d.memory_bytes + GIB) for d in where.devices))
    three = replace(where, devices=(*where.devices, replace(where.devices[0], name="cpu:2")))
    for words, other in (("1GiB more on every device", roomy), ("3 such devices instead of 2", three)):
        better = plan(other, WIDE).predicted
        assert better is not None and made.predicted is not None
        text = line(made, words)
        faster = better.step_seconds < 0.9995 * made.predicted.step_seconds
        assert (format_seconds(better.step_seconds) if faster else "no faster") in text
    assert ("no faster" in line(made, "1GiB more")) == (memory == 10**9)


def test_a_faster_link_helps_where_the_link_holds_the_step_up() -> None:
    slow = cluster(2, kind="cuda")
    slow = replace(slow, links=tuple(replace(link, bandwidth=1e5) for link in slow.links))
    made = plan(slow, constraints={**PIPELINE, "max_stages": 2, "split_before": ["blocks.3"]})
    assert "a step (-" in line(made, "links twice as fast")
    assert re.search(r"leads into stage 1: \S+ a step, .*\([1-9]", line(made, "the busiest link"))
    assert "no faster" in line(plan(cluster(2), constraints=PIPELINE), "links twice as fast")


def test_the_gap_quoted_is_the_plans() -> None:
    for made in (plan(cluster(2)), plan(cluster(2, memory=5_000_000), WIDE)):
        assert f"(gap {made.gap:.2%})" in line(made, "in closed form")


def test_what_binds_is_named() -> None:
    made = plan(cluster(2), constraints=PIPELINE)
    assert "of that stage's computing" in line(made, "the heaviest op where the pace is set (stage 1) is blocks.")
    assert "memory is fullest in stage" in line(made, "memory is fullest")
    assert re.search(r"next best: .* \(\+", line(made, "next best"))


def test_nothing_is_planned_again_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(auto_module, "later_reasons", lambda *_: asked.append("asked") or ("a reason",))
    made = plan(cluster(2))
    assert asked == []
    assert "a reason" in made.explain() and "a reason" in complete(made).reasons and asked == ["asked"]


def test_a_completed_plan_keeps_its_reasons_in_its_file(tmp_path) -> None:
    made = complete(plan(cluster(2), constraints=PIPELINE))
    made.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again.reasons == made.reasons and again.explain() == made.explain()
