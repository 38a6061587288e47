"""Holdings: what this process holds of a model's named tensors, whatever kind of module it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from partita.checkpoint.tensor_file import CODES
from partita.runtime.front import LazyParallel
from partita.runtime.module import ParallelModule
from partita.runtime.pieces import Piece, local_pieces


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """Part of a tensor that is here: where it begins in the whole, and its values. ``mine``: this rank writes it."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor
    mine: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One named tensor of ``shape`` as a whole, and the boxes of it that are here."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def whole(self) -> bool:
        return any(tuple(box.tensor.shape) == self.shape for box in self.boxes)


@dataclass(frozen=True, slots=True, eq=False)
class Holdings:
    """``tensors``: by first name. ``ties``: other name -> first name. ``parameters``: what an optimizer holds, by
    ``id``, with its name and where each box lies in it. ``extra``: modules with state of their own making.
    """

    name: str
    tensors: Mapping[str, Held]
    ties: Mapping[str, str]
    parameters: Mapping[int, Owned]
    extra: Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True, eq=False)
class Owned:
    """A parameter as the optimizer sees it: its name in the model, itself, and the boxes it is made of."""

    name: str
    parameter: torch.Tensor
    boxes: tuple[Box, ...]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside what partita made of it."""
    while isinstance(model, ParallelModule | LazyParallel):
        model = model.module
    return model


def holdings(model: nn.Module) -> Holdings:
    """What is here of ``model``: a ParallelModule, or any module of one process."""
    inner = unwrapped(model)
    parallel = model.parallel if isinstance(model, LazyParallel) else model
    pieces = parallel.pieces() if isinstance(parallel, ParallelModule) else local_pieces(inner)
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.fqn, []).append(piece)
    tensors, parameters = {}, {}
    for name, parts in grouped.items():
        boxes = tuple(Box(p.offsets, p.tensor, p.replica == 0) for p in parts)
        tensors[name] = Held(parts[0].tensor.dtype, parts[0].shape, boxes)
        for owner in {id(p.parameter): p.parameter for p in parts if p.parameter is not None}.values():
            own = tuple(b for b, p in zip(boxes, parts, strict=True) if p.parameter is owner)
            parameters[id(owner)] = Owned(name, owner, own)
    for name, parameter in model.named_parameters():  # of a sharded one this rank may have no rows at all
        parameters.setdefault(id(parameter), Owned(name, parameter, ()))
    extra = {
        prefix: module
        for prefix, module in inner.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    return Holdings(type(inner).__name__, tensors, _ties(model, inner, tensors), parameters, extra)


def _ties(model: nn.Module, inner: nn.Module, tensors: Mapping[str, Held]) -> dict[str, str]:
    """Every further name of a tensor -> its first."""
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    named: list[tuple[str, torch.Tensor]] = list(model.named_parameters(remove_duplicate=False))
    named += inner.named_buffers(remove_duplicate=False)
    for name, tensor in named:
        name = name if not isinstance(model, LazyParallel) else name.removeprefix("module.")
        known = first.setdefault(id(tensor), name)
        if known != name and known in tensors and name not in tensors:
            found[name] = known
    return found


def unsavable(held: Mapping[str, Held]) -> list[str]:
    """Tensors that a file cannot hold, a line each."""
    problems = []
    for name, tensor in held.items():
        for box in tensor.boxes:
            trouble = _trouble(box.tensor)
            if trouble:
                problems.append(f"'{name}' {trouble}")
                break
    return problems


def _trouble(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return "has no shape yet: call the model once first"
    if tensor.is_meta:
        return "is on the meta device and has no values: load or initialise it first"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}: make it dense with .to_dense()"
    if tensor.dtype not in CODES:
        return f"has the dtype {tensor.dtype}, which safetensors files do not have: convert it"
    return ""


def unloadable(held: Mapping[str, Held]) -> list[str]:
    """Tensors that cannot be written into, a line each."""
    problems = unsavable(held)
    for name, tensor in held.items():
        if any(_overlaps(box.tensor) for box in tensor.boxes):
            problems.append(f"'{name}' is an expanded tensor, whose elements share memory: make it .contiguous() first")
    return problems


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def extra_states(model: Holdings) -> dict[str, Any]:
    return {name: module.get_extra_state() for name, module in model.extra.items()}
