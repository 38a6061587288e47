"""Replicas make each weight's gradient once: the right sum, the same bits every time, one copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.measure import local_cluster
from partita.plan import Batch, Plan, Stage
from partita.runtime import weight_share
from partita.runtime.compare import compare, observe
from partita.runtime.module import ParallelModule


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
    plain = weight_share.Meeting._make

    def counted(self: weight_share.Meeting, device: str, owed: list[weight_share._Owed]) -> None:
        made.append(len(owed))
        plain(self, device, owed)

    monkeypatch.setattr(weight_share.Meeting, "_make", counted)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    divided = _replicas(model, 2)
    observe(divided, model, (torch.randn(7, 8),), {})
    divided.close()
    assert made == [2, 2, 2]  # three weights, each from the pairs of both replicas
