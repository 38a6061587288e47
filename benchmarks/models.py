"""The models that are compared: plain ``nn.Module``s as a user writes them, with nothing in them for any contestant.

``chain`` of each lists its parts in the order they run, each the output of the one before into the next: what a
person needs to divide it by hand. Dropout is left out, so that every contestant's gradients can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """Token and position embedding."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))


class Block(nn.Module):
    """A pre-norm transformer block; ``causal`` for language."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(y.transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Patches(nn.Module):
    """An image as a sequence of patch vectors with learnt positions."""

    def __init__(self, image: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2, width) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


class Classify(nn.Module):
    """Mean over the sequence, then class scores."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x).mean(1))


class ViT(nn.Module):
    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = Patches(image, patch, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(depth))
        self.classify = Classify(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


class Residual(nn.Module):
    """ResNet's basic block, batch normalisation included."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class Pool(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3)))


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], depth: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        blocks, inside = [], widths[0]
        for level, width in enumerate(widths):
            for index in range(depth):
                blocks.append(Residual(inside, width, 2 if level and not index else 1))
                inside = width
        self.blocks = nn.ModuleList(blocks)
        self.pool = Pool(inside, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.pool(x)


class MLP(nn.Module):
    def __init__(self, inside: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        sizes = [inside, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


class LinearReLU(nn.Module):
    """A hand split of an MLP needs the activation inside a part; the parameters stay the MLP's own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layer(x))


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean loss over every predicted place."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Workload:
    """A model with a batch of data, and by which names it is divided by hand (``chain`` and ``names`` match)."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    chain: Callable[[nn.Module], list[nn.Module]]
    names: Callable[[nn.Module], list[tuple[str, ...]]]
    batch: int
    couples_batch: bool = False

    def build(self) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        """The same weights and data in every process."""
        torch.manual_seed(0)
        model = self.make()
        torch.manual_seed(1)
        x, target = self.data()
        return model.train(), x, target


def _gpt(vocabulary: int, width: int, depth: int, heads: int, batch: int = 16, context: int = 64) -> Workload:
    return Workload(
        make=lambda: GPT(vocabulary, context, width, depth, heads),
        data=lambda: (torch.randint(vocabulary, (batch, context)), torch.randint(vocabulary, (batch, context))),
        chain=lambda m: [m.embedding, *m.blocks, nn.Sequential(m.norm, m.head)],
        names=lambda m: [("embedding",), *((f"blocks.{i}",) for i in range(len(m.blocks))), ("norm", "head")],
        batch=batch,
    )


def _vit(batch: int = 16) -> Workload:
    return Workload(
        make=lambda: ViT(32, 4, 384, 11, 6, 100),
        data=lambda: (torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))),
        chain=lambda m: [m.patches, *m.blocks, m.classify],
        names=lambda m: [("patches",), *((f"blocks.{i}",) for i in range(len(m.blocks))), ("classify",)],
        batch=batch,
    )


def _resnet(batch: int = 32) -> Workload:
    return Workload(
        make=lambda: ResNet((32, 64, 128), 3, 100),
        data=lambda: (torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))),
        chain=lambda m: [m.stem, *m.blocks, m.pool],
        names=lambda m: [("stem",), *((f"blocks.{i}",) for i in range(len(m.blocks))), ("pool",)],
        batch=batch,
        couples_batch=True,
    )


def _mlp(batch: int = 256) -> Workload:
    return Workload(
        make=lambda: MLP(512, 2048, 6, 100),
        data=lambda: (torch.randn(batch, 512), torch.randint(100, (batch,))),
        chain=lambda m: [*(LinearReLU(layer) for layer in m.layers), m.head],
        names=lambda m: [*((f"layers.{i}",) for i in range(len(m.layers))), ("head",)],
        batch=batch,
    )


WORKLOADS: dict[str, Workload] = {
    "gpt30m": _gpt(4096, 512, 8, 8),
    "gpt10m": _gpt(256, 384, 6, 6),
    "vit": _vit(),
    "resnet": _resnet(),
    "mlp": _mlp(),
    "tiny": _gpt(64, 32, 2, 2, batch=8, context=16),  # for tests: finishes in seconds, says nothing about speed
}
