"""Activations are freed as early as possible, memory is measured, and an instruction costs little."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from dividing import divided
from torch import nn

from partita.runtime.module import ParallelModule
from partita.runtime.progress import DeviceState, StepState
from partita.runtime.worker import Worker

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::UserWarning")]

WIDTH, ROWS, SEQ = 64, 32, 32


class Deep(nn.Module):
    """Six blocks of as many activations as parameters matter little: memory is activations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def mse(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (y - t).pow(2).mean()


def deep(
    microbatches: int, schedule: str = "1f1b", recompute: tuple[str, ...] = (), rows: int = ROWS
) -> ParallelModule:
    torch.manual_seed(0)
    x = torch.randn(rows, SEQ, WIDTH)
    return divided(
        Deep(), (x,), at=["blocks.3"], microbatches=microbatches, schedule=schedule, loss_fn=mse, recompute=recompute
    )


def peaks(parallel: ParallelModule, rows: int = ROWS) -> dict[str, int]:
    x, t = torch.randn(rows, SEQ, WIDTH), torch.randn(rows, SEQ, WIDTH)
    return parallel.measure_memory(x, t)


def test_under_1f1b_peak_memory_follows_the_microbatches_in_flight_and_not_their_number() -> None:
    few, many = peaks(deep(4, rows=16), rows=16), peaks(deep(16, rows=64), rows=64)  # 4 samples each: same microbatch
    gpipe = peaks(deep(16, "gpipe", rows=64), rows=64)
    sample = SEQ * WIDTH * 4  # the caller's whole batch (cpu:1: the targets) is there from the start
    for device in ("cpu:0", "cpu:1"):
        own = {
            "few": few[device] - 16 * sample,
            "many": many[device] - 64 * sample,
            "gpipe": gpipe[device] - 64 * sample,
        }
        assert own["many"] <= own["few"] + 5 * sample, own
        assert own["gpipe"] > 2 * own["many"], own


def test_values_are_dropped_after_their_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    whole = Worker.walk

    def watched(self: Worker, instructions: object) -> None:
        whole(self, instructions)  # type: ignore[arg-type]
        held.append(len(self.mine.values) + len(self.mine.grads) + len(self.mine.outgoing) + len(self.mine.runs))

    monkeypatch.setattr(Worker, "walk", watched)
    x = torch.randn(ROWS, SEQ, WIDTH)
    for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble"):
        deep(4, schedule).train_step(x, x)
    assert held and not any(held), "a finished step holds nothing"


def test_what_waits_for_backward_holds_edges_and_not_results(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[DeviceState] = []
    plain = StepState.__post_init__

    def seen(self: StepState) -> None:
        plain(self)
        states.extend(self.devices.values())

    monkeypatch.setattr(StepState, "__post_init__", seen)
    parallel = deep(4)
    parallel(torch.randn(ROWS, SEQ, WIDTH))
    runs = [run for state in states for run in state.runs.values()]
    assert len(runs) == 8
    for run in runs:
        assert all(isinstance(edge, torch.autograd.graph.GradientEdge) for edge in run.outputs.values())
    assert not any(state.values for state in states)


def test_recomputation_lowers_the_peak_and_changes_no_number() -> None:
    names = tuple(f"blocks.{i}" for i in range(6))
    plain, again = deep(2), deep(2, recompute=names)
    x, t = torch.randn(ROWS, SEQ, WIDTH), torch.randn(ROWS, SEQ, WIDTH)
    losses = [parallel.train_step(x, t) for parallel in (plain, again)]
    assert torch.equal(losses[0], losses[1])
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7)
    before, after = plain.measure_memory(x, t), again.measure_memory(x, t)
    assert after["cpu:0"] < 0.8 * before["cpu:0"], (before, after)


def test_measure_memory_leaves_gradients_alone_and_fills_the_trace() -> None:
    parallel = deep(4)
    x, t = torch.randn(ROWS, SEQ, WIDTH), torch.randn(ROWS, SEQ, WIDTH)
    parallel.train_step(x, t)
    before = [p.grad for p in parallel.parameters()]
    values = [g.clone() for g in before if g is not None]
    found = parallel.measure_memory(x, t)
    assert all(p.grad is g for p, g in zip(parallel.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True) if b is not None)
    parameters = sum(p.numel() * 4 for p in parallel.module.blocks[:3].parameters())  # type: ignore[index, union-attr]
    assert found["cpu:0"] > 2 * parameters + 3 * ROWS // 4 * SEQ * WIDTH * 4
    assert parallel.trace is not None and dict(parallel.trace.memory) == found
    assert {e.kind for e in parallel.trace.events} == {"F", "B", "SEND", "RECV"}
    assert not parallel.record


def test_measure_memory_without_a_loss_measures_one_forward() -> None:
    x = torch.randn(ROWS, SEQ, WIDTH)
    parallel = divided(Deep(), (x,), at=["blocks.3"], microbatches=4)
    parallel.eval()
    found = parallel.measure_memory(x)
    assert found["cpu:0"] > 0 and found["cpu:1"] > 0
    assert all(p.grad is None for p in parallel.parameters())


def test_tracing_records_forward_and_backward_of_a_call_and_nothing_outside() -> None:
    parallel = deep(2)
    x = torch.randn(ROWS, SEQ, WIDTH)
    parallel(x)
    assert parallel.trace is None
    with parallel.tracing():
        parallel(x).sum().backward()
    assert parallel.trace is not None
    kinds = [e.kind for e in parallel.trace.events if e.device == "cpu:0"]
    assert kinds.count("F") == 2 and kinds.count("B") == 2
    assert not parallel.record


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a


def many_small_ops() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()) for _ in range(24)))


class Calls:
    """Counts the calls of functions, Python's and C's, in this thread and in threads started meanwhile.

    Counted, not timed: a clock on a loaded machine says more of the machine (``benchmarks.overhead`` tells the time).
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: object, event: str, arg: object) -> None:
        self.count += event in ("call", "c_call")

    def __enter__(self) -> Calls:
        threading.setprofile(self)
        return self

    def __exit__(self, *exc: object) -> None:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)

    def of(self, run: Callable[[], object]) -> int:
        """The fewest calls of functions of three runs."""
        counts = []
        for _ in range(3):
            before = self.count
            sys.setprofile(self)
            run()
            sys.setprofile(None)
            counts.append(self.count - before)
        return min(counts)


def test_an_instruction_costs_a_bounded_number_of_calls_beyond_its_ops() -> None:
    """64 microbatches of one op, against plain PyTorch doing the same 64 forwards and backwards."""
    model, x = Tiny(), torch.randn(256, 1)

    def plain() -> None:
        for part in x.split(4):
            (part * model.a).sum().backward()

    with Calls() as calls:
        parallel = divided(model, (x,), microbatches=64, loss_fn=lambda y, t: y.sum())
        parallel.train_step(x, x)
        extra = (calls.of(lambda: parallel.train_step(x, x)) - calls.of(plain)) / 128
    print(f"\n{extra:.1f} calls of functions an instruction")
    assert 0 < extra < 9


def test_a_call_on_one_device_costs_a_bounded_number_of_calls_beyond_the_plain_call() -> None:
    """72 ops in 97 modules: before a call, a few things of each module and parameter are looked at, and no more."""
    model, x = many_small_ops(), torch.randn(4, 4)
    with Calls() as calls:
        parallel = divided(model, (x,))
        parallel(x)
        extra = calls.of(lambda: parallel(x)) - calls.of(lambda: model(x))
    print(f"\n{extra} calls of functions a call")
    assert 0 < extra < 45 * len(list(model.modules()))
