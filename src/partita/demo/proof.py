"""Proof: a divided model beside its unsplit twin, one step gradient by gradient, then a training side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter, sleep

import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F

from partita.demo.data import Batch
from partita.runtime.module import ParallelModule


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over every predicted place."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def train_both(
    plain: nn.Module,
    parallel: ParallelModule,
    updates: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    batches: Iterator[Batch],
    steps: int,
    progress: Progress,
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The same training twice, step by step in turn: (plain, parallel) losses and seconds of forward and backward."""
    losses, seconds = [], []
    task = progress.add_task(f"training both for {steps} steps", total=steps)
    for step in range(steps):
        x, target = next(batches)

        def ordinary(x: torch.Tensor = x, target: torch.Tensor = target) -> torch.Tensor:
            loss = loss_fn(plain(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        def divided(x: torch.Tensor = x, target: torch.Tensor = target) -> torch.Tensor:
            return parallel.train_step(x, target)

        both: list[tuple[float, float]] = [(0.0, 0.0)] * 2
        for which in ((0, 1), (1, 0))[step % 2]:
            updates[which].zero_grad(set_to_none=True)
            torch.manual_seed(step)  # both draw the same dropout
            sleep(0.01)  # threads of the one before come to rest
            start = perf_counter()
            loss = (ordinary, divided)[which]()
            both[which] = (float(loss), perf_counter() - start)
            updates[which].step()
        losses.append((both[0][0], both[1][0]))
        seconds.append((both[0][1], both[1][1]))
        progress.update(task, advance=1, description=f"training both, loss {both[1][0]:.3f}")
    progress.remove_task(task)
    return losses, seconds


def step_gradients_off(
    plain: nn.Module, parallel: ParallelModule, x: torch.Tensor, target: torch.Tensor
) -> tuple[float, str, float]:
    """One ``train_step`` against one ordinary step: (worst gradient difference, its name, difference of the loss)."""
    for model in (plain, parallel):
        model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    want = loss_fn(plain(x), target)
    want.backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    loss = parallel.train_step(x, target)
    worst, name = 0.0, ""
    have = dict(parallel.module.named_parameters())
    for n, p in plain.named_parameters():
        a, b = p.grad, have[n].grad
        if a is None or b is None:
            off = 0.0 if a is b else float("inf")
        else:
            off = ((a - b).abs().max() / a.abs().max().clamp_min(1e-8)).item()
        if not off <= worst:  # also where it is not a number
            worst, name = off, n
    for model in (plain, parallel):
        model.zero_grad(set_to_none=True)
    return worst, name, abs(loss.item() - want.item()) / abs(want.item())


def curve(losses: Sequence[tuple[float, float]]) -> str:
    """The loss curve in one line of blocks."""
    values = [b for _, b in losses]
    low, high = min(values), max(values)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((v - low) / ((high - low) or 1.0) * 7)] for v in values)
