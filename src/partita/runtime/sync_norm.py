"""Batch norm over replicas: each device normalises its rows with the statistics of the whole batch.

    device a   x_a ─ mean, var of a ┐            ┌ normalise ─▶ y_a      backward: sums of dy and dy·x̂ meet the same way
    device b   x_b ─ mean, var of b ┴─ combine ──┴ normalise ─▶ y_b

The statistics combine exactly (Chan, Golub and LeVeque 1983); running averages are updated once. Every device must run
the op at the same time, so a plan may use it only where a stage has as many replicas as there are microbatches.

PyTorch takes the statistics of a contiguous tensor value by value on CPUs; the sums that its backward takes are
vectorised and six times as fast, so they are used here (``statistics``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from partita.runtime.waits import Stopped, Waits

PATIENCE = 3e-4  # seconds to look again and again before a thread goes to sleep: waking up takes as long


class Gathering:
    """Where ``parties`` threads each bring a value and leave with everybody's, in order of rank."""

    keeps_own = False  # the running averages are one memory, which rank 0 updates

    def __init__(self, parties: int, waits: Waits) -> None:
        self.parties = parties
        self._waits = waits
        self._brought: dict[Hashable, dict[int, Any]] = {}
        self._left: dict[Hashable, int] = {}
        self._changed = threading.Condition()

    def gather(self, key: Hashable, rank: int, value: Any, what: str = "") -> list[Any]:
        """Everybody's values for ``key``; ``what`` it is for, in words. Raises Stopped when the step was stopped,
        Deadlock where somebody cannot come."""
        with self._changed:
            found = self._brought.setdefault(key, {})
            found[rank] = value
            if len(found) == self.parties:
                self._changed.notify_all()
        limit = time.perf_counter() + PATIENCE
        while len(found) < self.parties and time.perf_counter() < limit:
            time.sleep(0)
        if len(found) < self.parties:
            with self._waits.waiting(what or str(key), lambda: len(found) == self.parties), self._changed:
                while len(found) < self.parties:
                    if self._waits.stopped:
                        raise Stopped
                    self._changed.wait(0.2)
        with self._changed:
            self._left[key] = self._left.get(key, 0) + 1
            if self._left[key] == self.parties:
                del self._brought[key], self._left[key]
            return [found[i] for i in range(self.parties)]


_current = threading.local()


class Gathers(Protocol):
    """A Gathering, of threads or of processes. ``keeps_own``: each party has running averages of its own."""

    @property
    def keeps_own(self) -> bool: ...

    def gather(self, key: Hashable, rank: int, value: Any) -> list[Any]: ...


def join(meeting: Gathers | None, rank: int) -> None:
    """The calling thread's gathering and its rank there, for the ops it is about to run."""
    _current.meeting, _current.rank = meeting, rank


MOST_OFF = 4.0  # deviations a mean may be from 0: its square times float32's rounding is what the variance loses


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel (dim 1) of ``x``.

    var = sum(x (x - mean)) / n, less mean (sum(x) - n mean) / n for the rounding of the mean: right to a few roundings
    where the mean is within ``MOST_OFF`` deviations of 0; elsewhere PyTorch's own.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() > 2 and x.is_contiguous():
        count = x.numel() // x.shape[1]
        mean = x.sum((0, *range(2, x.dim()))) / count
        _, products, sums = torch.ops.aten.native_batch_norm_backward(
            x, x, None, None, None, mean, torch.ones_like(mean), True, 0.0, [False, True, True]
        )
        var = products.sub_(mean * sums.sub_(mean, alpha=count)).div_(count)
        if bool((mean * mean <= MOST_OFF**2 * var).all()):
            return mean, var
    found: tuple[torch.Tensor, torch.Tensor] = torch.batch_norm_update_stats(x, None, None, 0.0)
    return found


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
        running: tuple[torch.Tensor | None, torch.Tensor | None], momentum: float, eps: float, key: str,
    ) -> torch.Tensor:  # fmt: skip
        meeting, rank = _current.meeting, _current.rank
        count = x.numel() // x.shape[1]
        mean, var = statistics(x)
        parts = meeting.gather((key, "forward"), rank, (count, mean, var))
        total = sum(n for n, _, _ in parts)
        mean = sum(n * m for n, m, _ in parts) / total
        var = sum(n * (v + (m - mean) ** 2) for n, m, v in parts) / total
        if (rank == 0 or meeting.keeps_own) and running[0] is not None and running[1] is not None:
            running[0].mul_(1 - momentum).add_(mean, alpha=momentum)
            running[1].mul_(1 - momentum).add_(var * (total / max(total - 1, 1)), alpha=momentum)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.key, ctx.total, ctx.affine = eps, key, total, (weight is not None, bias is not None)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        meeting, rank = _current.meeting, _current.rank
        inverse = torch.rsqrt(var + ctx.eps)
        result, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(), x, weight, mean, var, mean, inverse, False, ctx.eps, [True, True, True]
        )
        parts = meeting.gather((ctx.key, "backward"), rank, (by_weight, by_bias))
        scale = inverse / ctx.total if weight is None else weight.detach() * inverse / ctx.total
        all_weight, all_bias = sum(w for w, _ in parts), sum(b for _, b in parts)
        result -= torch.batch_norm(x, scale * all_weight, scale * all_bias, mean, var, False, 0.0, ctx.eps, False)
        has_weight, has_bias = ctx.affine
        return result, by_weight if has_weight else None, by_bias if has_bias else None, None, None, None, None


def batch_norm(key: str) -> Callable[..., torch.Tensor]:
    """``aten.batch_norm`` for the op named ``key``; out of training it is the plain op."""

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool,
    ) -> torch.Tensor:  # fmt: skip
        if not training:
            return torch.batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
        result: torch.Tensor = _BatchNorm.apply(x, weight, bias, (running_mean, running_var), momentum, eps, key)  # type: ignore[no-untyped-call]
        return result

    run.returns_sequence = False  # type: ignore[attr-defined]
    return run
