"""Compiled parts of a plan: the same numbers and draws, equal parts once; what cannot be compiled runs as it is."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dividing import cluster
from torch import nn

from partita.capture import capture
from partita.check import check
from partita.lower import lower
from partita.plan import Batch, Offload, Plan, Stage
from partita.runtime import compiled
from partita.runtime.compare import compare, observe
from partita.runtime.module import ParallelModule
from partita.sharding.batch import layouts

CXX = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX}) to compile with")
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::UserWarning")]

WIDTH = 16
ALL = ("",)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def deep() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(4)), nn.Linear(WIDTH, 4))


class Convs(nn.Module):
    """Running statistics, an op in place, a branch that is added in place, a draw inside, a view written through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.norm1(self.first(x)), inplace=True)
        y = self.norm2(self.second(x))
        y += x
        y = self.drop(y.relu_())
        y = y * 1.5
        y[:, 0].mul_(0.5)
        return self.head(y.mean((2, 3)))


def plan_of(model: nn.Module, x: torch.Tensor, *cuts: str, microbatches: int = 1, schedule: str = "1f1b") -> Plan:
    from partita.manual import plan_from_cuts

    names = [f"cpu:{i}" for i in range(len(cuts) + 1)]
    plan = plan_from_cuts(capture(model, (x,), {}).graph, cuts, names, microbatches=microbatches, schedule=schedule)
    return replace(plan, stages=tuple(replace(s, compile=ALL) for s in plan.stages))


def same(model: nn.Module, x: torch.Tensor, plan: Plan, **tolerances: float) -> ParallelModule:
    """Outputs, every gradient, buffers and what is drawn, beside the undivided model's."""
    parallel = ParallelModule(model, plan, cluster(max(len(s.devices) for s in plan.stages) * len(plan.stages)))
    found = compare(observe(model, model, (x,), {}, seed=3), observe(parallel, model, (x,), {}, seed=3), **tolerances)
    assert found.ok, str(found)
    return parallel


def made(run: Callable[[], Any]) -> list[str]:
    """What ``run`` had compiled; nothing may have failed."""
    before = len(compiled.compilations())
    run()
    found = compiled.compilations()[before:]
    assert not [c.failed for c in found if c.failed]
    return [c.part for c in found]


@needs_compiler
def test_equal_blocks_share_one_compilation_and_every_plan_draws_the_same() -> None:
    from torch._dynamo.utils import counters

    model, x = deep(), torch.randn(16, 3, WIDTH)
    graphs = counters["stats"]["unique_graphs"]
    alive: list[ParallelModule] = []  # what is compiled lives as long as what uses it
    assert made(lambda: alive.append(same(model, x[:8], plan_of(model, x[:8])))) == ["0", "1"]  # 0: no gradient of x
    two = plan_of(model, x, "2", microbatches=2)
    for schedule in ("gpipe", "1f1b", "zero_bubble"):  # as many rows: both devices take what there is
        assert made(lambda s=schedule: alive.append(same(model, x, replace(two, schedule=s)))) == []
    assert counters["stats"]["unique_graphs"] - graphs == 2


@needs_compiler
def test_statistics_in_place_ops_and_views_are_right_in_training_and_evaluation() -> None:
    model, x = Convs(), torch.randn(4, 3, 6, 6)
    parallel = same(model, x, plan_of(model, x))
    model.eval()
    expected = model(x)
    with torch.no_grad():
        assert torch.allclose(parallel(x), expected, rtol=1e-4, atol=1e-6)


def test_ranges_end_where_an_op_must_stay_as_it_is() -> None:
    model, x = Convs(), torch.randn(4, 3, 6, 6)
    graph = capture(model, (x,), {}).graph
    program = lower(graph, layouts(graph), plan_of(model, x), batch=4)
    (segment,) = (s for s in program.segments if s.compiled)
    targets = {graph.ops[i].name: graph.ops[i].target for i in range(len(graph.ops))}
    inside = {targets[n] for i, n in enumerate(segment.ops) if segment.is_compiled(i)}
    assert {"aten.convolution.default", "aten.batch_norm.default"} & inside or "aten.conv2d.default" in inside
    assert not {t for t in inside if t.startswith("partita.")}


@needs_compiler
def test_another_size_is_another_compilation_and_many_sizes_are_no_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SIZES", 2)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Tanh(), nn.Linear(WIDTH, 4)).eval()
    x = torch.randn(12, WIDTH)
    parallel = ParallelModule(model, plan_of(model, x), cluster(1))

    def call(rows: int) -> None:
        with torch.no_grad():
            assert torch.allclose(parallel(x[:rows]), model(x[:rows]), rtol=1e-4, atol=1e-6)

    assert len(made(lambda: [call(12), call(12), call(5)])) == 2
    with pytest.warns(UserWarning, match="compiled for 2 sizes.*Pad or bucket"):
        call(7)
    assert made(lambda: [call(7), call(3), call(12), call(5)]) == []


def test_what_cannot_be_compiled_says_so_once_and_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(function: object, **options: object) -> Callable[..., Any]:
        def run(*args: object) -> None:
            raise RuntimeError("no such instruction\nand a page of more")

        return run

    monkeypatch.setattr(torch, "compile", refuses)
    model, x = deep(), torch.randn(5, 3, WIDTH)
    with pytest.warns(
        UserWarning, match="'0' could not be compiled and runs as it is.*no such instruction. Take it out"
    ):
        same(model, x, plan_of(model, x))
    assert compiled.compilations()[-1].failed == "RuntimeError: no such instruction"


@needs_compiler
def test_backward_twice_and_replicas_at_the_same_time() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Tanh(), nn.Linear(WIDTH, 4)), torch.randn(8, WIDTH)
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",), compile=ALL),), batch=Batch(8, 2))
    parallel = ParallelModule(model, plan, cluster(2), loss_fn=lambda y, t: (y - t).pow(2).mean())
    target = torch.randn(8, 4)
    parallel.train_step(x, target)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    other = copy.deepcopy(model)
    other.zero_grad()
    loss = (other(x) - target).pow(2).mean()
    loss.backward()
    for a, p in zip(found, other.parameters(), strict=True):
        assert p.grad is not None and torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    y = parallel(x)
    y.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    y.sum().backward()
    for p, grad in zip(model.parameters(), once, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, 2 * grad, rtol=1e-4, atol=1e-6)


def test_check_names_what_cannot_be_compiled_together() -> None:
    model, x = deep(), torch.randn(8, 3, WIDTH)
    graph = capture(model, (x,), {}).graph
    plan = plan_of(model, x)
    stage = plan.stages[0]

    def problems(zero: int = 0, **changed: Any) -> str:
        return "\n".join(check(replace(plan, zero=zero, stages=(replace(stage, **changed),)), graph, cluster(1)))

    assert problems() == ""
    assert "compiles '7', which names no module the model runs" in problems(compile=("7",))
    assert "lists '1' under recompute and '1.up' under compile" in problems(recompute=("1",), compile=("1.up",))
    away = Offload(activations=("2",))
    assert "lists '2' under offload and all of it under compile" in problems(offload=away)
    assert "take zero 2, or compile out" in problems(zero=3)
