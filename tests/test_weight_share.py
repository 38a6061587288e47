"""Replicas make each weight's gradient once: the right sum, the same bits every time, one copy."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from partita.measure import local_cluster
from partita.plan import Batch, Plan, Stage
from partita.runtime import weight_grad, weight_share
from partita.runtime.compare import compare, observe
from partita.runtime.module import ParallelModule
from partita.runtime.waits import Waits


class Tied(nn.Module):
    """An embedding shared with the head and with one that pads, a layer called twice and one with its weight but
    another bias, one whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.twice = nn.Linear(16, 16)
        self.idle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.padded = nn.Embedding(32, 16, padding_idx=0)
        self.padded.weight = self.embed.weight
        self.other = nn.Linear(16, 16)
        self.other.weight = self.twice.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(torch.tanh(self.twice(self.embed(x))))
        y = torch.tanh(self.other(y)) + self.padded(x)
        self.idle(y)
        return self.head(y)


def _replicas(model: nn.Module, count: int, schedule: str = "1f1b") -> ParallelModule:
    devices = tuple(f"cpu:{i}" for i in range(count))
    plan = Plan(stages=(Stage(devices, modules=("",)),), devices=devices, batch=Batch(7, count), schedule=schedule)
    return ParallelModule(model, plan, local_cluster(list(devices)))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_are_the_unsplit_models(count: int, schedule: str) -> None:
    model = Tied()
    x = torch.randint(32, (7, 5))
    divided = _replicas(model, count, schedule)
    found = compare(observe(model, model, (x,), {}), observe(divided, model, (x,), {}))
    divided.close()
    assert found.ok, str(found)


def test_the_same_bits_whoever_is_faster() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)])
    x = torch.randn(7, 32)
    divided = _replicas(model, 2)
    first = observe(divided, model, (x,), {}).gradients
    for _ in range(10):
        again = observe(divided, model, (x,), {}).gradients
        assert all(torch.equal(first[name], again[name]) for name in first)
    divided.close()


def test_each_weights_gradient_exists_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = weight_share._make

    def counted(owed: list[weight_share._Owed], replica: int) -> None:
        made.append(len(owed))
        plain(owed, replica)

    monkeypatch.setattr(weight_share, "_make", counted)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    divided = _replicas(model, 2)
    observe(divided, model, (torch.randn(7, 8),), {})
    divided.close()
    assert made == [2, 2, 2]  # three weights, each from the pairs of both replicas


class Turned(nn.Module):
    """As GPT-2's Conv1D: weight (in, out)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside) * 0.1)
        self.bias = nn.Parameter(torch.randn(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("count", [2, 3])
def test_large_products_are_made_in_parts_with_the_same_numbers_and_bits(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_grad, "LEAST_TO_CUT", 0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), Turned(9, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), Twice(5))
    x = torch.randn(7, 8)
    divided = _replicas(model, count)
    first = observe(divided, model, (x,), {})
    found = compare(observe(model, model, (x,), {}), first)
    assert found.ok, str(found)
    for _ in range(5):
        again = observe(divided, model, (x,), {}).gradients
        assert all(torch.equal(first.gradients[name], again[name]) for name in again)
    divided.close()


class Twice(nn.Module):
    """A weight that a product and another op take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) * self.weight.sum()


def test_products_made_after_the_last_instruction_are_in_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = weight_share.Meeting.make_ready

    def only_at_the_end(self: weight_share.Meeting, device: str, *how: object, **note: object) -> None:
        if device in self._ended:
            plain(self, device, *how, **note)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_share.Meeting, "make_ready", only_at_the_end)
    monkeypatch.setattr(weight_share, "together", lambda *_: {})  # nobody waits
    divided = _replicas(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), 2)
    with divided.tracing():
        divided(torch.randn(7, 8)).sum().backward()
    divided.close()
    assert divided.trace is not None
    assert sum(e.kind == "W" for e in divided.trace.events) == 2


def test_replicas_whose_pairs_come_in_different_orders_do_not_wait_for_ever() -> None:
    sharing = weight_share.Sharing({"a": 1, "b": 1}, ("cpu:0", "cpu:1"), {"a": 1, "b": 1})
    meeting = weight_share.Meeting(sharing, Waits())
    weights = {name: torch.zeros(4, 4, requires_grad=True) for name in "ab"}

    def hand_in(device: str, order: str) -> None:
        share = weight_share.Shared(meeting, device)
        for name in order:
            gradient = weight_grad._Matrix(weights[name], None)
            share.add(name, "linear", gradient, torch.ones(2, 4), torch.ones(2, 4))
        share.end(nullcontext)

    threads = [threading.Thread(target=hand_in, args=pair) for pair in (("cpu:0", "ab"), ("cpu:1", "ba"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    meeting.finish()
    assert all(w.grad is not None and torch.equal(w.grad, torch.full((4, 4), 4.0)) for w in weights.values())
