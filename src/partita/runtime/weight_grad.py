"""Weight gradients apart from the rest of backward: put off, and made for several microbatches in one product.

A pipeline of M microbatches adds M gradients to every weight: each a product with a short inner dimension, a
temporary the size of the weight, and an addition that reads and writes it again. Here backward only computes what the
stage before waits for (Zero Bubble Pipeline Parallelism, Qi et al. 2024, the B step) and remembers
(input, output gradient); the W step joins what it holds and makes one product, straight into ``.grad``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from partita.cost.pairs import PUT_OFF
from partita.torch_compat import no_view

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Gradient(Protocol):
    """How one op's weight gradient comes of its pairs (input, output gradient)."""

    def make(self, pairs: Pairs) -> None:
        """Add it to the weight's ``.grad``."""

    def cut(self, pairs: Pairs, count: int) -> Cut | None:
        """``count`` parts that threads may make at the same time; None where that would not pay."""


@dataclass(frozen=True)
class Cut:
    """``parts``: each to be run once, in any order, by any thread; then ``finish`` adds the whole to ``.grad``."""

    parts: tuple[Callable[[], None], ...]
    finish: Callable[[], None]


class Share(Protocol):
    """What a queue asks of ``weight_share.Shared``."""

    def takes(self, name: str) -> bool: ...

    def add(self, name: str, kind: str, gradient: Gradient, x: torch.Tensor, grad: torch.Tensor) -> None: ...


class WeightQueue:
    """What one device has put off. ``put_off`` False: made at once, still straight into ``.grad``.

    ``share``: where replicas make each weight's gradient once, for all of them (``weight_share``).
    """

    def __init__(self) -> None:
        self.put_off = False
        self.share: Share | None = None
        self.key: object = None
        self._held: dict[object, dict[object, tuple[Gradient, Pairs]]] = {}

    def add(
        self, what: tuple[object, ...], leaf: torch.Tensor, gradient: Gradient, x: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """``what``: the kind of product and its weights. Pairs of the same ``what`` are joined, replicas' where
        kind and weight are the same."""
        name = getattr(leaf, _MARK)
        if self.share is not None and self.share.takes(name):
            self.share.add(name, str(what[0]), gradient, x, grad)
        elif not self.put_off:
            gradient.make([(x, grad)])
        else:
            entries = self._held.setdefault(self.key, {})
            entries.setdefault(what, (gradient, []))[1].append((x, grad))

    def flush(self, keys: list[object]) -> None:
        """Make the gradients of these runs, all runs of one weight in one product."""
        joined: dict[object, tuple[Gradient, Pairs]] = {}
        for key in keys:
            for what, (gradient, pairs) in self._held.pop(key, {}).items():
                joined.setdefault(what, (gradient, []))[1].extend(pairs)
        with torch.no_grad():
            for what in list(joined):  # what a product has used goes before the next
                gradient, pairs = joined.pop(what)
                gradient.make(pairs)
                del pairs


_current = threading.local()


def use_queue(queue: WeightQueue | None) -> None:
    """The queue of the calling thread's forwards."""
    _current.queue = queue


def _queue(*weights: torch.Tensor | None) -> WeightQueue | None:
    """The thread's queue, where the weights are a device's own real leaves (``mark``) and nothing casts them.

    Other leaves, activations received from another stage say, need their gradient in B, not later.
    """
    queue: WeightQueue | None = getattr(_current, "queue", None)
    if queue is None or not torch.is_grad_enabled():
        return None
    if any(w is not None and not (w.requires_grad and hasattr(w, _MARK)) for w in weights):
        return None
    if any(w is not None and w.is_complex() for w in weights):  # the products below do not conjugate
        return None
    return queue


_MARK = "partita_alias"


def _name(leaf: torch.Tensor | None) -> str:
    return getattr(leaf, _MARK, "")


def mark(alias: torch.Tensor, name: str) -> None:
    """Say that a tensor is a device's leaf over this parameter: its gradient may come as late as the step's end."""
    setattr(alias, _MARK, name)


def _add(weight: torch.Tensor, grad: torch.Tensor) -> None:
    if weight.grad is None:
        weight.grad = grad
    else:
        weight.grad.add_(grad)


LEAST_TO_CUT = 1 << 27
"""Multiplications below which a product's parts cost more in calls than they gain in balance: a few ms on a core."""


@dataclass(frozen=True)
class _Matrix:
    """weight.grad += left' right, and bias.grad += the output gradients' sum. ``turned``: the weight is (in, out)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    turned: bool = False

    def make(self, pairs: Pairs) -> None:
        for x, grad in _rows(pairs):
            left, right = (x, grad) if self.turned else (grad, x)
            if self.weight.grad is None:
                self.weight.grad = left.t() @ right
            else:
                self.weight.grad.addmm_(left.t(), right)
            if self.bias is not None:
                _add(self.bias, grad.sum(0))

    def cut(self, pairs: Pairs, count: int) -> Cut | None:
        """Rows of the weight are parts: each reads all of ``right`` and its columns of ``left``."""
        rows = sum(x.numel() // max(x.shape[-1], 1) for x, _ in pairs)
        length = self.weight.shape[0]
        if length < count or rows * self.weight.numel() < LEAST_TO_CUT:
            return None
        whole = torch.empty_like(self.weight, requires_grad=False)
        joined = _rows(pairs)
        sums: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the bias

        def part(start: int, stop: int) -> None:
            for number, (x, grad) in enumerate(joined):
                left, right = (x, grad) if self.turned else (grad, x)
                if number:
                    whole[start:stop].addmm_(left[:, start:stop].t(), right)
                else:
                    torch.mm(left[:, start:stop].t(), right, out=whole[start:stop])
                if self.bias is not None and not start:
                    sums.append((self.bias, grad.sum(0)))

        def finish() -> None:
            for leaf, grad in ((self.weight, whole), *sums):
                _add(leaf, grad)

        edges = [length * k // count for k in range(count + 1)]
        return Cut(tuple(partial(part, a, b) for a, b in itertools.pairwise(edges)), finish)


@dataclass(frozen=True)
class _Table:
    """An embedding's gradient: made once, not per microbatch, since it is as large as the table."""

    weight: torch.Tensor
    padding: int

    def make(self, pairs: Pairs) -> None:
        rows, gs = [i.reshape(-1) for i, _ in pairs], [g.reshape(-1, g.shape[-1]) for _, g in pairs]
        index, grad = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (rows, gs))
        length = self.weight.shape[0]
        _add(self.weight, torch.ops.aten.embedding_dense_backward(grad, index, length, self.padding, False))

    def cut(self, pairs: Pairs, count: int) -> Cut | None:
        return None


def _rows(pairs: Pairs) -> Pairs:
    """The pairs as matrices; joined into one pair where copying rows is cheaper than adding to the weight again."""
    flat = [(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])) for x, g in pairs]
    inside, outside = flat[0][0].shape[1], flat[0][1].shape[1]
    rows = sum(x.shape[0] for x, _ in flat)
    if len(flat) == 1 or rows * (inside + outside) > inside * outside * (len(flat) - 1):
        return flat
    return [(torch.cat([x for x, _ in flat]), torch.cat([g for _, g in flat]))]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, queue: WeightQueue
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.bias, ctx.queue, ctx.wants_x = weight, bias, queue, x.requires_grad
        return no_view(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        leaf, bias = ctx.leaf, ctx.bias  # under recomputation the saved weight is a detached copy
        result = grad.matmul(weight) if ctx.wants_x else None
        ctx.queue.add((f"linear {_name(bias)}", id(leaf), id(bias)), leaf, _Matrix(leaf, bias), x, grad)
        return result, None, None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``aten.linear`` with its weight gradient apart."""
    queue = _queue(weight, bias) if weight.dim() == 2 and x.dim() > 1 else None
    if queue is None:
        return F.linear(x, weight, bias)
    result: torch.Tensor = _Linear.apply(x, weight, bias, queue)  # type: ignore[no-untyped-call]
    return result


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, queue: WeightQueue
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.bias, ctx.queue, ctx.wants_x = weight, bias, queue, x.requires_grad
        return torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        leaf, bias = ctx.leaf, ctx.bias  # under recomputation the saved weight is a detached copy
        result = grad.matmul(weight.t()) if ctx.wants_x else None
        ctx.queue.add((f"addmm {_name(bias)}", id(leaf), id(bias)), leaf, _Matrix(leaf, bias, turned=True), x, grad)
        return None, result, None, None


def addmm(
    bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """``aten.addmm(bias, x, weight)`` (GPT-2's Conv1D) with its weight gradient apart."""
    queue = _queue(bias, weight) if bias.dim() == 1 and beta == 1 and alpha == 1 else None
    if queue is None:
        return torch.addmm(bias, x, weight, beta=beta, alpha=alpha)
    result: torch.Tensor = _Addmm.apply(bias, x, weight, queue)  # type: ignore[no-untyped-call]
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, index: torch.Tensor, padding: int, queue: WeightQueue) -> torch.Tensor:
        ctx.save_for_backward(index, weight)
        ctx.leaf, ctx.padding, ctx.queue = weight, padding, queue
        return no_view(torch.embedding(weight, index))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        index, _ = ctx.saved_tensors
        leaf, padding = ctx.leaf, ctx.padding
        ctx.queue.add((f"embedding {padding}", id(leaf), padding), leaf, _Table(leaf, padding), index, grads[0])
        return None, None, None, None


def embedding(
    weight: torch.Tensor,
    index: torch.Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """``aten.embedding`` with its weight gradient apart: the table-sized gradient is made once, not per microbatch."""
    queue = None if scale_grad_by_freq or sparse else _queue(weight)
    if queue is None:
        return torch.embedding(weight, index, padding_idx, scale_grad_by_freq, sparse)
    result: torch.Tensor = _Embedding.apply(weight, index, padding_idx, queue)  # type: ignore[no-untyped-call]
    return result


WEIGHT_ARGUMENT = {f"aten.{name}.default": position for name, position in PUT_OFF.items()}
APART: dict[str, Callable[..., Any]] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    "aten.embedding.default": embedding,
}
for _function in APART.values():
    _function.returns_sequence = False  # type: ignore[attr-defined]
