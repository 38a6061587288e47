"""Pieces: the parts of every named parameter and buffer that this process holds; what checkpoints are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A box of one tensor of the user's model.

    ``fqn``: its first qualified name. ``shape``: of the whole tensor. ``offsets``, ``sizes``: the box (a whole tensor:
    zeros, and ``shape``). ``tensor``: its values, of shape ``sizes``, the memory that training updates: writing to
    it loads it. ``replica``: 0 in the one process that should write this box, 1, 2, ... in others that hold it too.
    ``parameter``: what ``pm.parameters()`` yields for it (the optimizer's key); None for a buffer.
    """

    fqn: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: torch.Tensor
    replica: int = 0
    parameter: nn.Parameter | None = None


def persistent(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every buffer of the state dict, once, under its first name; parameters before buffers."""
    seen: set[int] = set()
    for name, parameter in module.named_parameters():
        seen.add(id(parameter))
        yield name, parameter
    for prefix, owner in module.named_modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if key not in owner._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{key}" if prefix else key), buffer


def whole(name: str, tensor: torch.Tensor, *, replica: int = 0) -> Piece:
    """The piece that is all of a tensor."""
    shape = tuple(tensor.shape)
    parameter = tensor if isinstance(tensor, nn.Parameter) else None
    return Piece(name, shape, (0,) * len(shape), shape, tensor.detach(), replica, parameter)


def local_pieces(module: nn.Module) -> tuple[Piece, ...]:
    """Of a model that lives in one process: every tensor whole."""
    return tuple(whole(name, tensor) for name, tensor in persistent(module))
