"""A member's rows of a divided parameter as boxes of the whole: one a run of rows that lie together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from partita.runtime.distributed.holding import Holding
from partita.runtime.pieces import Piece


def runs(length: int, rounds: tuple[tuple[int, ...], ...], position: int) -> Iterator[tuple[int, int]]:
    """(start in the whole, count) of each run of member ``position``, in the order in which it keeps them."""
    total = sum(map(sum, rounds))
    for outer in range(length // total if total else 1):
        start = outer * total
        for each in rounds:
            if each[position]:
                yield start + sum(each[:position]), each[position]
            start += sum(each)


def cut_pieces(
    name: str, shape: tuple[int, ...], holding: Holding, own: torch.Tensor, kept: tuple[int, int], replica: int,
    parameter: nn.Parameter,
) -> list[Piece]:  # fmt: skip
    """``own``: rows ``kept`` = (start, count) of dim 0 of what this member holds."""
    cut = holding.cuts[name]
    position = holding.group(name).index(holding.world.rank)
    first, count = kept
    found, taken = [], 0
    for start, length in runs(shape[cut.dim], cut.cut.rounds, position):
        offsets, sizes = [0] * len(shape), list(shape)
        part = own
        if cut.dim == 0:
            low, high = max(taken, first), min(taken + length, first + count)
            taken += length
            if low >= high:
                continue
            offsets[0], sizes[0] = start + low - (taken - length), high - low
            part = own.narrow(0, low - first, high - low)
        else:
            offsets[cut.dim], sizes[cut.dim] = start, length
            part = own.narrow(cut.dim, taken, length)
            taken += length
            if name in holding.of and count < shape[0]:
                offsets[0], sizes[0] = first, count
        if all(sizes):
            found.append(Piece(name, shape, tuple(offsets), tuple(sizes), part, replica, parameter))
    return found
