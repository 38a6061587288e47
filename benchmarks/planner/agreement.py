"""The planner against trying every plan: ``python -m benchmarks.planner.agreement [--problems 2000] [--seed 0]``.

Joint problems drawn by hypothesis: up to four blocks in a chain or graph on up to four devices of one or two kinds;
stages, replicas, tensor degrees, ZeRO levels, microbatches, schedule, recomputation, offload of activations and of
parameters are chosen together under each device's memory, with links from free to slow, parts that need the whole
batch, weights that blocks share, and constraints. An answer called optimal must be as fast as the fastest of all plans;
one with a gap must be no further from it than its gap; infeasible must mean that no plan fits. Every second problem is
a set of them: all ways to make teams of the devices, at all ZeRO levels. Prints the counts; exits 1 at a disagreement,
with the problem shrunk.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from math import isclose, prod

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from partita.planners.exhaustive import exhaustive
from partita.planners.joint import joint
from partita.planners.objective import candidate_bytes, candidate_seconds
from partita.planners.problem import Edge, Infeasible, Optimal, Outcome, Pool, Problem, Shares, Times, Weights
from partita.planners.stages import check_candidate, stages
from partita.planners.teams import teamings

ROUNDING = 1e-9
AMPLE = 1e9
WAYS = ("recompute", "offload", "lend")


@st.composite
def problems(draw: st.DrawFn, *, dag: bool, most: int = 4) -> Problem:
    """A joint problem small enough to try every plan of, of at most so many blocks."""
    n = min(draw(st.sampled_from([1, 2, 3, 3, 4])), most)
    num_pools = draw(st.integers(1, 2))
    counts = [draw(st.integers(1, 3 if num_pools == 1 else 2)) for _ in range(num_pools)]
    number = st.integers(0, 9)

    def rows(*shape: int) -> np.ndarray:
        size = prod(shape)
        return np.array(draw(st.lists(number, min_size=size, max_size=size)), dtype=float).reshape(shape)

    saved = rows(n, 2) * draw(st.sampled_from([1.0, 4.0]))
    joined = draw(st.booleans())
    split = Times(
        rows(num_pools, n, 2) + 0.5, rows(num_pools, n, 2), rows(num_pools, n, 2),
        rows(num_pools, n) if joined else np.zeros((num_pools, n)), saved,
        np.minimum(rows(n, 2) * draw(st.sampled_from([1.0, 0.2])), saved), rows(n, 2), rows(n) * joined, rows(n, 2),
        np.minimum(rows(n, 2) * draw(st.sampled_from([1.0, 4.0])), saved),
    )  # fmt: skip
    single = replace(split, whole=np.zeros((num_pools, n)), whole_saved=np.zeros(n))
    if dag:
        pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=6))
        links = [(min(p), max(p)) for p in pairs if p[0] != p[1]]
    else:
        links = [(i, i + 1) for i in range(n - 1)]
    edges = [Edge(a, (b,), float(draw(number)), float(draw(number))) for a, b in links]
    if n > 2 and draw(st.booleans()):
        edges.append(Edge(0, (1, n - 1), 1.0, float(draw(number))))
    sizes = [float(draw(st.integers(0, 40))) for _ in range(n)]
    frozen = draw(st.sets(st.integers(0, n - 1), max_size=1))
    weights = [Weights((i,), size, 0.0 if i in frozen else size) for i, size in enumerate(sizes)]
    if draw(st.booleans()):
        weights.append(Weights((0, n - 1), 20.0, draw(st.sampled_from([0.0, 20.0]))))
    hosts = st.sampled_from([0.0, 0.02, 0.2, 1.0])
    pools = tuple(
        Pool(f"p{i}", tuple(f"p{i}:{k}" for k in range(c)), AMPLE, draw(st.booleans()), host=draw(hosts))
        for i, c in enumerate(counts)
    )
    hosted = any(p.host for p in pools)
    lends = st.sampled_from([(), (0,), (0, n - 1) if n > 3 else tuple(range(n))])
    ample = Problem(
        batch=8, pools=pools, single=single, split=split, edges=tuple(edges), weights=tuple(weights),
        microbatches=draw(st.sampled_from([(1,), (1, 4), (2, 3), (1, 2, 8)])),
        schedules=draw(st.sampled_from([("1f1b",), ("1f1b", "zero_bubble", "gpipe"), ("gpipe", "zero_bubble")])),
        optimizer_factor=float(draw(st.integers(0, 2))), train=draw(st.integers(0, 4)) > 0,
        replicas=draw(st.booleans()),
        joined=joined, sync=draw(st.booleans()), latency=draw(st.sampled_from([0.0, 3.0])),
        seconds_per_byte=draw(st.sampled_from([0.0, 0.1, 1.0])), reduce_seconds_per_byte=0.05,
        may_recompute=tuple(range(n)) if draw(st.booleans()) else (),
        recompute=draw(st.sampled_from([(), (), (0,)])),
        may_offload=tuple(range(n)) if hosted else (),
        may_lend=draw(lends) if hosted else (), lend=(1,) if n > 2 and hosted and draw(st.integers(0, 4)) == 0 else (),
        lendable=np.array([(size, w.trained) for size, w in zip(sizes, weights, strict=False)]),
        update=draw(st.sampled_from([0.0, 0.05, 1.0])),
        offload=(n - 1,) if n > 1 and all(p.host for p in pools) and draw(st.integers(0, 4)) == 0 else (),
        together=draw(st.sampled_from([(), (), ((0, n - 1),)])),
        breaks=(n - 1,) if n > 1 and draw(st.integers(0, 3)) == 0 else (),
        pools_of=((0, (0,)),) if draw(st.integers(0, 3)) == 0 else (),
        max_stages=draw(st.sampled_from([0, 0, 0, 1, 2])), num_stages=draw(st.sampled_from([0, 0, 0, 0, 2])),
        num_replicas=draw(st.sampled_from([0, 0, 0, 0, 2])),
    )  # fmt: skip
    shares = [draw(st.sampled_from([0.0, 0.0, 0.97, 0.93, 0.88, 0.82, 0.75, 0.6])) for _ in pools]
    return _limited(ample, shares, dag) if any(shares) else ample


def _limited(ample: Problem, shares: list[float], dag: bool) -> Problem:
    """With these shares of the memory that the fastest plan would take on each pool (0: ample): limits that bind."""
    free = stages(ample, anywhere=dag)
    if isinstance(free, Infeasible):
        return ample
    need = dict.fromkeys(range(len(shares)), 0.0)
    for choice, nbytes in zip(free.best.stages, candidate_bytes(ample, free.best), strict=True):
        need[choice.pool] = max(need[choice.pool], float(nbytes))
    most = max(need.values())
    pools = tuple(
        replace(pool, memory_bytes=share * (need[p] or most) if share else AMPLE)
        for p, (pool, share) in enumerate(zip(ample.pools, shares, strict=True))
    )
    return replace(ample, pools=pools)


@st.composite
def variants(draw: st.DrawFn, *, dag: bool) -> tuple[Problem, ...]:
    """A joint problem for every way to make teams of its devices, at every ZeRO level."""
    base = draw(problems(dag=dag, most=3))
    degrees = draw(st.sampled_from([(1, 2), (1, 2, 3), (2,)]))
    shares = tuple(draw(divided(base, members)) for members in degrees if members > 1)
    levels = draw(st.sampled_from([(0,), (0, 2), (0, 1, 2, 3), (3,)]))
    found = []
    for counts in teamings([len(pool.devices) for pool in base.pools], degrees):
        pools, origin = [], []
        for pool, made in enumerate(counts):
            for members, count in made:
                names = tuple(f"{pool}:{members}:{k}" for k in range(count))
                pools.append(replace(base.pools[pool], devices=names, members=members))
                origin.append(pool)
        if not pools:
            continue
        rows = np.array(origin)
        single, split = _rows(base.single, rows), _rows(base.split, rows)
        mine = tuple(replace(s, single=_rows(s.single, rows), split=_rows(s.split, rows)) for s in shares)
        allowed = tuple(
            (block, tuple(p for p, pool in enumerate(origin) if pool in where)) for block, where in base.pools_of
        )
        team = replace(base, pools=tuple(pools), single=single, split=split, shares=mine, pools_of=allowed)
        found += [replace(team, zero=level, gathered=10.0) for level in levels]
    return tuple(found)


def _rows(times: Times, pools: np.ndarray) -> Times:
    """The times of these pools, in this order."""
    return replace(
        times, forward=times.forward[pools], backward=times.backward[pools], weight=times.weight[pools],
        whole=times.whole[pools],
    )  # fmt: skip


@st.composite
def divided(draw: st.DrawFn, base: Problem, members: int) -> Shares:
    """What teams take of each block: a part of its time and bytes, and time for collectives."""

    def part(rows: np.ndarray) -> np.ndarray:
        return rows * draw(st.sampled_from([1.0, 0.7, 1.0 / members]))

    def share(times: Times) -> Times:
        wait = draw(st.sampled_from([0.0, 0.3, 4.0]))
        return replace(
            times, forward=part(times.forward) + wait, backward=part(times.backward) + wait, weight=part(times.weight),
            saved=part(times.saved), kept=np.minimum(times.kept, times.saved / members),
            transient=part(times.transient), gone=np.minimum(times.gone, times.saved / members),
        )  # fmt: skip

    weights = tuple(replace(w, nbytes=w.nbytes / members, trained=w.trained / members) for w in base.weights)
    return Shares(members, share(base.single), share(base.split), weights)


def verdict(several: Problem | tuple[Problem, ...], *, anywhere: bool, slack: float) -> tuple[str, ...]:
    """'optimal', 'gap' or 'infeasible' where the two agree, and in which ways the plan's blocks hold less. Raises
    AssertionError where they do not."""
    oracle: Outcome
    if isinstance(several, tuple):
        found = joint(several, anywhere=anywhere, slack=slack)
        problem, mine = several[found.index], found.outcome
        answers = [exhaustive(p, anywhere=anywhere) for p in several]
        fitting = [a for a in answers if not isinstance(a, Infeasible)]
        oracle = min(fitting, key=lambda a: a.best.seconds) if fitting else answers[0]
    else:
        problem = several
        mine, oracle = stages(problem, anywhere=anywhere, slack=slack), exhaustive(problem, anywhere=anywhere)
    if isinstance(mine, Infeasible) or isinstance(oracle, Infeasible):
        assert type(mine) is type(oracle), f"planner {mine}, every plan {oracle}"
        return ("infeasible",)
    assert check_candidate(problem, mine.best), f"{mine.best} does not fit"
    quoted, best = mine.best.seconds, oracle.best.seconds
    assert isclose(quoted, candidate_seconds(problem, mine.best), rel_tol=ROUNDING)
    gap = 0.0 if isinstance(mine, Optimal) else mine.gap
    assert best * (1 - ROUNDING) <= quoted <= best * (1 + gap) * (1 + ROUNDING), f"{quoted} quoted, {best} found: {gap}"
    ways = (way for way in WAYS if any(getattr(stage, way) for stage in mine.best.stages))
    return ("optimal" if isclose(quoted, best, rel_tol=ROUNDING) else "gap", *ways)


def compare(count: int, number: int = 0, *, shrink: bool = True) -> Counter[str]:
    """``count`` problems judged. Raises AssertionError at the first disagreement, with the problem made small."""
    found: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
    )  # fmt: skip
    @given(
        st.booleans().flatmap(
            lambda dag: st.tuples(st.just(dag), st.one_of(problems(dag=dag), variants(dag=dag).filter(bool)))
        ),
        st.sampled_from([0, 0.02, 0.3]),
    )
    def judge(drawn: tuple[bool, Problem | tuple[Problem, ...]], slack: float) -> None:
        dag, problem = drawn
        found.update(verdict(problem, anywhere=dag, slack=slack))

    judge()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.planner.agreement", description=__doc__)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        found = compare(asked.problems, asked.seed)
    except AssertionError as error:
        print(f"DISAGREEMENT: {error}", *getattr(error, "__notes__", ()), sep="\n")
        return 1
    count = sum(found[word] for word in ("optimal", "gap", "infeasible"))
    print(
        f"{count} problems, none in disagreement: {found['optimal']} answers are the optimum, {found['gap']} are "
        f"within their gap of it, {found['infeasible']} have no plan; of the plans {found['recompute']} recompute, "
        f"{found['offload']} offload activations, {found['lend']} parameters ({time.perf_counter() - began:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
