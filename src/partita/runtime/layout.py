"""How tensors lie in memory, kept where they are joined, gathered or sent.

What an op makes, a view or a copy, and which of the numbers it draws stands where, follow from how its input lies:
``x.contiguous()`` of a transposed x is a copy that may be changed; of the same values joined in the order in which they
stand it would be x itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from partita.torch_compat import no_view


def memory_order(tensor: torch.Tensor) -> list[int]:
    """The dims from the slowest in memory to the fastest; empty where the tensor lies as it stands."""
    if tensor.is_contiguous():
        return []
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    return order if order != list(range(len(order))) else []


def turned_back(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """``tensor.permute(order)`` undone: a view."""
    return tensor.permute([order.index(d) for d in range(len(order))])


def cat(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The parts along a dim in new memory, lying as the first of them does."""
    order = memory_order(parts[0])
    if not order:
        return torch.cat(list(parts), dim)
    return turned_back(torch.cat([p.permute(order) for p in parts], order.index(dim % len(order))), order)


def lying(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The same values, lying as ``like`` does; a copy where they lie otherwise."""
    order = memory_order(like)
    return no_view(turned_back(tensor.permute(order).contiguous(), order)) if order else tensor


def as_parameter(grad: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient lying as its parameter does; a copy where it does not. Autograd's own do ("gradient layout contract",
    ``torch/csrc/autograd/functions/accumulate_grad.h``), and what goes through both memories number by number takes it
    for granted: ``AdamW(fused=True)`` on CPU silently takes other numbers."""
    if grad.layout is not torch.strided or all(
        size < 2 or a == b for size, a, b in zip(grad.shape, grad.stride(), parameter.stride(), strict=True)
    ):
        return grad
    return torch.empty_like(parameter.detach(), dtype=grad.dtype, device=grad.device).copy_(grad)
