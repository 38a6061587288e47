"""The planner puts parameters in host memory where nothing else fits or that is faster; what it plans is what runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hosted import fits_as_planned
from test_offload import square
from torch import nn

from partita.capture import capture
from partita.cluster import Cluster, Device, Link
from partita.cost.memory import ADAM_ON_HOST, host_update
from partita.errors import InfeasibleError, PlanError
from partita.graph import Graph
from partita.plan import Plan
from partita.planners.auto import auto
from partita.planners.large.result import plan_large
from partita.runtime.module import ParallelModule
from partita.sharding.batch import layouts
from partita.units import format_seconds

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::UserWarning")]

WIDTH, LAYERS = 256, 8


class Stack(nn.Module):
    """Eight layers whose weights are nearly all that they take, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.emb(x)
        for layer in self.layers:
            x = layer(x)
        return x


MODEL, X = Stack(), torch.randint(0, 256, (8,))
GRAPH: Graph = capture(MODEL, (X,), {}).graph
INFERENCE: Graph = capture(MODEL.eval(), (X,), {}).graph
MODEL.train()
WEIGHTS = sum(p.numel() * 4 for p in MODEL.parameters())
ROOM = int(1.2 * WEIGHTS / 0.95)  # parameters and gradients take 2


def where(count: int = 1, memory: int = ROOM, host: float = 1e10, name: str = "cpu") -> Cluster:
    devices = tuple(Device(f"{name}:{i}", "acc", memory, 1e10, 1e10, host_bandwidth=host) for i in range(count))
    return Cluster(devices, (Link("*", "*", 1e10, 1e-5),))


def planned(cluster: Cluster, optimizer: str = "none", graph: Graph = GRAPH, **wanted: object) -> Plan:
    train = "train" if graph is GRAPH else "inference"
    return auto(graph, layouts(graph), cluster, optimizer=optimizer, constraints=wanted or None, objective=train)


def lent(plan: Plan) -> tuple[str, ...]:
    return tuple(name for stage in plan.stages for name in stage.offload.parameters)


def test_where_nothing_else_fits_parameters_live_on_the_host_and_the_plan_runs_as_predicted() -> None:
    cluster = where()
    plan = planned(cluster, microbatches=1)
    assert lent(plan)
    assert "nothing fits with all parameters on the devices" in plan.reasons
    peak = fits_as_planned(MODEL, X, torch.randn(8, WIDTH), plan, cluster, ROOM, square)
    assert peak["host of cpu:0"] > 0


def test_a_model_that_only_computes_is_lent_too() -> None:
    room = int(0.7 * WEIGHTS / 0.95)
    plan = planned(where(memory=room), graph=INFERENCE)
    assert lent(plan)
    parallel = ParallelModule(MODEL.eval(), replace(plan, predicted=None), where(memory=room))
    with torch.no_grad():
        assert torch.equal(parallel(X), MODEL(X))
    parallel.close()
    MODEL.train()


def test_devices_in_a_row_each_lend_their_own() -> None:
    plan = planned(where(2, int(0.7 * WEIGHTS / 0.95)), optimizer="adamw")
    assert len(plan.stages) == 2 and lent(plan)


def test_nothing_is_lent_where_all_fits() -> None:
    assert lent(planned(where(memory=4 * WEIGHTS))) == ()
    assert lent(planned(where(2, memory=int(1.6 * WEIGHTS)))) == ()


def test_a_person_forbids_it_and_learns_that_this_stands_in_the_way() -> None:
    with pytest.raises(InfeasibleError, match="offload_parameters false cannot be met") as caught:
        planned(where(), offload_parameters=False)
    dropped = [r.change["constraints"] for r in caught.value.remedies if "constraints" in r.change]
    assert lent(planned(where(), **{n: getattr(dropped[0], n) for n in ("offload_parameters",)}))


def test_a_person_asks_for_it_by_name() -> None:
    plan = planned(where(memory=1 << 30), offload_parameters=["layers.[01]"])
    assert lent(plan) == ("layers.0", "layers.1")
    both = planned(where(memory=1 << 30), offload_parameters=["emb"], recompute=["layers.1"])
    assert lent(both) == ("emb",) and both.stages[0].recompute == ("layers.1",)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"recompute": ["layers.*"]}, "recompute 'layers.0' and offload_parameters 'layers.0' contradict"),
        ({"zero": 2}, "zero 2 and offload_parameters contradict"),
        ({"tensor": 2}, "tensor 2 and offload_parameters contradict"),
    ],
)
def test_what_cannot_be_with_it_is_named(wanted: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        planned(where(2), offload_parameters=["layers.0"], **wanted)


def test_processes_and_described_clusters_refuse_it() -> None:
    with pytest.raises(PlanError, match="for devices of one process"):
        auto(GRAPH, layouts(GRAPH), where(2), constraints={"offload_parameters": ["emb"]}, processes=True)
    with pytest.raises(PlanError, match="for devices of one process"):
        plan_large(GRAPH, where(1, 8 << 30, name="cuda"), constraints={"offload_parameters": ["emb"]})


def test_a_weight_that_others_use_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    model[2].weight = model[0].weight
    graph = capture(model, (torch.randn(4, WIDTH),), {}).graph
    with pytest.raises(PlanError, match="is used by .* too; name that as well, or neither"):
        auto(graph, layouts(graph), where(), constraints={"offload_parameters": ["0"]})


def test_the_optimizer_on_the_host_is_counted_and_said() -> None:
    plan = planned(where(memory=2 * ROOM), optimizer="adamw", microbatches=1)
    names, sizes = lent(plan), {n: p.numel() * 4 for n, p in MODEL.named_parameters()}
    moved = sum(size for n, size in sizes.items() if any(n.startswith(f"{name}.") for name in names))
    assert moved
    line = next(r for r in plan.reasons if "an optimizer step over them runs on the host" in r)
    assert f"takes about {format_seconds(moved * ADAM_ON_HOST)} there" in line
    assert (
        host_update("adamw") == ADAM_ON_HOST > host_update("momentum") > host_update("sgd") > host_update("none") == 0
    )


def test_it_is_chosen_over_a_plan_that_fits_only_where_that_is_faster_with_the_optimizer() -> None:
    """512 rows: a layer made again takes as long as hundreds of copies of its weight over a fast link."""
    graph = capture(MODEL, (torch.randint(0, 256, (512,)),), {}).graph

    def plan(host: float, memory: int) -> Plan:
        cluster = where(memory=memory, host=host)
        return auto(graph, layouts(graph), cluster, optimizer="adamw", constraints={"microbatches": 1})

    ample = plan(1e10, 1 << 30)
    assert ample.predicted is not None and lent(ample) == ()
    tight = int((ample.predicted.memory[0][1] - 1.5 * (1 << 20)) / 0.95)
    fast, slow, none = (plan(host, tight) for host in (1e10, 1e6, 0.0))
    assert lent(fast) and not lent(slow)
    assert none.stages[0].recompute
    assert any("plans with parameters in host memory were searched too: the best" in r for r in fast.reasons)
