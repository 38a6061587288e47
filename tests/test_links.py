"""Links are timed as they are: the fit on its own, and one shaped link between two network namespaces."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from planning_graphs import mlp

from benchmarks.two_hosts.link import ROOT, link, why_not
from partita.cluster import Cluster, Device, Link
from partita.cluster_file import dumps, loads
from partita.cost.communication import buckets
from partita.measure.disturbance import _lost
from partita.measure.links import SIZES, line
from partita.plan import Batch, Plan, Stage
from partita.planners.auto import auto
from partita.predict import predict
from partita.sharding.batch import layouts


def test_a_line_gives_its_own_slope_and_intercept() -> None:
    bandwidth, latency = line([(n, 2e-4 + n / 125e6) for n in SIZES])
    assert bandwidth == pytest.approx(125e6, rel=1e-6)
    assert latency == pytest.approx(2e-4, rel=1e-6)


def test_what_is_paid_once_a_message_is_no_bandwidth() -> None:
    """Windows that open slowly add to every large message, and a full token bucket saves on each."""
    for once in (3e-3, -1e-3):
        times = [(n, 1e-4 + n / 125e6 + (once if n >= 1 << 18 else 0.0)) for n in SIZES]
        bandwidth, latency = line(times)
        assert bandwidth == pytest.approx(125e6, rel=1e-6)
        assert latency == pytest.approx(1e-4, rel=1e-6)


def test_noise_of_a_twentieth_leaves_both_within_a_tenth() -> None:
    draw = random.Random(0)
    for _ in range(50):
        times = [(n, (1e-3 + n / 12.5e6) * (1 + draw.uniform(0, 0.05))) for n in SIZES]
        bandwidth, latency = line(times)
        assert bandwidth == pytest.approx(12.5e6, rel=0.1)
        assert latency == pytest.approx(1e-3, rel=0.1)


def test_buckets_carry_every_gradient_and_end_with_the_small_ones() -> None:
    sizes = [1 << 20, 1000, 2000, 1 << 22, 3000]
    found = buckets(sizes)
    assert sum(found) == sum(sizes)
    assert found == (1 << 20, 1 << 22, 6000)


def test_a_shaped_link_is_measured_within_a_tenth() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    bits, latency = 2e8, 1e-3
    with link(bits, latency) as hosts:
        ranks = [
            subprocess.Popen(
                hosts.inside(host, [sys.executable, "-m", "partita.cli", "measure", "--json"]), cwd=ROOT,
                env=hosts.rank(host), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for host in (0, 1)
        ]  # fmt: skip
        said = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), said
    assert said[1][0] == ""
    (found,) = json.loads(said[0][0])["links"]
    assert 8 * found["bandwidth"] == pytest.approx(bits, rel=0.1)
    assert found["latency_seconds"] == pytest.approx(latency, rel=0.1)
    lost = found["host_bandwidth"]  # the relay takes some 5 ns of a core a byte
    assert lost is None or lost > 1e7  # none: nothing was lost, as where a core is free


def test_timing_what_sums_take_of_the_cores_draws_nothing() -> None:
    """Only one rank of each host times it: what it drew, the others would not have drawn."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = torch.get_rng_state()
        _lost(dist.group.WORLD, 2)
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        dist.destroy_process_group()


def _hosts(bandwidth: float) -> Cluster:
    devices = tuple(Device(f"cpu:{i}", "core", 1 << 34, 1e9, 1e10, (0,), node=i) for i in (0, 1))
    return Cluster(devices, (Link("cpu:0", "cpu:1", bandwidth, 1e-4),))


def test_the_slower_the_link_the_fewer_bytes_the_plan_sends() -> None:
    """4 MB of gradients over a fast link, 0.25 MB of activations over a slower one, nothing over a crawling one."""
    graph = mlp(4, width=512, batch=64)
    chosen = [auto(graph, layouts(graph), _hosts(bandwidth), processes=True) for bandwidth in (1e9, 1e7, 1e5)]
    assert [(len(plan.stages), len(plan.stages[0].devices)) for plan in chosen] == [(1, 2), (2, 1), (1, 1)]


def test_what_an_end_s_own_cores_move_is_time_they_do_not_compute() -> None:
    """All of a sum's bytes, sent and taken, where the cores do the moving: 2 x 4 MB over two replicas."""
    graph = mlp(4, width=512, batch=64)
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",)),), batch=Batch(64, 2))
    free = _hosts(1e12)
    busy = replace(free, links=(replace(free.links[0], host_bandwidth=1e8),))
    took = predict(graph, plan, busy).step_seconds - predict(graph, plan, free).step_seconds
    assert took == pytest.approx(2 * 4 * (1 << 20) / 1e8, rel=0.05)
    assert loads(dumps(busy)) == busy


def test_gradients_cross_hosts_while_backward_runs() -> None:
    """A step of two replicas ends when the last gradient has crossed: at once on a fast link, later on a slow one."""
    graph = mlp(4, width=512, batch=64)
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",)),), batch=Batch(64, 2))
    alone = predict(graph, replace(plan, stages=(Stage(("cpu:0",), ("",)),), batch=Batch(32, 1)), _hosts(1e9), batch=32)
    compute = alone.step_seconds
    fast, slow = (predict(graph, plan, _hosts(bandwidth)).step_seconds for bandwidth in (1e9, 1e6))
    assert fast == pytest.approx(compute + 1e6 / 1e9, rel=0.05)
    assert slow == pytest.approx(compute / 3 + compute / 6 + 4 * (1 << 20) / 1e6, rel=0.05)
