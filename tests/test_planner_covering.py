"""Sets along a frontier and the bound from covering with them: against every subset and every assignment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_placement import every, placements

from partita.planners.placing.covering import Covering, set_load
from partita.planners.placing.frontier import frontier
from partita.planners.placing.problem import Placement, loads
from partita.planners.placing.subsets import Subsets


def subsets(problem: Placement, kind: int) -> Iterator[tuple[float, np.ndarray]]:
    """(load, units) of everything that a device of the kind can run."""
    for chosen in product((False, True), repeat=problem.num_units):
        units = np.array(chosen)
        load = set_load(problem, kind, units)
        if np.isfinite(load):
            yield load, units


@settings(max_examples=60, deadline=None)
@given(placements(), st.lists(st.integers(-3, 9), min_size=6, max_size=6), st.sampled_from([3.0, 7.0, 20.0]))
def test_no_set_is_above_the_curve_and_the_best_set_is_one(problem: Placement, drawn: list[int], cap: float) -> None:
    value = np.array(drawn[: problem.num_units], dtype=float)
    for kind, one in enumerate(problem.kinds):
        line = frontier(problem)
        assert line.whole
        found = Subsets.of(line, one.seconds, one.transfer)
        able = [(float(value[units].sum()), load) for load, units in subsets(problem, kind) if load <= cap]
        for _ in range(3):
            curve = found.curve(value, cap, 16)
            assert all(curve.at(load) >= worth - 1e-9 for worth, load in able)
        best = found.best(value, cap, 1024)
        most = max(worth for worth, _ in able)
        assert (best.value if best else 0.0) == pytest.approx(most)
        if best:
            assert best.load == pytest.approx(set_load(problem, kind, best.units))
            assert best.load <= cap
            assert value[best.units].sum() == pytest.approx(best.value)


@settings(max_examples=40, deadline=None)
@given(placements(), st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_a_line_that_is_too_wide_frees_nets_and_stays_a_bound(problem: Placement, drawn: list[int]) -> None:
    value = np.array(drawn[: problem.num_units], dtype=float)
    line = frontier(problem, most=2)
    assert line.widest <= 2
    curve = Subsets.of(line, problem.kinds[0].seconds, 1.0).curve(value, 9.0, 16)
    assert all(curve.at(load) >= value[units].sum() - 1e-9 for load, units in subsets(problem, 0) if load <= 9.0)


@settings(max_examples=40, deadline=None)
@given(placements(most_units=5))
def test_no_assignment_is_below_the_covering_bound(problem: Placement) -> None:
    feasible = [(float(loads(problem, devices).max()), devices) for devices in every(problem)]
    if not feasible or min(feasible)[0] <= 0.0:
        return
    best, devices = min(feasible)
    covering = Covering(problem, best, 0.0)
    covering.offer(devices)
    covering.run(time.perf_counter() + 0.5)
    assert covering.bound <= best * (1 + 1e-9)
    worse = Covering(problem, 2 * best, 0.0)
    worse.run(time.perf_counter() + 0.2)
    assert worse.bound <= best * (1 + 1e-9)
