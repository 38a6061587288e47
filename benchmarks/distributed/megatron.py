"""The benchmark's models rewritten by hand for tensor parallelism, as an expert would (Shoeybi et al., 2019).

    x ─ copy ─ columns of qkv, own heads, rows of project ─ sum ─ + ─ copy ─ columns of up, rows of down ─ sum ─ +

``copy`` sums gradients in backward, ``sum`` sums activations in forward: two all_reduces a block each way. A bias after
a sum is added once. The scores of a GPT are cut by columns, and the loss is taken from the parts (two small sums).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks.models import GPT, MLP, Block, ViT


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class VocabularyLoss(torch.autograd.Function):
    """Cross-entropy of scores of which every rank has its columns."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        first, width = dist.get_rank() * scores.shape[1], scores.shape[1]
        top = scores.max(1).values
        dist.all_reduce(top, dist.ReduceOp.MAX)
        scores = scores - top[:, None]
        own = (target >= first) & (target < first + width)
        place = (target - first).clamp(0, width - 1)
        picked = torch.where(own, scores.gather(1, place[:, None])[:, 0], 0.0)
        powers = scores.exp()
        both = torch.stack([powers.sum(1), picked])
        dist.all_reduce(both)
        ctx.save_for_backward(powers, both[0], own, place)
        return (both[0].log() - both[1]).mean()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        powers, total, own, place = ctx.saved_tensors
        found = powers / total[:, None]
        found.scatter_add_(1, place[:, None], -own[:, None].to(found.dtype))
        return found * (grad / len(total)), None


def _columns(linear: nn.Linear) -> nn.Linear:
    rank, size = dist.get_rank(), dist.get_world_size()
    part = nn.Linear(linear.in_features, linear.out_features // size, bias=linear.bias is not None)
    with torch.no_grad():
        part.weight.copy_(linear.weight.chunk(size)[rank])
        if part.bias is not None:
            part.bias.copy_(linear.bias.chunk(size)[rank])
    return part


class Rows(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().chunk(dist.get_world_size(), 1)[dist.get_rank()].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sum.apply(F.linear(x, self.weight)) + self.bias  # type: ignore[no-untyped-call, no-any-return]


class DividedBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        size = dist.get_world_size()
        self.heads, self.causal = block.heads // size, block.causal
        self.norm1, self.norm2 = block.norm1, block.norm2
        width = block.project.in_features
        whole = block.qkv
        self.qkv = nn.Linear(width, 3 * width // size)
        with torch.no_grad():
            for own, given in ((self.qkv.weight, whole.weight), (self.qkv.bias, whole.bias)):
                own.copy_(torch.cat([part.chunk(size)[dist.get_rank()] for part in given.chunk(3)]))
        self.project, self.up, self.down = Rows(block.project), _columns(block.up), Rows(block.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        own = Copy.apply(self.norm1(x))  # type: ignore[no-untyped-call]
        q, k, v = self.qkv(own).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(y.transpose(1, 2).reshape(n, t, -1))
        own = Copy.apply(self.norm2(x))  # type: ignore[no-untyped-call]
        return x + self.down(F.gelu(self.up(own)))


class DividedMLP(nn.Module):
    """Layers in pairs: columns, then rows."""

    def __init__(self, model: MLP) -> None:
        super().__init__()
        layers = list(model.layers)
        self.pairs = nn.ModuleList(
            nn.ModuleList((_columns(a), Rows(b))) for a, b in zip(layers[::2], layers[1::2], strict=True)
        )
        self.head = model.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (first, second) in enumerate(self.pairs):  # type: ignore[misc]
            x = F.relu(second(F.relu(first(Copy.apply(x) if index else x))))  # type: ignore[no-untyped-call]
        return self.head(x)  # type: ignore[no-any-return]


def divided(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model divided over all ranks, and the loss of its output."""
    if isinstance(model, MLP):
        return DividedMLP(model), lambda y, target: F.cross_entropy(y, target)
    assert isinstance(model, GPT | ViT)
    model.blocks = nn.ModuleList(DividedBlock(b) for b in model.blocks)  # type: ignore[arg-type]
    if isinstance(model, ViT):
        return model, lambda y, target: F.cross_entropy(y, target)
    model.head, norm = _columns(model.head), model.norm
    model.norm = nn.Sequential(norm, Copied())  # type: ignore[assignment]
    return model, lambda y, target: VocabularyLoss.apply(y.flatten(0, -2), target.flatten())  # type: ignore[no-untyped-call]


class Copied(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Copy.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def sent_bytes(model: nn.Module, activation_bytes: int, size: int) -> int:
    """Bytes a rank sends in a step: 2 (n-1)/n of each activation that is summed, two a block each way."""
    share = 2 * (size - 1) / size
    if isinstance(model, MLP):
        pairs = len(model.layers) // 2
        return round(share * activation_bytes * (2 * pairs - 1))
    return round(share * activation_bytes * 4 * len(model.blocks))  # type: ignore[arg-type]
