"""The dynamic programme finds what trying every plan finds: chains, graphs, unequal devices, memory, recomputation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planners.exhaustive import candidates, exhaustive
from partita.planners.ideals import ideals
from partita.planners.objective import candidate_seconds, fits, received_bytes, stage_time, weight_bytes
from partita.planners.problem import Edge, Infeasible, Optimal, Pool, Problem, StageChoice, Times, Weights
from partita.planners.spans import sized, spans
from partita.planners.stages import check_candidate, stages


@st.composite
def problems(draw: st.DrawFn, *, dag: bool = False, most_blocks: int = 5) -> Problem:
    n = draw(st.integers(1, most_blocks))
    num_pools = draw(st.integers(1, 2))
    counts = [draw(st.integers(1, 3 if num_pools == 1 else 2)) for _ in range(num_pools)]
    number = st.integers(0, 9)

    def rows(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(number, min_size=size, max_size=size)), dtype=float).reshape(shape)

    saved = rows(n, 2)
    kept = np.minimum(rows(n, 2), saved)
    joined = draw(st.booleans())
    times = Times(
        rows(num_pools, n, 2) + 0.5, rows(num_pools, n, 2), rows(num_pools, n, 2),
        rows(num_pools, n) if joined else np.zeros((num_pools, n)), saved, kept, rows(n, 2), rows(n) * joined,
        rows(n, 2), np.minimum(rows(n, 2), saved),
    )  # fmt: skip
    single = replace(times, whole=np.zeros((num_pools, n)), whole_saved=np.zeros(n))
    if dag:
        pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=6))
        links = [(min(p), max(p)) for p in pairs if p[0] != p[1]]
    else:
        links = [(i, i + 1) for i in range(n - 1)]
    edges = [Edge(a, (b,), float(draw(number)), float(draw(number))) for a, b in links]
    if n > 2:
        edges.append(Edge(0, (1, n - 1), 1.0, float(draw(number))))
    weights = [Weights((i,), float(draw(st.integers(0, 40))), 0.0) for i in range(n)]
    weights = [replace(w, trained=w.nbytes) for w in weights] + [Weights((0, n - 1), 20.0, 20.0)]
    hosts = st.sampled_from([0.0, 0.1, 1.0])
    memory = st.one_of(st.just(1e9), st.integers(60, 900).map(float))
    pools = tuple(
        Pool(f"p{i}", tuple(f"p{i}:{k}" for k in range(c)), draw(memory), draw(st.booleans()), host=draw(hosts))
        for i, c in enumerate(counts)
    )
    return Problem(
        batch=8, pools=pools, single=single, split=times, edges=tuple(edges), weights=tuple(weights),
        microbatches=draw(st.sampled_from([(1,), (1, 4), (2, 3)])),
        schedules=draw(st.sampled_from([("1f1b",), ("gpipe", "zero_bubble")])),
        optimizer_factor=float(draw(st.integers(0, 2))), train=draw(st.booleans()), replicas=draw(st.booleans()),
        joined=joined, sync=draw(st.booleans()), latency=draw(st.sampled_from([0.0, 3.0])),
        seconds_per_byte=draw(st.sampled_from([0.0, 0.1])), reduce_seconds_per_byte=0.05,
        may_recompute=tuple(range(n)) if draw(st.booleans()) else (),
        recompute=draw(st.sampled_from([(), (0,)])), may_offload=tuple(range(n)),
        together=draw(st.sampled_from([(), ((0, n - 1),)])),
        breaks=(n - 1,) if n > 1 and draw(st.integers(0, 3)) == 0 else (),
        pools_of=((0, (0,)),) if draw(st.integers(0, 3)) == 0 else (),
        max_stages=draw(st.sampled_from([0, 0, 1, 2])),
    )  # fmt: skip


def agree(problem: Problem, *, anywhere: bool) -> None:
    mine, oracle = stages(problem, anywhere=anywhere), exhaustive(problem, anywhere=anywhere)
    assert isinstance(mine, Infeasible) == isinstance(oracle, Infeasible)
    if isinstance(mine, Infeasible) or isinstance(oracle, Infeasible):
        return
    assert isinstance(mine, Optimal)
    assert check_candidate(problem, mine.best)
    assert mine.best.seconds == pytest.approx(candidate_seconds(problem, mine.best))
    assert mine.best.seconds == pytest.approx(oracle.best.seconds)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_on_chains_the_optimum_is_that_of_trying_every_plan(problem):
    agree(problem, anywhere=False)


@settings(max_examples=80, deadline=None)
@given(problems(dag=True, most_blocks=4))
def test_on_graphs_cut_anywhere_the_optimum_is_that_of_trying_every_plan(problem):
    agree(problem, anywhere=True)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_runners_up_fit_too_and_stand_in_order(problem):
    outcome = stages(problem)
    if isinstance(outcome, Optimal):
        listed = [outcome.best, *outcome.others]
        assert all(fits(problem, c) for c in listed)
        assert [c.seconds for c in listed] == sorted(c.seconds for c in listed)


def uniform(n: int, devices: int, **changes: object) -> Problem:
    one = np.zeros((1, n, 2))
    one[:, :, 1] = 1.0
    zero = np.zeros((n, 2))
    saved = np.full((n, 2), 0.0)
    saved[:, 1] = 10.0
    times = Times(one, one, one, np.zeros((1, n)), saved, zero, zero, np.zeros(n), zero)
    base = Problem(
        batch=8, pools=(Pool("p", tuple(f"d{i}" for i in range(devices)), 1e12),), single=times, split=times,
        edges=tuple(Edge(i, (i + 1,), 0.0, 0.0) for i in range(n - 1)),
        weights=tuple(Weights((i,), 100.0, 100.0) for i in range(n)), microbatches=(8,), replicas=False,
    )  # fmt: skip
    return replace(base, **changes)


def test_equal_blocks_are_divided_equally():
    outcome = stages(uniform(8, 4))
    assert isinstance(outcome, Optimal)
    assert [len(s.blocks) for s in outcome.best.stages] == [2, 2, 2, 2]
    assert outcome.best.seconds == pytest.approx((8 + 4 - 1) * 6.0)


def test_replicas_beat_a_pipeline_where_adding_gradients_is_free():
    outcome = stages(uniform(4, 2, replicas=True, microbatches=(2,)))
    assert isinstance(outcome, Optimal)
    assert [(len(s.blocks), s.replicas) for s in outcome.best.stages] == [(4, 2)]


def test_recomputation_is_bought_only_when_memory_asks_for_it():
    roomy = stages(uniform(4, 1, may_recompute=(0, 1, 2, 3)))
    assert isinstance(roomy, Optimal) and roomy.best.stages[0].recompute == ()
    tight = uniform(4, 1, may_recompute=(0, 1, 2, 3))
    tight = replace(tight, pools=(replace(tight.pools[0], memory_bytes=800.0 + 35.0),))
    outcome = stages(tight)
    assert isinstance(outcome, Optimal)
    assert len(outcome.best.stages[0].recompute) == 2
    assert outcome.best.seconds == pytest.approx(8 * (12 + 2))


def test_an_oracle_that_skips_candidates_would_be_seen():
    problem = uniform(3, 2)
    assert sum(1 for _ in candidates(problem)) == 3


def test_what_fits_nowhere_is_infeasible():
    problem = uniform(3, 2)
    problem = replace(problem, pools=(replace(problem.pools[0], memory_bytes=10.0),))
    assert isinstance(stages(problem), Infeasible) and isinstance(exhaustive(problem), Infeasible)


@settings(max_examples=40, deadline=None)
@given(problem=problems(dag=True, most_blocks=6), everywhere=st.booleans())
def test_what_spans_count_is_what_the_blocks_of_each_count(problem: Problem, everywhere: bool) -> None:
    """Prefixes by sums, other ideals pair by pair."""
    found = spans(problem, ideals(problem, anywhere=everywhere))
    one = sized(problem, found, 1)
    for k, (a, b) in enumerate(zip(found.first, found.last, strict=True)):
        blocks = [int(x) for x in np.flatnonzero(found.before[b] & ~found.before[a])]
        assert (found.weight_bytes[k], found.trained_bytes[k]) == pytest.approx(weight_bytes(problem, blocks))
        assert one.received[k] == pytest.approx(received_bytes(problem, blocks, problem.batch))
        choice = StageChoice(tuple(blocks), 0)
        assert one.pools[0].forward[k] == pytest.approx(stage_time(problem, choice, 1).forward)


@settings(max_examples=40, deadline=None)
@given(problem=problems(dag=True))
def test_no_plan_is_faster_than_the_bounds_by_which_spans_are_left_out(problem: Problem) -> None:
    """Nothing better than a plan in hand is lost: asked for less than the best there is nothing; for more, the best."""
    best = stages(problem, keep=1)
    if isinstance(best, Infeasible):
        return
    seconds = best.best.seconds
    again = stages(problem, keep=1, best=seconds * (1 + 1e-6) + 1e-9)
    assert not isinstance(again, Infeasible)
    assert again.best.seconds == pytest.approx(seconds)
    assert isinstance(stages(problem, keep=1, best=seconds * (1 - 1e-6)), Infeasible)
