"""Python attributes that forward changes: which of them may stay out of a graph."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture.structure import take_apart

if TYPE_CHECKING:
    from partita.capture.tracer import Tracer

Change = tuple[str, str]  # (module path, attribute)


@dataclass(frozen=True, slots=True)
class Effect:
    """``module.attribute += step`` after each call."""

    module: nn.Module
    attribute: str
    step: Any

    def apply(self) -> None:
        setattr(self.module, self.attribute, getattr(self.module, self.attribute) + self.step)


class Tally:
    """Stands in for a number and suffers only ``+ number`` and ``- number``; every other use stops the trace."""

    __slots__ = ("stop", "total")

    def __init__(self, total: Any, stop: Callable[[str], BaseException]) -> None:
        self.total, self.stop = total, stop

    def _plus(self, other: Any, sign: int) -> Tally:
        if type(other) not in (int, float):
            raise self.stop("forward acts on a number that it changes")
        return Tally(self.total + sign * other, self.stop)

    def __add__(self, other: Any) -> Tally:
        return self._plus(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tally:
        return self._plus(other, -1)

    def _use(self, *args: Any) -> Any:
        raise self.stop("forward acts on a number that it changes")

    __bool__ = __int__ = __float__ = __index__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _use
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __neg__ = __rsub__ = _use
    __str__ = __repr__ = __format__ = __abs__ = __rfloordiv__ = __rmod__ = __rpow__ = __divmod__ = __round__ = _use


class Kept(AttributeError, TypeError):
    """A value kept from the last call was looked at."""


class Spoilt:
    """Stands in for a tensor kept from the last call: whoever looks at it fails."""

    __slots__ = ()

    def _use(self, *args: Any) -> Any:
        raise Kept("a value kept from the last call is used")

    __getattr__ = __bool__ = __len__ = __iter__ = __getitem__ = __eq__ = __hash__ = _use
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __matmul__ = _use


def keep_buffers(tracer: Tracer, model: nn.Module) -> None:
    """Buffers that forward bound anew (``self.mean = 0.9 * self.mean + ...``): recorded as a copy into the buffer."""
    for path, module in model.named_modules():
        for key, now in list(module._buffers.items()):
            if now is None or id(now) in tracer.originals:
                continue
            old = tracer.buffer_at.get((path, key))
            if old is None or not isinstance(now, tc.FakeTensor) or now.requires_grad:
                raise tracer.stop(f"forward puts another tensor in the buffer {key!r}", path)
            if now.shape != old.shape or now.dtype != old.dtype:
                raise tracer.stop(f"forward changes the shape or type of the buffer {key!r}", path)
            with torch.no_grad(), tc.enable_python_dispatcher(), tracer.fake, tracer:
                old.copy_(now)
            module._buffers[key] = old
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in tracer.originals:
                raise tracer.stop(f"forward replaces the parameter {key!r}", path)


def step_of(before: Any, between: Any, after: Any) -> Any:
    """The step of a number that moves evenly; None if it does not, or is no number."""
    if type(before) is not type(between) or type(between) is not type(after) or type(before) not in (int, float):
        return None
    return between - before if after - between == between - before else None


def memo_of_tensors(tracer: Tracer, module: nn.Module, attribute: str) -> str:
    """'' where the attribute holds no traced tensor; 'memo' where these follow from shapes and constants alone; else
    'state'."""
    return memo_of(tracer, vars(module).get(attribute))


def memo_of(tracer: Tracer, value: Any) -> str:
    """The same of any value."""
    if isinstance(value, types.CellType):
        value = value.cell_contents
    if isinstance(value, nn.Module) or (callable(value) and not isinstance(value, torch.Tensor)):
        return ""
    found = [t for t in take_apart(value)[0] if isinstance(t, tc.FakeTensor)]
    tensors = [t for t in found if id(t) not in tracer.originals or _role(tracer, t) == "input"]
    if not tensors:
        return ""
    taint = frozenset[str]().union(*(tracer.taint(tracer.name_of(t)) for t in tensors))
    return "memo" if all(t.startswith("constant ") for t in taint) else "state"


def _role(tracer: Tracer, tensor: torch.Tensor) -> str:
    return tracer.trace.values[tracer.names[id(tensor)]].role
