"""Beside: what a training step's loss function reaches that is no part of the model: functions, objects, modules.

A graph of the step is made of it too, so it is watched like the model: what it held when the graph was made, and what
it keeps from call to call.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partita.capture.contents import is_object, named_by, view

DEPTH = 5  # objects in closures of functions in objects


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """``root``: the loss function itself. ``functions`` whose code it runs, ``objects`` whose attributes it reads,
    ``modules`` it calls (outermost ones, not what is in them)."""

    root: Any = None
    functions: tuple[types.FunctionType, ...] = ()
    objects: tuple[Any, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def named_modules(self) -> dict[str, nn.Module]:
        """Every module with a name for a person."""
        names = ["the loss function" if m is self.root else type(m).__name__ for m in self.modules]
        return {
            f"{name}{i or ''}:{path}": inner
            for i, (name, module) in enumerate(zip(names, self.modules, strict=True))
            for path, inner in module.named_modules()
        }


def beside(root: Any) -> Beside:
    """What ``root``, a loss function or None, reaches: through closures, arguments bound to it, attributes, containers
    and module-level names. Torch's own functions reach nothing."""
    functions: dict[types.FunctionType, None] = {}
    objects: dict[int, Any] = {}
    modules: dict[int, nn.Module] = {}
    seen: set[int] = set()
    pending = [(root, DEPTH)]
    while pending:
        value, depth = pending.pop()
        if not depth or id(value) in seen or isinstance(value, torch.Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules[id(value)] = value
            continue
        if isinstance(value, types.MethodType):
            pending.append((value.__func__, depth))
        elif isinstance(value, types.FunctionType):
            if value.__module__.partition(".")[0] == "torch":
                continue
            functions[value] = None
            pending.extend((space[name], depth - 1) for space, name in named_by([value])
                           if isinstance(space[name], nn.Module))  # fmt: skip
        elif is_object(value):
            objects[id(value)] = value
            own = [f for cls in type(value).__mro__ for f in vars(cls).values() if isinstance(f, types.FunctionType)]
            pending.extend((f, depth) for f in own)
        elif not isinstance(value, list | tuple | dict | functools.partial):
            continue
        held = view(value)
        pending.extend((v, depth - 1) for v in (held.values() if isinstance(held, dict) else held))
    return Beside(root, tuple(functions), tuple(objects.values()), tuple(modules.values()))
