"""Small models of each family, each with the module names at which it may be cut, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partita.models.llama import Llama, LlamaSize


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, cross: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if cross:
            self.norm3, self.ask, self.tell = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.take = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = (self.split(t) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        if memory is not None:
            k, v = (self.split(t) for t in self.tell(memory).chunk(2, -1))
            mixed = F.scaled_dot_product_attention(self.split(self.ask(self.norm3(x))), k, v)
            x = x + self.take(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """``tied``: the head is the embedding. ``dropout`` draws for the whole batch, whatever the plan."""

    def __init__(self, *, tied: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(41, 24), nn.Embedding(12, 24)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(24, 4) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 41, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """T5's shape: every decoder block takes the encoder's result, and the decoder's end the encoder's beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(41, 24)
        self.encoder = nn.ModuleList(Block(24, 4, causal=False) for _ in range(2))
        self.decoder = nn.ModuleList(Block(24, 4, cross=True) for _ in range(2))
        self.head = nn.Linear(24, 41, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        begin = memory = self.tokens(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.tokens(target)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(x + begin)


class Experts(nn.Module):
    """Stacked experts, each token to the two best."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.up = nn.Parameter(torch.randn(count, width, 2 * width) * 0.1)
        self.down = nn.Parameter(torch.randn(count, 2 * width, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(2, -1)
        gate = torch.zeros(*x.shape[:-1], self.up.shape[0], device=x.device).scatter(-1, index, weight)
        each = torch.einsum("bse,bsw,ewh->bseh", gate.ne(0).to(x.dtype), x, self.up)
        made = torch.einsum("bseh,ehw->bsew", F.gelu(each), self.down)
        return x + (made * gate.unsqueeze(-1)).sum(-2)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(41, 24)
        self.blocks = nn.ModuleList(nn.Sequential(Block(24, 4), Experts(24, 4)) for _ in range(3))
        self.head = nn.Linear(24, 41)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 8), (8, 16), (16, 16))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU()) for a, b in sizes
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 24))
        self.blocks = nn.ModuleList(Block(24, 4, causal=False) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def wide() -> nn.Module:
    """Weights large enough to be summed and gathered alone, not packed with others."""
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 4500), nn.ReLU(), nn.Linear(4500, 16), nn.Linear(16, 10))


@dataclass(frozen=True)
class Family:
    """``parts``: what a stage may begin with, in order; ``inputs(batch)`` and ``target(batch)`` draw one batch."""

    make: Callable[[], nn.Module]
    parts: tuple[tuple[str, ...], ...]
    inputs: Callable[[int], tuple[Tensor, ...]]
    target: Callable[[int], Tensor]


def _tokens(batch: int) -> Tensor:
    return torch.randint(41, (batch, 12))


def _image(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 16, 16),)


def _gpt_parts(first: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return first, ("blocks.0",), ("blocks.1",), ("blocks.2",), ("blocks.3",), ("norm", "head")


LLAMA = LlamaSize(vocabulary=41, hidden=24, inner=40, layers=4, heads=6, groups=2)

FAMILIES: dict[str, Family] = {
    "gpt": Family(lambda: GPT(tied=False, dropout=0.1), _gpt_parts(("tokens", "places", "drop")),
                  lambda b: (_tokens(b),), _tokens),
    "tied": Family(lambda: GPT(tied=True), _gpt_parts(("tokens", "places", "drop")), lambda b: (_tokens(b),), _tokens),
    "llama": Family(lambda: Llama(LLAMA), (("tokens",), *((f"layers.{i}",) for i in range(4)), ("norm", "head")),
                    lambda b: (_tokens(b),), _tokens),
    "t5": Family(EncoderDecoder, (("tokens",), ("encoder.0",), ("encoder.1",), ("decoder.0",), ("decoder.1",),
                                  ("head",)), lambda b: (_tokens(b), _tokens(b)), _tokens),
    "moe": Family(MoE, (("tokens",), ("blocks.0",), ("blocks.1",), ("blocks.2",), ("head",)),
                  lambda b: (_tokens(b),), _tokens),
    "cnn": Family(CNN, (("blocks.0",), ("blocks.1",), ("blocks.2",), ("head",)), _image,
                  lambda b: torch.randint(10, (b,))),
    "vit": Family(ViT, (("patch",), ("blocks.0",), ("blocks.1",), ("blocks.2",), ("norm", "head")), _image,
                  lambda b: torch.randint(10, (b,))),
    "wide": Family(wide, (("0",), ("1", "2"), ("3",), ("4",)), lambda b: (torch.randn(b, 24),),
                   lambda b: torch.randint(10, (b,))),
}  # fmt: skip


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())
