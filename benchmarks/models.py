"""The models that are compared: plain ``nn.Module``s as a user writes them, with nothing in them for any contestant.

``chain`` of each lists its parts in the order they run, each the output of the one before into the next: what a
person needs to divide it by hand. Dropout is left out, so that every contestant's gradients can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


class Encoder(nn.Module):
    """Whisper's: two convolutions over time, the second halving it, then blocks over the sequence."""

    def __init__(self, mels: int, frames: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(mels, width, 3, 1, 1), nn.Conv1d(width, width, 3, 2, 1)
        self.positions = nn.Parameter(torch.randn(frames // 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class CrossBlock(nn.Module):
    """A decoder's block: it looks at what was said before, then at the sound."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.own, self.norm = Block(width, heads, causal=True), nn.LayerNorm(width)
        self.query, self.keys, self.project = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        x = self.own(x)
        n, t, c = x.shape
        q = self.query(self.norm(x)).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.keys(sound).view(n, sound.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.project(y.transpose(1, 2).reshape(n, t, c))


class Speech(nn.Module):
    """An encoder-decoder in Whisper's shape: log-mel frames and the words so far to scores of the next word."""

    def __init__(self, mels: int, frames: int, words: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.encoder = Encoder(mels, frames, width, depth, heads)
        self.embedding = Embedding(words, context, width)
        self.decoder = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, mel: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        sound, x = self.encoder(mel), self.embedding(words)
        for block in self.decoder:
            x = block(x, sound)
        return self.head(x)


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean loss over every predicted place."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


Inputs = torch.Tensor | tuple[torch.Tensor, ...]


def as_args(x: Inputs) -> tuple[torch.Tensor, ...]:
    """A workload's input as the arguments of a call."""
    return x if isinstance(x, tuple) else (x,)


@dataclass(frozen=True)
class Workload:
    """A model with a batch of data, and by which names it is divided by hand (``chain`` and ``names`` match).

    ``data``: what goes in (a tuple where the model takes several tensors) and the target. ``chain`` None: no chain.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Inputs, torch.Tensor]]
    chain: Callable[[nn.Module], list[nn.Module]] | None
    names: Callable[[nn.Module], list[tuple[str, ...]]]
    batch: int
    couples_batch: bool = False

    def build(self) -> tuple[nn.Module, Any, torch.Tensor]:
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


def _speech(batch: int = 8) -> Workload:
    return Workload(
        make=lambda: Speech(80, 300, 2048, 48, 256, 4, 4),
        data=lambda: (
            (torch.randn(batch, 80, 300), torch.randint(2048, (batch, 48))), torch.randint(2048, (batch, 48))
        ),
        chain=None,
        names=lambda m: [
            ("encoder.conv1", "encoder.conv2"), *((f"encoder.blocks.{i}",) for i in range(len(m.encoder.blocks))),
            ("encoder.norm", "embedding"), *((f"decoder.{i}",) for i in range(len(m.decoder))), ("head",),
        ],
        batch=batch,
    )  # fmt: skip


WORKLOADS: dict[str, Workload] = {
    "gpt125m": _gpt(50304, 768, 12, 12, batch=8, context=1024),  # for a GPU
    "gpt30m": _gpt(4096, 512, 8, 8),
    "gpt10m": _gpt(256, 384, 6, 6),
    "gpt3m": _gpt(256, 256, 4, 4),
    "vit": _vit(),
    "resnet": _resnet(),
    "mlp": _mlp(),
    "speech": _speech(),
    "tiny": _gpt(64, 32, 2, 2, batch=8, context=16),  # for tests: finishes in seconds, says nothing about speed
}
