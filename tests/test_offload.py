"""Saved activations that wait in host memory: the same numbers, the predicted bytes, and what their copies cost."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from dividing import SCHEDULES, cluster
from torch import nn

from partita.capture import capture
from partita.check import check
from partita.cluster import Cluster, Device
from partita.cost.affine import Affine
from partita.cost.away import SMALL, Trip, Trips
from partita.graph import Graph
from partita.manual import plan_from_cuts
from partita.plan import Offload, Plan
from partita.predict import predict
from partita.runtime.away import Away, Traffic
from partita.runtime.meter import MemoryMeter
from partita.runtime.module import ParallelModule

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::UserWarning")]

WIDTH, SEQ, ROWS = 64, 32, 32
EVERY = tuple(f"blocks.{i}" for i in range(6))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    """Six blocks beside a stream, dropout, and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.drop, self.twice = nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.twice(self.twice(self.drop(x)).tanh())


def square(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (y - t).pow(2).mean()


def accelerators(count: int) -> Cluster:
    """CPU devices said to have a memory apart from their host's, 10 GB/s away."""
    return _linked(cluster(count))


def _linked(where: Cluster) -> Cluster:
    return replace(where, devices=tuple(replace(d, host_bandwidth=1e10) for d in where.devices))


MODEL = Deep()
BATCH = torch.randn(ROWS, SEQ, WIDTH), torch.randn(ROWS, SEQ, WIDTH)
GRAPH: Graph = capture(MODEL, BATCH[:1], {}).graph


def plan(stages: int = 1, names: tuple[str, ...] = EVERY, again: tuple[str, ...] = (), **how: object) -> Plan:
    at = {1: (), 2: ("blocks.3",), 3: ("blocks.2", "blocks.4")}[stages]
    made = plan_from_cuts(GRAPH, at, [f"cpu:{i}" for i in range(stages)], **how)  # type: ignore[arg-type]
    mine = [
        [n for n in EVERY if any(n == m or n.startswith(m + ".") for m in stage.modules)] or list(EVERY)
        for stage in made.stages
    ]
    return replace(
        made,
        stages=tuple(
            replace(
                stage, offload=Offload(tuple(n for n in own if n in names)),
                recompute=tuple(n for n in own if n in again),
            )
            for stage, own in zip(made.stages, mine, strict=True)
        ),
    )  # fmt: skip


def step(wanted: Plan, where: Cluster) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """A training step's loss and gradients."""
    parallel = ParallelModule(MODEL, wanted, where, loss_fn=square)
    MODEL.zero_grad()
    torch.manual_seed(3)
    loss = parallel.train_step(*BATCH)
    parallel.close()
    return loss, [None if p.grad is None else p.grad.clone() for p in MODEL.parameters()]


def bare(wanted: Plan) -> Plan:
    return replace(wanted, stages=tuple(replace(s, offload=Offload(), recompute=()) for s in wanted.stages))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 4), (3, 4)])
def test_what_waits_on_the_host_comes_back_bit_by_bit(stages: int, microbatches: int, schedule: str) -> None:
    wanted = plan(stages, microbatches=microbatches, schedule=schedule)
    assert check(wanted, GRAPH, accelerators(stages)) == ()
    loss, grads = step(wanted, accelerators(stages))
    plain, expected = step(bare(wanted), accelerators(stages))
    assert torch.equal(loss, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if a is not None and b is not None)


def test_replicas_and_recomputation_of_other_parts_go_beside_it() -> None:
    beside = plan(names=EVERY[:3], again=EVERY[3:], microbatches=2)
    wide = replace(beside, stages=(replace(beside.stages[0], devices=("cpu:0", "cpu:1")),))
    assert wide.stages[0].recompute and wide.stages[0].offload
    for wanted in (beside, wide):
        assert check(wanted, GRAPH, accelerators(2)) == ()
        found, expected = step(wanted, accelerators(2)), step(bare(wanted), accelerators(2))
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # recomputed sums are in another order


@pytest.mark.parametrize(("names", "microbatches", "schedule"), [
    (EVERY, 1, "1f1b"), (EVERY, 4, "gpipe"), (EVERY, 4, "zero_bubble"), (EVERY[1:5:3], 4, "1f1b"), ((), 1, "1f1b"),
])  # fmt: skip
def test_the_device_holds_what_is_predicted_and_the_host_the_rest(
    names: tuple[str, ...], microbatches: int, schedule: str
) -> None:
    where = accelerators(2)
    wanted = plan(2, names, microbatches=microbatches, schedule=schedule)
    expected = dict(predict(GRAPH, wanted, where, optimizer="none").memory)
    parallel = ParallelModule(MODEL, wanted, where, loss_fn=square)
    found = [parallel.measure_memory(*BATCH) for _ in range(3)]
    parallel.close()
    for device, need in expected.items():
        most = max(one[device] for one in found)
        assert most <= 1.2 * need and need <= 1.12 * most, (device, most, need)
        assert bool(found[0].get(f"host of {device}")) == bool(names)


def test_a_step_holds_less_by_what_is_predicted() -> None:
    where, plain, away = accelerators(1), plan(names=(), microbatches=1), plan(microbatches=1)
    predicted = [dict(predict(GRAPH, p, where, optimizer="none").memory)["cpu:0"] for p in (plain, away)]
    measured = []
    for wanted in (plain, away):
        parallel = ParallelModule(MODEL, wanted, where, loss_fn=square)
        measured.append(parallel.measure_memory(*BATCH)["cpu:0"])
        parallel.close()
    assert measured[1] < 0.55 * measured[0]
    assert predicted[0] - predicted[1] == pytest.approx(measured[0] - measured[1], rel=0.06)


def test_cpu_cores_gain_nothing_and_are_told_so() -> None:
    where, wanted = cluster(1), plan(microbatches=1)
    assert "offload gains nothing on cpu:0: the host's memory is theirs" in wanted.explain()
    plain, away = (predict(GRAPH, p, where, optimizer="none") for p in (bare(wanted), wanted))
    assert dict(away.memory)["cpu:0"] >= dict(plain.memory)["cpu:0"]
    assert away.step_seconds > plain.step_seconds
    parallel = ParallelModule(MODEL, wanted, where, loss_fn=square)
    found = parallel.measure_memory(*BATCH)
    parallel.close()
    assert found["cpu:0"] <= 1.03 * dict(away.memory)["cpu:0"]
    assert "host of cpu:0" not in found


@pytest.mark.cuda
def test_on_a_gpu_the_same_numbers_take_less_memory() -> None:
    where = Cluster((Device("cuda:0", "gpu", 1 << 34, 1e13, 1e12, host_bandwidth=1e10),))
    on_gpu = replace(plan(microbatches=1), devices=("cuda:0",))
    on_gpu = replace(on_gpu, stages=tuple(replace(s, devices=("cuda:0",)) for s in on_gpu.stages))
    grads, peaks = [], []
    for wanted in (on_gpu, bare(on_gpu)):
        model = copy.deepcopy(MODEL)
        parallel = ParallelModule(model, wanted, where, loss_fn=square)
        torch.cuda.reset_peak_memory_stats()
        parallel.train_step(*BATCH)
        peaks.append(torch.cuda.max_memory_allocated())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        parallel.close()
        del parallel, model
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert peaks[0] < 0.8 * peaks[1]


def test_what_cannot_be_offloaded_is_refused_with_a_remedy() -> None:
    both = plan(names=EVERY[:2], again=("blocks.1",))
    away = replace(both, stages=(replace(both.stages[0], recompute=(), offload=Offload(("blocks.9",))),))
    other = plan(2)
    moved = replace(other, stages=(replace(other.stages[0], offload=Offload(("blocks.5",))), other.stages[1]))
    assert "list each part under one of them" in check(both, GRAPH, cluster(1))[0]
    assert "did you mean" in check(away, GRAPH, cluster(1))[0]
    assert "'blocks.5' under offload, but stage 1 runs it: list it there" in check(moved, GRAPH, cluster(2))[0]


def test_a_storage_goes_once_and_what_is_small_or_given_stays() -> None:
    traffic, meter = Traffic(torch.device("cpu")), MemoryMeter()
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    x = torch.randn(512, WIDTH)
    sent: list[int] = []
    plain = traffic.send

    def counted(held: object, here: torch.Tensor) -> None:
        sent.append(len(here))
        plain(held, here)  # type: ignore[arg-type]

    traffic.send = counted  # type: ignore[method-assign,assignment]
    outside = Away(traffic)
    with meter:
        with outside:
            y = x @ weight
            z = y.sin() * y.t().cos().t()  # y is saved three times, in two layouts
            outside.send(y)
            outside.send(x)  # saved too, but it was given: nobody asks for it in a segment
        expected = torch.autograd.grad(z.sum(), weight)[0]
    again = x @ weight
    assert torch.equal(expected, torch.autograd.grad((again.sin() * again.t().cos().t()).sum(), weight)[0])
    assert sent == [y.untyped_storage().nbytes(), x.untyped_storage().nbytes()]
    assert SMALL == 64 * 1024


def test_copies_that_computing_hides_cost_nothing_and_others_what_is_left() -> None:
    one = Trip(Affine(0.0, 1.0), 0, Affine(2.0), Affine(4.0))
    hidden, bare_ = Trips((one,) * 4, 0.2), Trips((one,) * 4, 0.3)
    assert hidden.forward(10) == (0.0, 2.0)
    assert hidden.backward(10, there=True) == 0.0
    assert hidden.backward(10) == 2.0  # the first is waited for
    assert bare_.forward(10) == (3.0, 3.0 - 0.0)  # three of four copies of 3 s beside 2 s of computing, less the first
    assert Trips((one,) * 4, 0.3, beside=False).forward(10) == (12.0, 0.0)
