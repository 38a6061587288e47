"""Placements of least maximum load: equal to the best of all assignments on small graphs, and never below the bound."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planners.ideals import downsets, topological_orders
from partita.planners.placing.anneal import anneal
from partita.planners.placing.capacity import Capacity
from partita.planners.placing.joins import joined
from partita.planners.placing.leaves import hosts
from partita.planners.placing.partition import partition
from partita.planners.placing.problem import (
    Kind,
    Net,
    Placed,
    Placement,
    components,
    contract,
    fits,
    loads,
    peaks,
    shape,
)
from partita.planners.placing.program import solve_program
from partita.planners.placing.scatter import scatter
from partita.planners.problem import Infeasible


@st.composite
def placements(draw: st.DrawFn, *, most_units: int = 6) -> Placement:
    n = draw(st.integers(1, most_units))
    number = st.integers(0, 6)

    def some(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=float)

    seconds = some(number)
    first = Kind("fast", draw(st.integers(0, 3)), seconds, draw(st.sampled_from([float("inf"), 14.0, 9.0, 5.0])))
    ratio = draw(st.sampled_from([2.0, 10.0, 0.5]))
    slow = np.where(some(st.sampled_from([0.0, 0.0, 1.0])) > 0, some(number), seconds * ratio)
    second = Kind("slow", draw(st.integers(0, 2)), slow, transfer=draw(st.sampled_from([0.0, 0.0, 2.0])))
    if draw(st.integers(0, 3)) == 0:
        first = Kind(first.name, first.count, np.where(some(number) == 0, np.inf, seconds), first.memory_bytes)
    pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=2 * n))
    cyclic = draw(st.integers(0, 5)) == 0
    order = tuple((a, b) if cyclic else (min(a, b), max(a, b)) for a, b in pairs if a != b)
    nets = [Net((a, b), float(draw(number))) for a, b in order]
    if n > 2:
        wide = draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=4, unique=True))
        nets.append(Net(tuple(wide), float(draw(number))))
    return Placement((first, second), some(number), tuple(nets), order)


def every(problem: Placement) -> Iterator[tuple[int, ...]]:
    for devices in product(range(len(problem.device_kinds)), repeat=problem.num_units):
        if fits(problem, devices):
            yield devices


def check(problem: Placement, answer: Placed | Infeasible, best: float) -> None:
    if best == np.inf:
        assert isinstance(answer, Infeasible)
        return
    assert isinstance(answer, Placed)
    assert fits(problem, answer.devices)
    assert answer.seconds == pytest.approx(float(loads(problem, answer.devices).max()), abs=1e-12)
    assert answer.bound <= best + 1e-9
    assert answer.seconds >= best - 1e-9


@settings(max_examples=120, deadline=None)
@given(placements())
def test_partition_is_the_best_chain_of_all_assignments(problem: Placement) -> None:
    chains = (d for d in every(problem) if shape(problem, d) == "chain")
    best = min((float(loads(problem, d).max()) for d in chains), default=np.inf)
    answer = partition(problem)
    check(problem, answer, best)
    if isinstance(answer, Placed):
        assert answer.seconds == pytest.approx(best, abs=1e-9)
        assert answer.proven
        assert shape(problem, answer.devices) == "chain"


@settings(max_examples=40, deadline=None)
@given(placements())
def test_a_partition_cut_short_is_feasible_with_a_bound(problem: Placement) -> None:
    chains = (d for d in every(problem) if shape(problem, d) == "chain")
    best = min((float(loads(problem, d).max()) for d in chains), default=np.inf)
    for answer in (partition(problem, limit=0), partition(problem, seconds=0.0)):
        if isinstance(answer, Placed):
            check(problem, answer, best)


@settings(max_examples=30, deadline=None)
@given(placements())
def test_no_assignment_is_below_the_capacity_bound(problem: Placement) -> None:
    best = min((float(loads(problem, d).max()) for d in every(problem)), default=np.inf)
    assert Capacity(problem).least() <= best * (1 + 1e-9)


def test_large_units_are_counted() -> None:
    # Five units of 4 on two devices: perfectly shared 10 each, but one of them holds three.
    problem = Placement((Kind("d", 2, np.full(5, 4.0)),), np.zeros(5), (), ())
    assert Capacity(problem).least() == pytest.approx(12.0, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(placements(most_units=5))
def test_a_leaf_beside_its_host_adds_to_no_load(problem: Placement) -> None:
    host = hosts(problem)
    for devices in product(range(len(problem.device_kinds)), repeat=problem.num_units):
        moved = tuple(devices[h] for h in host)
        assert (loads(problem, moved) <= loads(problem, devices) + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(placements())
def test_the_load_of_a_contracted_problem_is_that_of_its_groups(problem: Placement) -> None:
    groups = components(problem.num_units, problem.order)
    small = contract(problem, groups)
    count = len(problem.device_kinds)
    if count:
        devices = tuple(group % count for group in range(small.num_units))
        whole = tuple(devices[group] for group in groups)
        np.testing.assert_allclose(loads(small, devices), loads(problem, whole))
        np.testing.assert_allclose(peaks(small, devices), peaks(problem, whole))


@settings(max_examples=40, deadline=None)
@given(placements(most_units=5))
def test_scatter_is_the_best_of_all_assignments(problem: Placement) -> None:
    best = min((float(loads(problem, d).max()) for d in every(problem)), default=np.inf)
    answer = scatter(problem, seconds=0.05)
    check(problem, answer, best)
    if isinstance(answer, Placed):
        assert answer.bound <= best * (1 + 1e-6) + 1e-9
        if answer.proven:
            assert answer.seconds == pytest.approx(best, rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(placements(most_units=5))
def test_the_program_finds_the_optimum_and_no_bound_is_above_it(problem: Placement) -> None:
    best = min((float(loads(problem, d).max()) for d in every(problem)), default=np.inf)
    if not problem.device_kinds:
        return
    found, bound = solve_program(problem, None, cap=np.inf, seconds=20.0)
    assert (found is None) == (best == np.inf)
    if found is not None:
        assert float(loads(problem, found).max()) == pytest.approx(best, rel=1e-6, abs=1e-6)
        assert bound <= best * (1 + 1e-6) + 1e-6


@settings(max_examples=30, deadline=None)
@given(placements(), st.integers(0, 3))
def test_annealing_never_makes_a_placement_worse_and_keeps_it_fitting(problem: Placement, seed: int) -> None:
    for start in islice(every(problem), 2):
        found = anneal(problem, start, seconds=0.005, seed=seed)
        assert fits(problem, found)
        assert loads(problem, found).max() <= loads(problem, start).max() + 1e-9


@settings(max_examples=50, deadline=None)
@given(placements(most_units=5))
def test_what_is_joined_under_a_cap_lies_together_in_some_best_placement(problem: Placement) -> None:
    best, least = None, np.inf
    for devices in every(problem):
        load = float(loads(problem, devices).max())
        if load < least:
            best, least = devices, load
    if best is None:
        return
    join = joined(problem, least)
    again = join.widen(join.narrow(best))
    assert fits(problem, again)
    assert loads(problem, again).max() <= least + 1e-9


def test_components_follow_the_pairs_and_join_cycles() -> None:
    found = components(6, [(5, 0), (0, 1), (1, 2), (2, 0), (2, 3)])
    assert found[0] == found[1] == found[2]
    assert found[5] < found[0] < found[3]
    assert len(set(found)) == 4


def test_a_chain_is_convex_and_a_convex_placement_need_not_be_a_chain() -> None:
    # Two parallel pairs 0 -> 1 and 2 -> 3, crossed over two devices: convex, but neither device comes first.
    alike = Kind("d", 2, np.ones(4))
    parallel = Placement((alike,), np.zeros(4), (), ((0, 1), (2, 3)))
    assert shape(parallel, (0, 1, 1, 0)) == "convex"
    assert shape(parallel, (0, 1, 0, 1)) == "chain"
    line = Placement((alike,), np.zeros(4), (), ((0, 1), (1, 2), (2, 3)))
    assert shape(line, (0, 1, 1, 0)) == "none"


def test_downsets_of_a_chain_are_its_prefixes_and_of_an_antichain_all_sets() -> None:
    assert downsets([0, 1, 3], 10) == [0, 1, 3, 7]
    assert sorted(downsets([0, 0, 0], 8) or []) == list(range(8))
    assert downsets([0, 0, 0], 7) is None


def test_downsets_end_when_their_time_does() -> None:
    began = time.perf_counter()
    assert downsets([0] * 64, 1 << 62, began + 0.05) is None  # 2**64 sets
    assert downsets([0, 1, 3], 10, began) is None


def test_topological_orders_follow_the_pairs() -> None:
    pairs = [(0, 3), (1, 3), (3, 4), (2, 4), (0, 2)]
    for order in topological_orders(5, pairs):
        assert sorted(order) == list(range(5))
        assert all(order.index(a) < order.index(b) for a, b in pairs)
