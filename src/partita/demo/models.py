"""The demonstration's models: ordinary PyTorch, with nothing in them that knows of partita."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block with dropout on both branches."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.project(y.transpose(1, 2).reshape(n, t, c)))
        out: torch.Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class CharGPT(nn.Module):
    """Predicts the next character; 10.8 M parameters, the embedding tied to the head."""

    def __init__(self, vocabulary: int, *, context: int = 64, width: int = 384, depth: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True, dropout=0.1) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class DigitViT(nn.Module):
    """Reads an 8x8 digit as 16 patches of 2x2; 4.8 M parameters."""

    def __init__(self, *, width: int = 256, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False, dropout=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        scores: torch.Tensor = self.head(self.norm(x).mean(1))
        return scores


class ToneReader(nn.Module):
    """Says which tone sounds in each frame of raw audio, wav2vec-style: convolutions, then a transformer; 4.0 M."""

    def __init__(self, tones: int, *, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(inside, outside, size, stride, size // 2)
            for inside, outside, size, stride in ((1, 64, 11, 5), (64, 128, 7, 4), (128, width, 5, 2))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in (64, 128, width))
        self.place = nn.Conv1d(width, width, 15, 1, 7, groups=16)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False, dropout=0.1) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tones)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        x = audio.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        x = (x + F.gelu(self.place(x))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        frames: torch.Tensor = self.head(self.norm(x))
        return frames
