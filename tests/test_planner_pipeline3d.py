"""Stages x degrees x replicas x ways: equal to the best of all pipelines, within memory; the knapsack is exact."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planners.choice import cheapest
from partita.planners.ideals import downsets
from partita.planners.pipeline3d import Pipeline3D, Pipelined, Stage3D, Way, choices, pipeline3d, plan_seconds
from partita.planners.problem import Infeasible


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline3D:
    n = draw(st.integers(1, 4))
    number = st.integers(0, 5).map(float)
    pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=4))
    ends = sorted({(min(p), max(p)) for p in pairs if p[0] != p[1]})
    edges = tuple((a, b, draw(number)) for a, b in ends)
    alike = draw(st.booleans())

    def way(unit: int, name: str, common: float) -> Way:
        sync = tuple((e, common if alike else draw(number)) for e, pair in enumerate(ends) if unit in pair)
        return Way(name, draw(number) + 0.5, draw(number), draw(number), draw(number), sync)

    ways = []
    for unit in range(n):
        offered = {}
        for degree in (1, 2):
            common = draw(number)
            offered[degree] = tuple(way(unit, f"w{i}", common) for i in range(draw(st.integers(0, 2))))
        ways.append(offered)
    return Pipeline3D(
        tuple(ways), edges, draw(st.integers(1, 4)), draw(st.sampled_from([1e9, 40.0, 20.0, 12.0])),
        draw(st.sampled_from([1.0, 10.0])), draw(st.sampled_from([1, 2, 4, 6])),
    )  # fmt: skip


def every(problem: Pipeline3D) -> Iterator[tuple[Stage3D, ...]]:
    """Every pipeline, fitting or not."""
    before = [0] * len(problem.ways)
    for a, b, _ in problem.edges:
        before[b] |= 1 << a
    downs = downsets(before, 100) or []

    def tails(start: int, devices: int, replicas: int) -> Iterator[tuple[Stage3D, ...]]:
        if start == downs[-1]:
            yield ()
            return
        for stop in downs:
            if stop == start or stop & start != start:
                continue
            units = tuple(u for u in range(len(problem.ways)) if (stop & ~start) >> u & 1)
            for degree in (1, 2):
                for mine in range(1, min(devices // degree, replicas) + 1):
                    if problem.microbatches % mine:
                        continue
                    for ways in product(*(range(len(problem.ways[u].get(degree, ()))) for u in units)):
                        for rest in tails(stop, devices - degree * mine, replicas - mine):
                            yield (Stage3D(units, degree, mine, ways), *rest)

    return tails(0, problem.devices, problem.microbatches)


@settings(max_examples=150, deadline=None)
@given(pipelines())
def test_the_slowest_stage_is_as_fast_as_in_the_best_of_all_pipelines(problem: Pipeline3D) -> None:
    priced = (plan_seconds(problem, stages) for stages in every(problem))
    best = min((seconds for seconds, held in priced if held <= problem.memory_bytes), default=np.inf)
    answer = pipeline3d(problem)
    assert isinstance(answer, Infeasible) == (best == np.inf)
    if isinstance(answer, Pipelined):
        assert answer.seconds == pytest.approx(best)
        assert plan_seconds(problem, answer.stages)[1] <= problem.memory_bytes * (1 + 1e-9)
        assert sum(stage.degree * stage.replicas for stage in answer.stages) <= problem.devices


def test_replicas_share_the_work_and_pay_for_the_reduction() -> None:
    work = Way("only", 8.0, 6.0, 0.0, 0.0)
    problem = Pipeline3D(({1: (work,)},), (), devices=2, memory_bytes=1.0, bandwidth=2.0, microbatches=4)
    # Half the work, and 4 (d - 1) / d of the weights' bytes over the microbatches: 8 / 2 + 4 * 1 / 2 * 6 / 4 / 2.
    assert plan_seconds(problem, (Stage3D((0,), 1, 2, (0,)),))[0] == pytest.approx(4.0 + 1.5)


def test_a_stage_holds_a_sample_for_each_replica_from_it_on_for_each_of_its_own() -> None:
    way = Way("only", 1.0, 0.0, 10.0, 1.0)
    problem = Pipeline3D(({1: (way,)}, {1: (way,)}), ((0, 1, 0.0),), 4, 1e9, 1.0, 6)
    first, last = Stage3D((0,), 1, 1, (0,)), Stage3D((1,), 1, 3, (0,))
    assert plan_seconds(problem, (first, last))[1] == 4 * 10.0 + 1.0
    assert choices(problem, (1,), 1, 3, 1)[0][0, 1] == 10.0 + 1.0


def test_a_graph_of_too_many_ideals_is_refused_with_a_reason() -> None:
    way = Way("only", 1.0, 0.0, 0.0, 0.0)
    wide = Pipeline3D(tuple({1: (way,)} for _ in range(12)), (), 2, 1e9, 1.0, 1)
    answer = pipeline3d(wide, limit=100)
    assert isinstance(answer, Infeasible)
    assert "ideals" in answer.reason


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(0, 40),
)
def test_the_cheapest_choice_is_that_of_trying_every_one(items: list[list[tuple[int, int]]], limit: int) -> None:
    rows = tuple(np.array(item, dtype=float) for item in items)
    totals = {
        ways: sum(row[w] for row, w in zip(rows, ways, strict=True)) for ways in product(*map(range, map(len, rows)))
    }
    best = min((total[0] for total in totals.values() if total[1] <= limit), default=None)
    found = cheapest(rows, float(limit))
    assert (found is None) == (best is None)
    if found is not None:
        assert found[0] == best
        assert tuple(totals[found[1]])[0] == best and totals[found[1]][1] <= limit
