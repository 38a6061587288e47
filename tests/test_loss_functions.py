"""``train_step`` gives the plain step's loss and gradients whatever its loss function reads, keeps and changes.

Each loss is made anew for the plain and for the divided model; between steps ``turn(k)`` changes what it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dividing import divided
from torch import nn

pytestmark = pytest.mark.timeout(60)

BETA = 1.0
Made = tuple[Callable[..., torch.Tensor], Callable[[int], Any], Callable[[], Any]]
"""The loss function, what happens before step k, what the loss function holds in the end."""


def no_turn(k: int) -> None: ...


def nothing() -> None: ...


def by_global() -> Made:
    def turn(k: int) -> None:
        global BETA
        BETA = float(k)

    return lambda y, t: BETA * F.mse_loss(y, t) + y.mean(), turn, nothing


def by_closure() -> Made:
    beta = 1.0

    def loss(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return beta * F.mse_loss(y, t) + y.mean()

    def turn(k: int) -> None:
        nonlocal beta
        beta = float(k)

    return loss, turn, nothing


def by_attribute() -> Made:
    class Loss:
        beta = 1.0

        def weighted(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.beta * F.mse_loss(y, t) + y.mean()

    held = Loss()
    return held.weighted, functools.partial(setattr, held, "beta"), nothing


def by_partial() -> Made:
    options = {"beta": 1.0}

    def loss(y: torch.Tensor, t: torch.Tensor, *, options: dict[str, float]) -> torch.Tensor:
        return options["beta"] * F.mse_loss(y, t) + y.mean()

    return functools.partial(loss, options=options), lambda k: options.update(beta=float(k)), nothing


def by_tensor() -> Made:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.ones(4)

        def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return (self.weights * (y - t) ** 2).mean()

    held = Loss()
    return held, lambda k: setattr(held, "weights", torch.full((4,), float(k))), nothing


def by_mode() -> Made:
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).requires_grad_(False)
    return lambda y, t: F.mse_loss(frozen(y), t), lambda k: frozen.train(k % 2 == 0), nothing


def counting() -> Made:
    class Loss(nn.Module):
        calls = 0

        def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return F.mse_loss(y, t) * min(1.0, self.calls / 3)

    held = Loss()
    return held, no_turn, lambda: held.calls


def logging() -> Made:
    log: list[torch.Tensor] = []

    def loss(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        found = F.mse_loss(y, t)
        log.append(found.detach())
        return found

    return loss, no_turn, lambda: torch.stack(log)


def averaging() -> Made:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("center", torch.zeros(4))

        def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            found = F.mse_loss(y - self.center, t)
            self.center = 0.5 * self.center + 0.5 * y.detach().mean(0)
            return found

    held = Loss()
    return held, no_turn, lambda: held.center


def trained() -> Made:
    head = nn.Linear(4, 1)
    return lambda y, t: F.softplus(head(y)).mean(), no_turn, lambda: head.weight.grad


@pytest.mark.parametrize(
    "make",
    [by_global, by_closure, by_attribute, by_partial, by_tensor, by_mode, counting, logging, averaging, trained],
    ids=lambda make: make.__name__,
)
def test_a_loss_function_is_what_it_is_at_each_step(make: Callable[[], Made]) -> None:
    results: list[list[Any]] = []
    for kind in ("plain", "divided"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        loss_fn, turn, ends = make()
        if kind == "divided":
            step = divided(model, (torch.randn(6, 4),), at=["2"], microbatches=3, loss_fn=loss_fn).train_step
        else:
            step = SimpleNamespace(run=lambda x, t, m=model, f=loss_fn: plain_step(m, f, x, t)).run
        torch.manual_seed(1)
        found = []
        for k in range(1, 6):
            turn(k)
            found.append(step(torch.randn(6, 4), torch.randn(6, 4)))
        end = ends()
        found += [*(p.grad for p in model.parameters()), torch.as_tensor(0 if end is None else end)]
        results.append(found)
    for plain, parallel in zip(*results, strict=True):
        torch.testing.assert_close(parallel, plain, rtol=1e-4, atol=1e-6)


def plain_step(model: nn.Module, loss_fn: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = loss_fn(model(x), t)
    loss.backward()
    return loss.detach()


def test_another_loss_function_takes_the_place_of_the_first() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    parallel = divided(model, (torch.randn(6, 4),), at=["2"], microbatches=3, loss_fn=F.mse_loss)
    x, t = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(parallel.train_step(x, t), F.mse_loss(model(x), t).detach())
    parallel.loss_fn = F.l1_loss
    torch.testing.assert_close(parallel.train_step(x, t), F.l1_loss(model(x), t).detach())


def test_inputs_and_targets_that_require_gradients_get_them_from_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    parallel = divided(model, (torch.randn(6, 4),), at=["2"], microbatches=3, loss_fn=F.mse_loss)
    x, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    want = torch.autograd.grad(F.mse_loss(model(x), t), (x, t))
    parallel.train_step(x, t)
    torch.testing.assert_close((x.grad, t.grad), want)
