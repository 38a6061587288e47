"""Arguments of torch ops as plain Graph values, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from partita.graph import Arg, Ref, Size, Symbol


class NotEncodable(Exception):
    """The value has no plain form (a generator, a stream, a Python object)."""


def encode(value: Any, name_of: Callable[[torch.Tensor], str]) -> Arg:
    """The Graph form of one argument; ``name_of`` names its tensors. Raises NotEncodable."""
    if isinstance(value, torch.Tensor):
        return Ref(name_of(value))
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return complex(value)
    if isinstance(value, list | tuple):
        return tuple(encode(item, name_of) for item in value)
    if isinstance(value, torch.device):
        return Symbol(f"device:{value}")
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return Symbol(str(value))
    raise NotEncodable(type(value).__name__)


@cache
def decode_symbol(symbol: Symbol) -> Any:
    """``Symbol('torch.float32')`` -> ``torch.float32``; ``Symbol('device:cpu')`` -> the device."""
    if symbol.text.startswith("device:"):
        return torch.device(symbol.text.removeprefix("device:"))
    return getattr(torch, symbol.text.removeprefix("torch."))


def decode(arg: Arg, tensors: Mapping[str, Any], batch: int) -> Any:
    """The torch form of one argument at this batch size."""
    if isinstance(arg, Ref):
        return tensors[arg.name]
    if isinstance(arg, Size):
        return arg.at(batch)
    if isinstance(arg, Symbol):
        return decode_symbol(arg)
    if isinstance(arg, tuple):
        return [decode(item, tensors, batch) for item in arg]
    return arg


@cache
def resolve(target: str) -> Callable[..., Any]:
    """``aten.linear.default`` -> ``torch.ops.aten.linear.default``; any registered namespace works."""
    namespace, name, overload = target.split(".", 2)
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found
