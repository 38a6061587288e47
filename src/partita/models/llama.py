"""Llama: the decoder of Touvron et al. (2023) and the Llama 3 report (2024), as plain modules.

RMS norm, rotary positions, grouped queries, SwiGLU; no biases. Parameters are named by what they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class LlamaSize:
    """``groups``: heads of keys and values, each shared by ``heads / groups`` queries. ``inner``: width of the MLP."""

    layers: int
    hidden: int
    heads: int
    groups: int
    inner: int
    vocabulary: int = 32000
    positions: int = 4096
    rope_base: float = 10000.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (first half, second half) of the last dim turned by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.heads, self.groups, self.width = size.heads, size.groups, size.hidden // size.heads
        self.q = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k = nn.Linear(size.hidden, size.groups * self.width, bias=False)
        self.v = nn.Linear(size.hidden, size.groups * self.width, bias=False)
        self.o = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q = rotate(self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2), cos, sin)
        k = rotate(self.k(x).view(batch, length, self.groups, self.width).transpose(1, 2), cos, sin)
        v = self.v(x).view(batch, length, self.groups, self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.shared(k), self.shared(v), is_causal=True)
        mixed: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, hidden))
        return mixed

    def shared(self, x: Tensor) -> Tensor:
        """Keys or values of each group for each of its queries."""
        if self.groups == self.heads:
            return x
        batch, groups, length, width = x.shape
        each = x.unsqueeze(2).expand(batch, groups, self.heads // groups, length, width)
        return each.reshape(batch, self.heads, length, width)


class MLP(nn.Module):
    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.gate = nn.Linear(size.hidden, size.inner, bias=False)
        self.up = nn.Linear(size.hidden, size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return down


class Layer(nn.Module):
    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(size.hidden, eps=1e-5), Attention(size)
        self.norm2, self.mlp = nn.RMSNorm(size.hidden, eps=1e-5), MLP(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        after: Tensor = x + self.mlp(self.norm2(x))
        return after


class Llama(nn.Module):
    """Logits, or the mean loss where ``targets`` are given."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.size = size
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        cos, sin = self.angles(tokens)
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def angles(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (length, width / 2) each."""
        width = self.size.hidden // self.size.heads
        place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        pair = torch.arange(0, width, 2, device=tokens.device, dtype=torch.float32) / width
        angle = place[:, None] * (self.size.rope_base**-pair)[None, :]
        kind = self.tokens.weight.dtype
        return angle.cos().to(kind), angle.sin().to(kind)
