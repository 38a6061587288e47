"""Replicas of unequal kinds side by side: shares after speed, every sample once, and only where that is faster."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partita import plan_file
from partita.capture import capture
from partita.cluster_file import describe
from partita.graph import Graph
from partita.models import GPTSize
from partita.models.catalog import build
from partita.planners.large.abreast import apportioned
from partita.planners.large.result import plan_large


@pytest.fixture(scope="module")
def graph() -> Graph:
    tokens = torch.zeros(2, 512, dtype=torch.int64, device="meta")
    return capture(build(GPTSize(12, 1024, 16, 8192)), (tokens, tokens)).graph


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 200))
def test_every_sample_is_given_out_once_and_after_speed(kinds: list[tuple[float, int]], more: int) -> None:
    speed, counts = [s for s, _ in kinds], [n for _, n in kinds]
    total = sum(counts) + more
    sizes = apportioned(total, speed, counts)
    assert sum(sizes) == total and min(sizes) >= 1 and len(sizes) == sum(counts)
    rates = [s for s, n in kinds for _ in range(n)]
    longest = max(size / rate for size, rate in zip(sizes, rates, strict=True))
    assert longest <= max(total / sum(rates) + 1 / min(rates), 1 / min(rates))


def test_unequal_kinds_share_the_batch_where_that_is_faster(graph: Graph) -> None:
    cluster = describe("4xA100-80GB + 4xV100-16GB")
    plan = plan_large(graph, cluster, batch=64).plan
    (stage,) = plan.stages
    assert len(set(stage.devices)) == 8 and sum(plan.batch.sizes) == 64 and len(plan.batch.sizes) % 8 == 0
    assert min(plan.batch.sizes[:4]) > max(plan.batch.sizes[4:8])
    assert plan_file.loads(plan_file.dumps(plan)).batch == plan.batch
    only = plan_large(graph, describe("4xA100-80GB"), batch=64).plan
    assert plan.predicted is not None and only.predicted is not None
    assert plan.predicted.step_seconds < only.predicted.step_seconds
    assert all(need <= 0.95 * cluster.device(name).memory_bytes for name, need in plan.predicted.memory)


def test_equal_kinds_of_two_names_get_equal_shares(graph: Graph) -> None:
    plan = plan_large(graph, describe("4xA100-80GB + 4xA100-40GB"), batch=64, constraints={"stages": 1}).plan
    assert len(plan.stages[0].devices) in (4, 8)
    if plan.batch.sizes:
        assert max(plan.batch.sizes) - min(plan.batch.sizes) <= 2
