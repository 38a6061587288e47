"""What one run of a model leaves behind: calls, values, reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from partita.graph import Arg


class Break(BaseException):
    """The model did something no graph can hold. Not an Exception: the user's ``except`` must not swallow it.

    ``module``: the path of the module to run as one piece instead; '' is the model itself. ``methods``: those of
    that module on the way from its forward to the spot, innermost first (``blocks.0.route()``).
    """

    def __init__(self, reason: str, module: str, source: str, methods: tuple[str, ...] = ()) -> None:
        super().__init__(f"{reason} in {module or 'the model itself'} at {source}")
        self.reason, self.module, self.source = reason, module.partition("@")[0], source
        self.methods = methods


@dataclass(frozen=True, slots=True)
class Read:
    """A value that Python took out of a tensor. It followed ``position`` calls; ``function(*args)`` gave ``value``."""

    position: int
    function: Callable[..., Any]
    args: tuple[Arg, ...]
    value: Any
    module: str
    source: str
    what: str
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded op. Shapes are numbers; ``outputs`` may hold '' for an output that is None."""

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    outputs: tuple[str, ...]
    module: str
    source: str
    grad: bool
    random: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of a trace, in numbers."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    role: str
    path: str
    base: str
    needs_grad: bool


@dataclass
class Trace:
    """What one run of the model did."""

    calls: list[Call] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)  # constants made anew by each run (torch.tensor([...]))
    opaques: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    structure: Any = None
    reads: list[Read] = field(default_factory=list)
    left: tuple[tuple[str, str], ...] = ()  # (module path, attribute) where forward left tensors, the last outputs
    same: tuple[tuple[int, int], ...] = ()  # nodes of the answer that are arguments themselves
    filled: tuple[int, ...] = ()  # arguments that forward changed; what they hold then comes after that
    returned: int = 0  # how many of the outputs forward returns
    unchecked: bool = False  # distributions were made, without the checks of their arguments


def packet(target: str) -> str:
    """``aten.add.Tensor`` -> ``aten.add``."""
    return target.rsplit(".", 1)[0]


def flat(value: Any) -> list[Any]:
    """The items of nested lists and tuples."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value]
