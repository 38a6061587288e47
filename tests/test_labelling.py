"""Labelling: exact on small problems whatever binds; reductions keep the optimum, bounds stay below, memory holds."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.planners.labelling import Edge, Problem, solve
from partita.planners.labelling.contract import contract
from partita.planners.labelling.dual import bound_of, message_starts, sweep
from partita.planners.labelling.elimination import eliminate, relabel_eliminated
from partita.planners.labelling.flat import Flat, cost_of, flatten, load_of, priced
from partita.planners.labelling.forest import relabel_forest
from partita.planners.labelling.moments import memory_of
from partita.planners.labelling.moves import eliminate_all
from partita.planners.labelling.record import Record
from partita.planners.labelling.region import narrowed, relabelled
from partita.planners.labelling.search import first_answers, search
from partita.planners.labelling.solve import reduce


@st.composite
def problems(draw: st.DrawFn, most_nodes: int = 5) -> Problem:
    """Small problems whose limit often binds and whose edges forbid up to two thirds of the pairs."""
    n = draw(st.integers(1, most_nodes))
    sizes = [draw(st.integers(1, 3)) for _ in range(n)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    forbid = draw(st.sampled_from([0.0, 0.3, 0.65]))
    edges = []
    for a, b in itertools.combinations(range(n), 2):
        for _ in range(rng.choice([0, 1, 2], p=[0.4, 0.5, 0.1])):
            cost = rng.integers(-5, 20, (sizes[a], sizes[b])).astype(float)
            cost[rng.random(cost.shape) < forbid] = np.inf
            edges.append(Edge(a, b, cost) if rng.random() < 0.5 else Edge(b, a, cost.T))
    starts = rng.integers(0, 6, n)
    intervals = tuple((int(s), int(s + d)) for s, d in zip(starts, rng.integers(0, 5, n), strict=True))
    usages = tuple(rng.integers(0, 8, s).astype(float) for s in sizes)
    costs = tuple(rng.integers(0, 15, s).astype(float) for s in sizes)
    limit = draw(st.one_of(st.just(math.inf), st.integers(0, 24).map(float)))
    return Problem(costs, tuple(edges), usages, intervals, limit)


def optimum(problem: Problem) -> float:
    """By trying everything."""
    every = itertools.product(*(range(len(cost)) for cost in problem.costs))
    return min((problem.cost(labels) for labels in every if problem.fits(labels)), default=math.inf)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_small_problems_are_solved_to_the_optimum_of_brute_force(problem: Problem) -> None:
    best = optimum(problem)
    answer = solve(problem, seconds=20)
    assert answer.cost == best
    assert answer.status == ("infeasible" if best == math.inf else "optimal")
    assert answer.lower_bound <= best
    if answer.labels:
        assert problem.fits(answer.labels)
        assert problem.cost(answer.labels) == answer.cost


@settings(max_examples=150, deadline=None)
@given(problems())
def test_reductions_keep_the_optimum_and_the_memory_of_every_labelling_left(problem: Problem) -> None:
    reduced = reduce(problem)
    if reduced is None:
        assert optimum(problem) == math.inf
        return
    core, flat = reduced
    best = math.inf
    for chosen in itertools.product(*(range(len(labels)) for labels in core.labels)):
        labels = core.expand(chosen)
        load = np.zeros(len(flat.room) + 1)
        load_of(flat, np.array(chosen, dtype=np.int64), load)
        fits = bool((load[:-1] <= flat.room).all())
        assert fits == (problem.peak(labels) <= problem.limit)
        cost = cost_of(flat, np.array(chosen, dtype=np.int64))
        assert (cost + core.constant if cost < flat.forbidden / 2 else math.inf) == problem.cost(labels)
        if fits:
            best = min(best, problem.cost(labels))
    assert best == optimum(problem)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_messages_and_prices_bound_the_optimum_from_below_whatever_they_are(problem: Problem, seed: int) -> None:
    core = contract(problem)
    if core is None or not core.nodes:
        return
    flat = flatten(core, memory_of(problem, core))
    rng = np.random.default_rng(seed)
    message_at = message_starts(flat)
    messages = rng.normal(0, 3, message_at[-1])
    prices = rng.random(len(flat.room)) * 3
    unary = np.zeros(len(flat.cost))
    priced(flat, prices, unary)
    labels = np.zeros(len(core.nodes), dtype=np.int64)
    best, last = optimum(problem) - core.constant, -math.inf
    for turn in range(4):
        bound = float(bound_of(flat, message_at, messages, unary))
        assert bound - float(prices @ flat.room) <= best + 1e-6
        assert turn < 2 or bound >= last - 1e-6, "a sweep lowered the bound"
        last = bound
        sweep(flat, message_at, messages, unary, turn % 2 == 0, labels)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_a_forest_move_never_raises_the_priced_cost_and_solves_a_tree(problem: Problem, seed: int) -> None:
    core = contract(problem)
    if core is None or not core.nodes:
        return
    flat = flatten(core, memory_of(problem, core))
    rng = np.random.default_rng(seed)
    sizes = [len(labels) for labels in core.labels]
    labels = np.array([rng.integers(size) for size in sizes])
    before = cost_of(flat, labels)
    relabel_forest(flat, flat.cost.copy(), labels, rng.permutation(len(sizes)))
    after = cost_of(flat, labels)
    assert after <= before
    if len(core.edges) < len(core.nodes) == 1 + len(core.edges) and len({e[:2] for e in core.edges}) == len(core.edges):
        every = itertools.product(*(range(size) for size in sizes))
        assert after == min(cost_of(flat, np.array(x, dtype=np.int64)) for x in every)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 9, 1000]))
def test_an_elimination_finds_the_best_labels_of_all_but_the_nodes_it_keeps(
    problem: Problem, seed: int, entries: int
) -> None:
    core = contract(problem)
    if core is None or not core.nodes:
        return
    flat = flatten(core, memory_of(problem, core))
    rng = np.random.default_rng(seed)
    steps = eliminate(flat, entries, rng)
    sizes = [len(labels) for labels in core.labels]
    assert steps.largest <= max(entries, 1)
    assert len(steps.order) == len(sizes) or entries < math.prod(sizes)
    labels = np.array([rng.integers(size) for size in sizes])
    free = set(steps.order.tolist())
    every = itertools.product(*(range(size) if i in free else (labels[i],) for i, size in enumerate(sizes)))
    best = min(cost_of(flat, np.array(x, dtype=np.int64)) for x in every)
    relabel_eliminated(flat, steps, flat.cost.copy(), labels, np.zeros(int(steps.table_at[-1]) + steps.largest))
    assert cost_of(flat, labels) == best


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(0, 99))
def test_search_alone_finds_the_optimum_of_small_problems_or_something_dearer_that_fits(
    problem: Problem, seed: int
) -> None:
    core = contract(problem)
    if core is None or not core.nodes:
        return
    memory = memory_of(problem, core)
    if (memory.room < 0).any():
        return
    flat = flatten(core, memory)
    record = Record(flat, 0.05, whole_numbers=True)
    record.raise_bound(optimum(problem) - core.constant)
    search(flat, record, np.random.default_rng(seed))
    if record.labels is not None:
        labels = core.expand([int(x) for x in record.labels])
        assert problem.fits(labels)
        assert problem.cost(labels) >= optimum(problem)


def chain(length: int, seed: int = 0, limit: float = math.inf) -> Problem:
    """A chain with skips, four labels a node, costs and usages that trade against each other."""
    rng = np.random.default_rng(seed)
    usage = np.array([8.0, 4.0, 2.0, 1.0])
    costs = tuple(np.array([0.0, 2.0, 5.0, 9.0]) + rng.integers(0, 4, 4) for _ in range(length))
    pairs = [(v, v + 1) for v in range(length - 1)] + [(v, v + 3) for v in range(0, length - 3, 2)]
    edges = tuple(Edge(a, b, rng.integers(0, 12, (4, 4)).astype(float)) for a, b in pairs)
    intervals = tuple((v, v + 4 + int(rng.integers(4))) for v in range(length))
    return Problem(costs, edges, tuple(usage for _ in range(length)), intervals, limit)


def test_a_tighter_limit_costs_more_and_is_never_exceeded() -> None:
    last = -math.inf
    for limit in (math.inf, 40.0, 20.0, 12.0):
        problem = chain(14, limit=limit)
        answer = solve(problem, seconds=30)
        assert answer.status == "optimal"
        assert problem.peak(answer.labels) <= limit
        assert answer.cost >= last
        last = answer.cost
    assert solve(chain(14, limit=3.0), seconds=30).status == "infeasible"


def test_nodes_that_follow_one_another_shrink_to_one() -> None:
    identity = np.where(np.eye(3, dtype=bool), 1.0, np.inf)
    n = 200
    problem = Problem(
        costs=tuple(np.array([3.0, 1.0, 2.0]) for _ in range(n)),
        edges=tuple(Edge(v, v + 1, identity) for v in range(n - 1)),
        usages=tuple(np.array([1.0, 5.0, 2.0]) for _ in range(n)),
        intervals=tuple((v, v + 2) for v in range(n)),
        limit=8.0,
    )
    core = contract(problem)
    assert core is not None
    assert len(core.nodes) == 1
    answer = solve(problem, seconds=10)
    assert answer.labels == (2,) * n
    assert answer.cost == 2 * n + n - 1


def test_a_ring_without_memory_shrinks_to_nothing_at_the_least_cost_around_it() -> None:
    rng = np.random.default_rng(0)
    n = 60
    costs = tuple(rng.integers(0, 20, 4).astype(float) for _ in range(n))
    ring = [rng.integers(0, 20, (4, 4)).astype(float) for _ in range(n)]
    core = contract(Problem(costs, tuple(Edge(v, (v + 1) % n, cost) for v, cost in enumerate(ring))))
    around = np.where(np.eye(4, dtype=bool), 0.0, np.inf)
    for own, cost in zip(costs, ring, strict=True):
        around = (around[:, :, None] + (own[:, None] + cost)[None]).min(axis=1)
    assert core is not None
    assert core.nodes == ()
    assert core.constant == np.diag(around).min()


def test_memory_that_never_binds_does_not_keep_a_node_from_being_absorbed() -> None:
    problem = chain(30, limit=1e6)
    reduced = reduce(problem)
    assert reduced is not None
    assert len(reduced[0].nodes) == len((reduce(chain(30)) or pytest.fail())[0].nodes)


def test_labels_that_use_least_are_an_answer_in_no_time() -> None:
    tightest = chain(60)
    tightest = chain(60, limit=tightest.peak((3,) * 60))
    answer = solve(tightest, seconds=0.0)
    assert answer.labels
    assert tightest.fits(answer.labels)


def test_the_first_answers_fit_a_tight_limit_well_below_the_cost_of_using_least() -> None:
    loose = chain(60)
    problem = chain(60, limit=1.5 * loose.peak((3,) * 60))
    core, flat = reduce(problem) or pytest.fail("nothing fits")
    record = Record(flat, 30, whole_numbers=True)
    first_answers(flat, record, np.random.default_rng(0))
    assert record.labels is not None
    labels = core.expand(record.labels.tolist())
    assert problem.fits(labels)
    assert problem.cost(labels) < 0.85 * problem.cost((3,) * 60)


def test_a_long_graph_that_few_nodes_hold_together_is_solved_by_elimination_alone() -> None:
    problem = chain(400, seed=5)
    core, flat = reduce(problem) or pytest.fail("nothing fits")
    record = Record(flat, 30, whole_numbers=True)
    eliminate_all(flat, record, np.random.default_rng(0))
    assert record.closed


def test_moments_that_hold_less_than_a_neighbour_do_not_remain() -> None:
    problem = Problem(
        costs=(np.zeros(2), np.zeros(2), np.zeros(2)),
        edges=(Edge(0, 1, np.array([[0.0, 1.0], [1.0, 0.0]])), Edge(1, 2, np.array([[0.0, 1.0], [2.0, 0.0]]))),
        usages=(np.array([0.0, 4.0]),) * 3,
        intervals=((0, 10), (2, 8), (4, 6)),
        limit=10.0,
    )
    core = contract(problem)
    assert core is not None
    assert memory_of(problem, core).room.tolist() == [10.0]


def test_a_description_that_does_not_fit_together_is_refused_with_every_reason() -> None:
    problem = Problem((np.zeros(2), np.zeros(3)), (Edge(0, 1, np.zeros((3, 2))), Edge(0, 0, np.zeros((2, 2)))))
    with pytest.raises(PlanError, match=r"edge 0: costs of shape \(3, 2\).*edge 1: joins 0 and 0"):
        solve(problem)


def test_without_numba_the_answer_is_the_same() -> None:
    script = """
import sys
sys.modules["numba"] = None
from tests.test_labelling import chain, optimum
from partita.planners.labelling import kernel, solve
assert not kernel.COMPILED
problem = chain(7, limit=14.0)
answer = solve(problem, seconds=60)
assert answer.status == "optimal"
assert answer.cost == optimum(problem)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_region_is_relabelled_to_the_best_that_the_rest_leaves_it() -> None:
    problem = chain(9, seed=3, limit=16.0)
    core, flat = reduce(problem) or pytest.fail("nothing fits")
    labels = np.array(solve(problem, seconds=30).labels)
    chosen = np.array([list(own).index(labels[v]) for v, own in zip(core.nodes, core.labels, strict=True)])
    free = np.arange(2, min(6, len(chosen)))
    worse = [np.array(x) for x in itertools.product(*(range(len(own)) for own in core.labels)) if x != tuple(chosen)]
    for start in worse[:: max(1, len(worse) // 5)]:
        start = start.copy()
        start[np.setdiff1d(np.arange(len(start)), free)] = chosen[np.setdiff1d(np.arange(len(start)), free)]
        found, proven = relabelled(flat, start, free, 30.0)
        assert proven
        assert cost_of(flat, found) == cost_of(flat, chosen)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_narrowing_keeps_the_cost_and_the_memory_of_the_labels_left(problem: Problem, seed: int) -> None:
    reduced = reduce(problem)
    if reduced is None or not reduced[0].nodes:
        return
    flat = reduced[1]
    rng = np.random.default_rng(seed)
    sizes = np.diff(flat.label_at)
    labels = np.array([rng.integers(size) for size in sizes])
    stays = rng.random(len(flat.cost)) < 0.5
    stays[flat.label_at[:-1] + labels] = True
    narrow = narrowed(flat, stays)
    kept = [np.flatnonzero(own) for own in np.split(stays, flat.label_at[1:-1])]
    position = np.array([int(np.searchsorted(own, label)) for own, label in zip(kept, labels, strict=True)])
    assert np.diff(narrow.label_at).tolist() == [len(own) for own in kept]
    assert cost_of(narrow, position) == cost_of(flat, labels)
    load, narrow_load = np.zeros(len(flat.room) + 1), np.zeros(len(flat.room) + 1)
    load_of(flat, labels, load)
    load_of(narrow, position, narrow_load)
    assert load.tolist() == narrow_load.tolist()


DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "planner-data" / "iopddl"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/planner-data/iopddl")
def test_a_graph_of_65_thousand_operations_shrinks_to_two_hundred() -> None:
    from benchmarks.planner.iopddl import read

    problem = read(DATA / "asplos-2025-iopddl-P.json.gz")
    core = contract(problem)
    assert core is not None
    assert problem.num_nodes == 65335
    assert len(core.nodes) < 250


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/planner-data/iopddl")
def test_a_training_step_of_a_27_billion_parameter_model_is_labelled_optimally_and_proven_so() -> None:
    from benchmarks.planner.iopddl import read

    problem = read(DATA / "asplos-2025-iopddl-P.json.gz")
    answer = solve(problem, seconds=120)
    assert answer.status == "optimal"
    assert answer.cost == 651_833_115_436
    assert problem.fits(answer.labels)


def test_the_answer_comes_in_time_though_a_step_sees_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def stuck(flat: Flat, record: Record) -> None:
        released.wait(60)
        record.raise_bound(1e9)

    monkeypatch.setattr(sys.modules[solve.__module__], "solve_exactly", stuck)
    rng = np.random.default_rng(0)
    costs = tuple(rng.integers(1, 100, 4).astype(float) for _ in range(12))
    edges = tuple(
        Edge(a, b, rng.integers(0, 100, (4, 4)).astype(float)) for a, b in itertools.combinations(range(12), 2)
    )
    usages = tuple(rng.integers(1, 100, 4).astype(float) for _ in range(12))
    problem = Problem(costs, edges, usages, ((0, 1),) * 12, 500.0)
    solve(problem, seconds=0.1)  # has the loops compiled
    began = time.monotonic()
    answer = solve(problem, seconds=1.0)
    took = time.monotonic() - began
    released.set()
    assert took < 5
    assert answer.status in ("feasible", "optimal")
    assert problem.fits(answer.labels)
    assert answer.lower_bound <= answer.cost
