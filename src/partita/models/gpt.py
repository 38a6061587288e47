"""GPT: the decoder of Radford et al. (2019) with pre-layer-norm and learned positions, as plain modules.

Queries, keys and values of a head stand together in one projection, as in Shoeybi et al. (2019), so that heads divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class GPTSize:
    """``fused``: attention that never holds the scores (FlashAttention); False: scores, softmax, dropout in memory."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int = 50257
    positions: int = 2048
    dropout: float = 0.0
    fused: bool = True


class Attention(nn.Module):
    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.heads, self.width = size.heads, size.hidden // size.heads
        self.fused, self.p = size.fused, size.dropout
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden)
        self.proj = nn.Linear(size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(x).view(batch, length, self.heads, 3, self.width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        y = self.mixed(q, k, v)
        mixed: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, hidden))
        return mixed

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, heads, length, width) of each to the same."""
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        length = q.shape[-2]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-1, -2)) / self.width**0.5
        weights = F.softmax(scores.masked_fill(later, float("-inf")), dim=-1)
        return F.dropout(weights, self.p, self.training) @ v


class MLP(nn.Module):
    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.up = nn.Linear(size.hidden, 4 * size.hidden)
        self.down = nn.Linear(4 * size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return down


class Layer(nn.Module):
    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(size.hidden), Attention(size)
        self.ln2, self.mlp = nn.LayerNorm(size.hidden), MLP(size)
        self.p = size.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.ln1(x)), self.p, self.training)
        return x + F.dropout(self.mlp(self.ln2(x)), self.p, self.training)


class GPT(nn.Module):
    """Logits, or the mean loss where ``targets`` are given. The output projection shares the token table."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(size.positions, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.ln = nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(place)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.ln(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
