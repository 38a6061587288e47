"""Catalog: models by name with their published sizes; each is made on meta tensors, so no weight is ever allocated."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from partita.errors import UsageError
from partita.models.gpt import GPT, GPTSize
from partita.models.llama import Llama, LlamaSize
from partita.strict_yaml import nearest

_MEGATRON = "Narayanan et al., SC 2021, Table 1"
_GPT3 = "Brown et al., 2020, Table 2.1"

SIZES: Mapping[str, tuple[GPTSize | LlamaSize, str]] = MappingProxyType(
    {
        "gpt2": (GPTSize(12, 768, 12, positions=1024), "Radford et al., 2019, Table 2"),
        "gpt2-medium": (GPTSize(24, 1024, 16, positions=1024), "Radford et al., 2019, Table 2"),
        "gpt2-large": (GPTSize(36, 1280, 20, positions=1024), "Radford et al., 2019, Table 2"),
        "gpt2-xl": (GPTSize(48, 1600, 25, positions=1024), "Radford et al., 2019, Table 2"),
        "gpt3-6.7b": (GPTSize(32, 4096, 32), _GPT3),
        "gpt3-13b": (GPTSize(40, 5120, 40), _GPT3 + " (5140 there; 5120 divides by its heads)"),
        "gpt3-175b": (GPTSize(96, 12288, 96), _GPT3),
        "gpt-1.7b": (GPTSize(24, 2304, 24, 51200), _MEGATRON),
        "gpt-3.6b": (GPTSize(30, 3072, 32, 51200), _MEGATRON),
        "gpt-7.5b": (GPTSize(36, 4096, 32, 51200), _MEGATRON),
        "gpt-18b": (GPTSize(40, 6144, 48, 51200), _MEGATRON),
        "gpt-39b": (GPTSize(48, 8192, 64, 51200), _MEGATRON),
        "gpt-76b": (GPTSize(60, 10240, 80, 51200), _MEGATRON),
        "gpt-145b": (GPTSize(80, 12288, 96, 51200), _MEGATRON),
        "gpt-310b": (GPTSize(96, 16384, 128, 51200), _MEGATRON),
        "gpt-530b": (GPTSize(105, 20480, 128, 51200), _MEGATRON),
        "gpt-1t": (GPTSize(128, 25600, 160, 51200), _MEGATRON),
        "llama-7b": (LlamaSize(32, 4096, 32, 32, 11008, positions=2048), "Touvron et al., 2023a, Table 2"),
        "llama-13b": (LlamaSize(40, 5120, 40, 40, 13824, positions=2048), "Touvron et al., 2023a, Table 2"),
        "llama-33b": (LlamaSize(60, 6656, 52, 52, 17920, positions=2048), "Touvron et al., 2023a, Table 2"),
        "llama-65b": (LlamaSize(80, 8192, 64, 64, 22016, positions=2048), "Touvron et al., 2023a, Table 2"),
        "llama2-70b": (LlamaSize(80, 8192, 64, 8, 28672), "Touvron et al., 2023b, section 2.2 and model files"),
        "llama3-8b": (LlamaSize(32, 4096, 32, 8, 14336, 128256, 8192, 500000.0), "Llama 3 report, 2024, Table 3"),
        "llama3-70b": (LlamaSize(80, 8192, 64, 8, 28672, 128256, 8192, 500000.0), "Llama 3 report, 2024, Table 3"),
        "llama-405b": (LlamaSize(126, 16384, 128, 8, 53248, 128256, 8192, 500000.0), "Llama 3 report, 2024, Table 3"),
    }
)
NAMES = tuple(SIZES)
ALIASES = MappingProxyType({"llama3-405b": "llama-405b", "llama-8b": "llama3-8b", "llama-70b": "llama3-70b"})


def describe(name: str) -> str:
    """One line: the size and where it is published."""
    size, source = _size(name)
    return f"{name}: {size} ({source})"


def _size(name: str) -> tuple[GPTSize | LlamaSize, str]:
    known = ALIASES.get(name.lower(), name.lower())
    if known not in SIZES:
        raise UsageError(f"there is no model called {name!r}{nearest(name, (*NAMES, *ALIASES))}")
    return SIZES[known]


def build(size: GPTSize | LlamaSize) -> nn.Module:
    """The model of this size on meta tensors."""
    with torch.device("meta"):
        return GPT(size) if isinstance(size, GPTSize) else Llama(size)


def make(name: str, batch: int = 2, seq: int | None = None) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model on meta tensors and an example call ``(tokens, targets)``, both (batch, seq) of int64.

    ``seq``: tokens a sample (None: the published context). Raises UsageError for an unknown name, or where the
    positions are learned and ``seq`` is longer than they reach.
    """
    size, _ = _size(name)
    length = size.positions if seq is None else seq
    if length < 1:
        raise UsageError(f"--seq {length} holds no tokens; it must be at least 1")
    if isinstance(size, GPTSize) and length > size.positions:
        raise UsageError(f"{name} has {size.positions} learned positions; --seq {length} needs as many: take less")
    tokens = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    return build(size), (tokens, torch.zeros_like(tokens))
