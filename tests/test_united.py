"""Groups of CPU cores as one device: the unsplit model's bits, chosen where a divided model leaves cores idle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partita
from partita.capture import capture
from partita.check import check
from partita.cluster import Cluster, Device, Link
from partita.plan import Batch, Plan, Predicted, Stage
from partita.planners.as_one import better, worth_asking
from partita.united import all_as_one, problem, unite, with_united

CLUSTER = Cluster(
    (
        Device("cpu:0", "1x Core", 3 << 30, 1e10, 1e9, cores=(0,)),
        Device("cpu:1", "1x Core", 1 << 30, 2e10, 2e9, cores=(1,)),
        Device("cuda:0", "GPU", 8 << 30, 1e13, 1e12),
    ),
    (Link("cpu:*", "cpu:*", 1e9, 1e-6),),
)


class BatchMean(nn.Module):
    """Every sample depends on all of them from the first op on: nothing can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(0, keepdim=True)
        out: torch.Tensor = self.last(torch.relu(self.first(x)))
        return out


def one(seconds: float, alone: float, *devices: str) -> Plan:
    return Plan((Stage(devices),), predicted=Predicted(seconds, one_device_seconds=alone))


def test_a_united_device_has_all_cores_all_speed_and_the_memory_of_its_smallest_group() -> None:
    made = unite(CLUSTER, "cpu:0+cpu:1")
    assert (made.cores, made.flops, made.memory_bandwidth) == ((0, 1), 3e10, 3e9)
    assert made.memory_bytes == 1 << 30
    assert made.kind == "2x Core"


def test_it_stands_in_place_of_its_groups() -> None:
    assert [d.name for d in with_united(CLUSTER, ["cpu:0+cpu:1"]).devices] == ["cpu:0+cpu:1", "cuda:0"]
    assert with_united(CLUSTER, ["cpu:0", "cuda:0"]) is CLUSTER


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cpu:0+cpu:7", "'cpu:7' is no device here"),
        ("cpu:0+cuda:0", "only groups of CPU cores"),
        ("cpu:0+cpu:0", "named twice"),
    ],
)
def test_what_cannot_be_one_says_why(name: str, why: str) -> None:
    assert why in problem(CLUSTER, name)
    assert all_as_one(CLUSTER) is None


def test_a_group_is_used_alone_or_united_not_both() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    graph = capture(model, (x,), {}).graph
    plan = Plan((Stage(("cpu:0+cpu:1",), modules=("0",)), Stage(("cpu:1",), modules=("1",))), batch=Batch(4, 1))
    found = check(plan, graph, CLUSTER)
    assert found == ("cpu:1 is part of 'cpu:0+cpu:1' and of 'cpu:1'; use it in one way",)


def test_runs_with_the_unsplit_models_bits() -> None:
    model, x = BatchMean(), torch.randn(8, 16)
    plan = Plan((Stage(("cpu:0+cpu:1",), modules=("",)),), batch=Batch(8, 1))
    pm = partita.parallelize(model, (x,), devices=["cpu", "cpu"], plan=plan)
    assert torch.equal(pm(x), model(x))
    used = pm._team.devices[0].cores
    threads: list[int] = []
    pm._team.run({"cpu:0+cpu:1": lambda: threads.append(torch.get_num_threads())}, lambda: None)
    assert threads == [len(used)]
    assert partita.verify(model, (x,), plan=plan, devices=["cpu", "cpu"]).ok


def test_is_asked_for_only_where_devices_would_idle() -> None:
    assert not worth_asking(one(0.5, 1.0, "cpu:0", "cpu:1"), CLUSTER.__class__(CLUSTER.devices[:2]))
    assert worth_asking(one(0.9, 1.0, "cpu:0"), CLUSTER.__class__(CLUSTER.devices[:2]))


def test_is_chosen_only_where_clearly_faster() -> None:
    divided, united = one(1.0, 1.0, "cpu:0"), one(0.96, 0.96, "cpu:0+cpu:1")
    assert better(divided, united).stages == divided.stages
    clearly = better(divided, one(0.6, 0.6, "cpu:0+cpu:1"))
    assert clearly.stages[0].devices == ("cpu:0+cpu:1",)
    assert "1.67x one device alone" in clearly.reasons[0]
    assert clearly.predicted is not None and clearly.predicted.one_device_seconds == 1.0


def test_a_plan_file_names_it(tmp_path: object) -> None:
    path = f"{tmp_path}/plan.yaml"
    plan = Plan((Stage(("cpu:0+cpu:1",), modules=("a",)),), devices=("cpu:0", "cpu:1"))
    plan.save(path)
    assert Plan.load(path) == plan
