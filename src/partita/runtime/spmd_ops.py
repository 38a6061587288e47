"""The ops that stand between divided ops: differentiable changes of placement over a ``Group``.

    forward                 backward
    all_reduce              -                     the gradient of a sum is everybody's
    copied                  all_reduce            everybody has a part of the gradient
    take                    all_gather            own rows of what all hold
    all_gather              own rows
    all_gather_copied       reduce_scatter        its backward's all_reduce and slice in one
    reduce_scatter          all_gather
    exchange                exchange              own rows of one dim for own rows of another: an all_to_all

``rounds``: which rows of a dim each member holds (``placements.Cut``); where they are several, rows are put in order
before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from partita.runtime.collectives import Group
from partita.runtime.layout import lying

Rounds = Sequence[Sequence[int]]


def own_rows(tensor: torch.Tensor, dim: int, rounds: Rounds, rank: int) -> torch.Tensor:
    """Of a whole tensor the rows of one member: a view where they lie together."""
    total = sum(map(sum, rounds))
    outer = tensor.shape[dim] // total if total else 1
    if len(rounds) == 1 and outer == 1:
        return tensor.narrow(dim, sum(rounds[0][:rank]), rounds[0][rank])
    shape = tensor.shape
    split = tensor.reshape(*shape[:dim], outer, total, *shape[dim + 1 :])
    parts, start = [], 0
    for r in rounds:
        parts.append(split.narrow(dim + 1, start + sum(r[:rank]), r[rank]))
        start += sum(r)
    joined = torch.cat(parts, dim + 1) if len(parts) > 1 else parts[0]
    return joined.reshape(*shape[:dim], -1, *shape[dim + 1 :])


def put_rows(whole: torch.Tensor, part: torch.Tensor, dim: int, rounds: Rounds, rank: int) -> None:
    """Write one member's rows into their places."""
    total, mine = sum(map(sum, rounds)), sum(r[rank] for r in rounds)
    outer = whole.shape[dim] // total if total else 1
    shape = whole.shape
    target = whole.view(*shape[:dim], outer, total, *shape[dim + 1 :])
    source = part.reshape(*shape[:dim], outer, mine, *shape[dim + 1 :])
    start = taken = 0
    for r in rounds:
        place = target.narrow(dim + 1, start + sum(r[:rank]), r[rank])
        place.copy_(source.narrow(dim + 1, taken, r[rank]))
        start, taken = start + sum(r), taken + r[rank]


def _sizes(tensor_rows: int, rounds: Rounds, size: int, rank: int) -> list[int]:
    """Rows of every member, from this one's."""
    each = [sum(r[i] for r in rounds) for i in range(size)]
    outer = tensor_rows // each[rank]
    return [n * outer for n in each]


def gathered(group: Group, tensor: torch.Tensor, dim: int, rounds: Rounds) -> torch.Tensor:
    """The whole, of everybody's rows."""
    sizes = _sizes(tensor.shape[dim], rounds, group.size, group.rank)
    return lying(_joined(group.all_gather(tensor.contiguous(), dim, sizes), dim, rounds), tensor)


def _joined(parts: Sequence[torch.Tensor], dim: int, rounds: Rounds) -> torch.Tensor:
    """Everybody's rows in the order of the whole."""
    outer = sum(p.shape[dim] for p in parts) // sum(map(sum, rounds))
    if len(rounds) == 1 and outer == 1:
        return torch.cat(list(parts), dim)
    shape = parts[0].shape
    split = [p.reshape(*shape[:dim], outer, -1, *shape[dim + 1 :]) for p in parts]
    taken = [0] * len(parts)
    pieces = []
    for r in rounds:
        for i, length in enumerate(r):
            pieces.append(split[i].narrow(dim + 1, taken[i], length))
            taken[i] += length
    return torch.cat(pieces, dim + 1).reshape(*shape[:dim], -1, *shape[dim + 1 :])


def exchanged(
    group: Group, tensor: torch.Tensor, held: int, held_rounds: Rounds, dim: int, rounds: Rounds
) -> torch.Tensor:
    """This member's rows of ``dim``, of all rows of ``held``, of which everybody has some."""
    parts = [own_rows(tensor, dim, rounds, r) for r in range(group.size)]
    sizes = _sizes(tensor.shape[held], held_rounds, group.size, group.rank)
    shapes = []
    for size in sizes:
        shape = list(parts[group.rank].shape)
        shape[held] = size
        shapes.append(shape)
    largest = max(p.numel() for p in parts) // max(sizes[group.rank], 1) * max(sizes)
    return lying(_joined(group.all_to_all(parts, shapes, largest if min(sizes) else 0), held, held_rounds), tensor)


def scattered(group: Group, tensor: torch.Tensor, dim: int, rounds: Rounds) -> torch.Tensor:
    """This member's rows of the sum of everybody's whole."""
    total = sum(map(sum, rounds))
    outer = tensor.shape[dim] // total
    sizes = [sum(r[i] for r in rounds) * outer for i in range(group.size)]
    if len(rounds) > 1 or outer > 1:
        tensor = torch.cat([own_rows(tensor, dim, rounds, i) for i in range(group.size)], dim)
    return group.reduce_scatter(tensor.contiguous(), dim, sizes)


def _noted(ctx: Any, group: Group) -> Group:
    """The group of this call, kept for its backward."""
    ctx.group, ctx.op = group, group.op
    return group


def _of(ctx: Any) -> Group:
    """The group again, in the backward of what was noted."""
    group: Group = ctx.group
    group.op = f"the backward of {ctx.op}"
    return group


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: torch.Tensor) -> torch.Tensor:
        return group.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, grads[0]


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: torch.Tensor) -> torch.Tensor:
        _noted(ctx, group)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, _of(ctx).all_reduce(grads[0].contiguous())


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: torch.Tensor, dim: int, rounds: Rounds) -> torch.Tensor:
        ctx.dim, ctx.rounds = dim, rounds
        return own_rows(x, dim, rounds, _noted(ctx, group).rank)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, gathered(_of(ctx), grads[0], ctx.dim, ctx.rounds), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: torch.Tensor, dim: int, rounds: Rounds, partial: bool) -> torch.Tensor:
        ctx.dim, ctx.rounds, ctx.partial = dim, rounds, partial
        return gathered(_noted(ctx, group), x, dim, rounds)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.partial:
            found = scattered(_of(ctx), grads[0], ctx.dim, ctx.rounds)
        else:
            found = own_rows(grads[0], ctx.dim, ctx.rounds, ctx.group.rank)
        return None, found, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: torch.Tensor, dim: int, rounds: Rounds) -> torch.Tensor:
        ctx.dim, ctx.rounds = dim, rounds
        return scattered(_noted(ctx, group), x, dim, rounds)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, gathered(_of(ctx), grads[0], ctx.dim, ctx.rounds), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: Group, x: torch.Tensor, held: int, held_rounds: Rounds, dim: int, rounds: Rounds
    ) -> torch.Tensor:
        ctx.back = dim, rounds, held, held_rounds
        return exchanged(_noted(ctx, group), x, held, held_rounds, dim, rounds)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, exchanged(_of(ctx), grads[0], *ctx.back), None, None, None, None


def all_reduce(x: torch.Tensor, *, group: Group) -> torch.Tensor:
    return _AllReduce.apply(group, x)  # type: ignore[no-any-return, no-untyped-call]


def copied(x: torch.Tensor, *, group: Group) -> torch.Tensor:
    return _Copied.apply(group, x)  # type: ignore[no-any-return, no-untyped-call]


def take(x: torch.Tensor, dim: int, rounds: Rounds, *, group: Group) -> torch.Tensor:
    """Own rows; of what wants no gradient simply a view, through which a buffer is changed."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return own_rows(x, dim, rounds, group.rank)
    return _Take.apply(group, x, dim, rounds)  # type: ignore[no-any-return, no-untyped-call]


def all_gather(x: torch.Tensor, dim: int, rounds: Rounds, *, group: Group) -> torch.Tensor:
    return _AllGather.apply(group, x, dim, rounds, False)  # type: ignore[no-any-return, no-untyped-call]


def all_gather_copied(x: torch.Tensor, dim: int, rounds: Rounds, *, group: Group) -> torch.Tensor:
    return _AllGather.apply(group, x, dim, rounds, True)  # type: ignore[no-any-return, no-untyped-call]


def reduce_scatter(x: torch.Tensor, dim: int, rounds: Rounds, *, group: Group) -> torch.Tensor:
    return _ReduceScatter.apply(group, x, dim, rounds)  # type: ignore[no-any-return, no-untyped-call]


def exchange(
    x: torch.Tensor, held: int, held_rounds: Rounds, dim: int, rounds: Rounds, *, group: Group
) -> torch.Tensor:
    return _Exchange.apply(group, x, held, held_rounds, dim, rounds)  # type: ignore[no-any-return, no-untyped-call]


def table_rows(
    weight: torch.Tensor, index: torch.Tensor, start: int, length: int, padding: int, *, group: Group
) -> torch.Tensor:
    """Look up in rows ``start`` to ``start + length`` of a table; zero for what stands in others' rows."""
    elsewhere = (index < start) | (index >= start + length)
    mine = (index - start).masked_fill(elsewhere, 0)
    found = torch.embedding(weight, mine)
    gone = elsewhere | (index == padding) if padding >= 0 else elsewhere
    if padding < 0:
        return found.masked_fill(elsewhere.unsqueeze(-1), 0)
    kept = found.masked_fill(gone.unsqueeze(-1), 0)  # the padding's row is looked up, but learns nothing
    here = (gone & ~elsewhere).unsqueeze(-1)
    return kept + found.detach().masked_fill(~here, 0)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax of the target's score, where each member holds the scores of some classes (Megatron-LM)."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, scores: torch.Tensor, target: torch.Tensor, start: int, classes: int, ignored: int,
        smoothing: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.dtype = scores.dtype
        if scores.dtype in (torch.float16, torch.bfloat16):  # as the whole op: sums in float32
            scores = scores.float()
        top = group.all_reduce(scores.amax(1), "max")
        shifted = scores - top.unsqueeze(1)
        exp = shifted.exp()
        counts = target != ignored
        here = (target >= start) & (target < start + scores.shape[1]) & counts
        place = torch.where(here, target - start, 0).unsqueeze(1)
        mine = shifted.gather(1, place).squeeze(1).masked_fill(~here, 0)
        sums = [exp.sum(1), mine] + ([shifted.sum(1)] if smoothing else [])
        total, chosen, *rest = group.all_reduce(torch.stack(sums)).unbind(0)
        log_total = total.log()
        loss = log_total - chosen
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (log_total - rest[0] / classes)
        ctx.save_for_backward(exp.div_(total.unsqueeze(1)), place, here, counts)
        ctx.classes, ctx.smoothing = classes, smoothing
        return loss.masked_fill(~counts, 0).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        softmax, place, here, counts = ctx.saved_tensors
        grad = grads[0].to(softmax.dtype).masked_fill(~counts, 0).unsqueeze(1)
        result = softmax * grad
        hit = (grad * (ctx.smoothing - 1)).masked_fill(~here.unsqueeze(1), 0)
        result.scatter_add_(1, place, hit.expand_as(place).contiguous())
        if ctx.smoothing:
            result -= grad * (ctx.smoothing / ctx.classes)
        return None, result.to(ctx.dtype), None, None, None, None, None


def divided_cross_entropy(
    scores: torch.Tensor, target: torch.Tensor, weight: None, reduction: int, ignore_index: int,
    label_smoothing: float, *, start: int, classes: int, group: Group,
) -> torch.Tensor:  # fmt: skip
    """``aten.cross_entropy_loss`` over classes ``start``... of ``classes``; the scores are never gathered."""
    loss: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        group, scores, target, start, classes, ignore_index, label_smoothing
    )
    if reduction == 0:
        return loss
    return loss.sum() if reduction == 2 else loss.sum() / (target != ignore_index).sum()


IN_GROUP: dict[str, Callable[..., torch.Tensor]] = {
    f"partita.{f.__name__}": f
    for f in (
        all_reduce, copied, take, all_gather, all_gather_copied, reduce_scatter, exchange, table_rows,
        divided_cross_entropy,
    )
}  # fmt: skip
"""Ops that are told their group as ``group=``."""
for _function in IN_GROUP.values():
    _function.returns_sequence = False  # type: ignore[attr-defined]
    _function.in_group = True  # type: ignore[attr-defined]
