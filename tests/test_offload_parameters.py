"""Parameters that live in host memory: the same numbers, and a device that holds two ranges' copies of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_offload import GRAPH, accelerators, bare, plan, square, step
from torch import nn

from partita.capture import capture
from partita.check import check
from partita.manual import plan_from_cuts
from partita.plan import Offload, Plan
from partita.predict import predict
from partita.runtime.module import ParallelModule

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::UserWarning")]


def hosted(wanted: Plan, *, activations: bool = False) -> Plan:
    """The plan with the parameters of the blocks in host memory too."""
    stages = []
    for stage in wanted.stages:
        names = stage.offload.activations
        stages.append(replace(stage, offload=Offload(names if activations else (), names)))
    return replace(wanted, stages=tuple(stages))


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize(
    ("stages", "microbatches", "schedule"), [(1, 1, "1f1b"), (1, 4, "1f1b"), (2, 4, "gpipe"), (2, 4, "zero_bubble")]
)
def test_parameters_on_the_host_train_to_the_same_gradients(
    stages: int, microbatches: int, schedule: str, activations: bool
) -> None:
    wanted = hosted(plan(stages, microbatches=microbatches, schedule=schedule), activations=activations)
    where = accelerators(stages)
    assert check(wanted, GRAPH, where) == ()
    loss, grads = step(wanted, where)
    plain, expected = step(bare(wanted), where)
    assert torch.equal(loss, plain)
    for mine, other in zip(grads, expected, strict=True):
        assert mine is not None and other is not None
        if microbatches == 1:
            assert torch.equal(mine, other)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_device_holds_copies_of_two_ranges_as_predicted_and_the_host_the_rest() -> None:
    """Eight layers whose weights are nearly all that they take."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)))
    x, target = torch.randn(4, 256), torch.randn(4, 256)
    graph, where = capture(model, (x,), {}).graph, accelerators(1)
    kept = plan_from_cuts(graph, (), ["cpu:0"])
    away = Offload(parameters=tuple(map(str, range(8))))
    weights = sum(p.numel() * 4 for p in model.parameters())
    found = []
    for wanted in (kept, replace(kept, stages=(replace(kept.stages[0], offload=away),))):
        need = dict(predict(graph, wanted, where, optimizer="none").memory)["cpu:0"]
        parallel = ParallelModule(model, wanted, where, loss_fn=square)
        peak = parallel.measure_memory(x, target)
        parallel.close()
        assert need == pytest.approx(peak["cpu:0"], rel=0.12), (need, peak)
        found.append((peak["cpu:0"], peak.get("host of cpu:0", 0)))
    assert found[0][0] >= 2 * weights and found[0][1] == 0
    assert found[1][0] <= 0.5 * weights  # two or three of eight, and one gradient
    assert found[1][1] >= 2 * weights


def test_what_cannot_live_on_the_host_is_refused_with_a_remedy() -> None:
    whole = hosted(plan())
    stage = whole.stages[0]
    once = replace(stage, offload=Offload(parameters=("twice",)))
    nested = replace(stage, offload=Offload(("blocks.0",), ("blocks.0.up",)))
    assert check(replace(whole, stages=(once,)), GRAPH, accelerators(1)) == ()
    assert "which is around it: list one of them" in check(replace(whole, stages=(nested,)), GRAPH, accelerators(1))[0]
    assert "take one of them" in check(replace(whole, zero=2), GRAPH, accelerators(1))[0]
    half = next(op.name for op in GRAPH.ops if op.module.startswith("twice"))
    part = replace(stage, offload=Offload(parameters=(half,)))
    assert (
        "uses too: list that under offload as well" in check(replace(whole, stages=(part,)), GRAPH, accelerators(1))[0]
    )
