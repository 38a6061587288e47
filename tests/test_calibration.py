"""A module knows how its steps compare with what its plan promised, and says so once."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import partita
from partita.capture import capture
from partita.cost.measured import Measured
from partita.errors import UsageError
from partita.measure import forget_timings, kept_timings, local_cluster, measure_call
from partita.plan import Predicted
from partita.runtime.calibration import TIMED_STEPS, WARM_STEPS, Calibration, likely_cause
from partita.runtime.module import ParallelModule
from partita.trace import Event, Trace


def trace(busy: float, step: float) -> Trace:
    return Trace(
        (Event("cpu:0", "F0.0", "F", 0, 0, 0.0, busy), Event("cpu:1", "F1.0", "F", 1, 0, step - busy, step)),
        (), "measured",
    )  # fmt: skip


def watched(*, seconds: float, predicted: float) -> Calibration:
    watch = Calibration(predicted, 8)
    for _ in range(WARM_STEPS):
        watch.note(8, 100.0)
    watch.note(4, 100.0)  # another batch: not what the plan promised
    for _ in range(TIMED_STEPS):
        watch.note(8, seconds)
    return watch


def test_warm_up_and_other_batches_do_not_count() -> None:
    watch = watched(seconds=1.2, predicted=1.0)
    assert watch.measured == pytest.approx(1.2)
    assert watch.deviation == pytest.approx(0.2)


@pytest.mark.parametrize("seconds, told", [(1.14, 0), (1.16, 1), (0.86, 0), (0.84, 1)])
def test_a_deviation_above_15_percent_is_told_once(seconds: float, told: int) -> None:
    watch = watched(seconds=seconds, predicted=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            watch.tell(trace(1.0, 1.0), lambda: trace(1.0, 1.0), 2.0)
    assert len(caught) == told
    assert all("replan()" in str(w.message) for w in caught)


@pytest.mark.parametrize("seconds, disproved", [(0.84, 1), (0.86, 0), (1.16, 0)])
def test_only_a_faster_step_disproves_the_timings(seconds: float, disproved: int) -> None:
    """Neighbours on the machine only ever add: a slower step says nothing of how the parts were timed."""
    watch, calls = watched(seconds=seconds, predicted=1.0), []
    watch.disproved = lambda: calls.append(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            watch.tell(trace(1.0, 1.0), lambda: trace(1.0, 1.0), 2.0)
    assert len(calls) == disproved


def test_disproved_timings_are_measured_again_by_the_next_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    model, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))), torch.randn(256, 512)
    captured, cluster = capture(model, (x,)), local_cluster(["cpu", "cpu"])
    assert measure_call(captured, cluster, model, (x,)) is not None
    kept = kept_timings(captured, cluster)
    assert kept is not None
    forget_timings(kept)
    assert kept_timings(captured, cluster) is None


def test_the_likely_cause_is_read_from_the_traces() -> None:
    assert "other work takes about 50%" in likely_cause(trace(1.0, 1.0), trace(0.5, 0.5), cpu_seconds=1.0)
    assert "computing takes 30% more" in likely_cause(trace(1.3, 1.3), trace(1.0, 1.0), cpu_seconds=2.6)
    assert "idle for 50% of the step instead of 0%" in likely_cause(trace(1.0, 2.0), trace(1.0, 1.0), cpu_seconds=2.0)


def test_a_module_holds_its_steps_against_its_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    base = partita.split(model, (x,), at=["2"], devices=2, loss_fn=nn.functional.mse_loss)
    plan = replace(base.plan, predicted=Predicted(1e-9), batch=replace(base.plan.batch, size=4))
    parallel = ParallelModule(model, plan, base.cluster, loss_fn=nn.functional.mse_loss, measured=Measured())
    with pytest.warns(UserWarning, match="slower than the .* that the plan promised"):
        for _ in range(WARM_STEPS + TIMED_STEPS):
            parallel.train_step(x, x)
    assert parallel.calibration is not None and parallel.calibration.deviation is not None
    assert parallel.trace is None  # the step recorded for the cause is not the user's
    parallel.close()
    base.close()


def test_replan_offers_a_plan_and_runs_it_when_asked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    parallel = partita.parallelize(model, (x,), devices=2, loss_fn=nn.functional.mse_loss)
    expected = nn.functional.mse_loss(model(x), x)
    before = parallel.plan
    offered = parallel.replan()
    assert parallel.plan is before
    assert {d for s in offered.stages for d in s.devices} <= {"cpu:0", "cpu:1"}
    applied = parallel.replan(apply=True)
    assert parallel.plan is applied
    torch.testing.assert_close(parallel.train_step(x, x), expected.detach())
    parallel.close()


def test_replan_needs_the_example_of_parallelize() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parallel = partita.split(model, (torch.randn(4, 8),), at=["1"], devices=2)
    with pytest.raises(UsageError, match="call parallelize"):
        parallel.replan()
    parallel.close()
