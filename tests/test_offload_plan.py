"""The planner offloads exactly where that takes less than recomputing, and what it plans is what runs."""

from __future__ import annotations

import pytest
import torch
from hosted import fits_as_planned
from test_offload import Block, square
from torch import nn

from partita.capture import capture
from partita.cluster import Cluster, Device, Link
from partita.errors import PlanError
from partita.graph import Graph
from partita.plan import Plan
from partita.planners.auto import auto
from partita.planners.large.result import plan_large
from partita.planners.remedies import _host as offered
from partita.sharding.batch import layouts

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::UserWarning")]

WIDTH, SEQ, BATCH = 64, 256, 16


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MODEL, X = Deep(), torch.randn(BATCH, SEQ, WIDTH)
GRAPH: Graph = capture(MODEL, (X,), {}).graph
TIGHT = 32 << 20  # of the 43 MiB that are needed where all is kept


def cluster(count: int, host: float, memory: int = TIGHT, name: str = "cpu") -> Cluster:
    """Devices of 10 Gflop/s, ``host`` bytes a second from their hosts."""
    devices = tuple(Device(f"{name}:{i}", "acc", memory, 1e10, 1e10, host_bandwidth=host) for i in range(count))
    return Cluster(devices, (Link("*", "*", 1e10, 1e-5),))


def planned(where: Cluster, **wanted: object) -> Plan:
    return auto(GRAPH, layouts(GRAPH), where, optimizer="none", constraints=wanted or None)


def names(plan: Plan) -> tuple[int, int]:
    """How many parts are recomputed, and offloaded."""
    return sum(len(s.recompute) for s in plan.stages), sum(len(s.offload.activations) for s in plan.stages)


@pytest.mark.parametrize("count", [1, 2])
def test_a_fast_link_is_taken_and_a_slow_one_is_not(count: int) -> None:
    memory = TIGHT if count == 1 else 22 << 20
    fixed = {"microbatches": 1, "replicas": False, "stages": count}
    none, slow, fast = (planned(cluster(count, host, memory), **fixed) for host in (0.0, 1e7, 2e10))
    assert names(none)[0] and not names(none)[1]
    assert names(slow) == names(none)
    assert names(fast)[1] and not names(fast)[0]
    seconds = [plan.predicted.step_seconds for plan in (none, slow, fast) if plan.predicted is not None]
    assert seconds[0] == seconds[1] > seconds[2]
    assert any("wait in host memory, because they do not fit" in reason for reason in fast.reasons)


def test_nothing_is_offloaded_where_all_fits() -> None:
    ample = planned(cluster(1, 2e10, 1 << 30), microbatches=1)
    assert names(ample) == (0, 0)


def test_what_is_planned_runs_within_its_memory_with_the_same_numbers() -> None:
    where = cluster(1, 2e10)
    plan = planned(where, microbatches=1)
    assert names(plan)[1]
    fits_as_planned(MODEL, X, torch.randn(BATCH, SEQ, WIDTH), plan, where, TIGHT, square)


def test_a_person_can_ask_for_it_by_name() -> None:
    asked = planned(cluster(1, 2e10, 1 << 30), offload=["blocks.[01]"], microbatches=1)
    assert asked.stages[0].offload.activations == ("blocks.0", "blocks.1")
    both = planned(cluster(1, 2e10, 1 << 30), offload=["blocks.0"], recompute=["blocks.1"], microbatches=1)
    assert names(both) == (1, 1)
    with pytest.raises(PlanError, match="contradict: keep each part under one of them"):
        planned(cluster(1, 2e10), offload=["blocks.*"], recompute=["blocks.1"])


class Asked:
    """A request that nothing but offload meets."""

    def __init__(self, where: Cluster) -> None:
        self.cluster, self.train = where, True

    def again(self, *, cluster: Cluster) -> Asked:
        return Asked(cluster)

    def feasible(self) -> bool:
        return all(d.host_bandwidth for d in self.cluster.devices)

    def attempt(self) -> Plan | None:
        return self if self.feasible() else None  # type: ignore[return-value]

    seconds, memory = 0.1, (("cuda:0", TIGHT),)


def test_where_nobody_described_an_accelerators_link_that_is_a_remedy() -> None:
    bare, cores, described = cluster(1, 0.0, name="cuda"), cluster(1, 0.0), cluster(1, 1e10, name="cuda")
    (remedy,) = offered(Asked(bare))  # type: ignore[arg-type]
    assert "offload to host memory fits, with 'host_bandwidth: 16 GB/s'" in remedy.text
    assert remedy.change["cluster"].devices[0].host_bandwidth == 16e9
    assert offered(Asked(cores)) == offered(Asked(described)) == []  # type: ignore[arg-type]


def test_large_models_on_paper_offload_by_the_same_rule() -> None:
    graph, fixed = GRAPH, {"microbatches": 1, "replicas": 1, "stages": 1}
    none, slow, fast = (
        plan_large(graph, _paper(host), optimizer="none", constraints=fixed).plan for host in (0.0, 1e6, 4e10)
    )
    assert names(none)[0] and not names(none)[1]
    assert names(slow) == names(none)
    assert names(fast)[1] and not names(fast)[0]
    assert fast.predicted is not None and none.predicted is not None
    assert fast.predicted.step_seconds < none.predicted.step_seconds
    asked = plan_large(graph, _paper(1e9, 4 << 30), constraints={**fixed, "offload": ["blocks.0"]}).plan
    named = asked.stages[0].offload.activations
    assert named and all(name.startswith("blocks.0") for name in named)


def _paper(host: float, memory: int = 0) -> Cluster:
    room = memory or int((2 * 2**30 + (40 << 20)) / 0.95)  # 2 GiB are the driver's
    return Cluster((Device("cuda:0", "acc", room, 1e10, 1e10, host_bandwidth=host),))
