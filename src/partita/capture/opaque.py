"""User code that runs as one op: a module whose inside no graph can hold, or an autograd function."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from partita.capture.structure import Structure, put_together, take_apart
from partita.errors import ExecutionError
from partita.graph import Dim, Size

_PLAIN = (type(None), bool, int, float, str)
_swapping = threading.RLock()


@dataclass(eq=False)
class Opaque(ABC):
    """``f(*tensors, reads=[...]) -> tuple of tensors``. ``shapes``: what the answer must look like, once known."""

    label: str
    source: str
    arguments: Structure
    result: Structure | None = None
    shapes: tuple[tuple[Dim, ...], ...] = ()
    autocast: dict[str, tuple[bool, torch.dtype]] = field(default_factory=lambda: autocast_state())

    @abstractmethod
    def call(self, args: Any, kwargs: Any, reads: Sequence[torch.Tensor]) -> Any:
        """Run the user's code on these arguments, with ``reads`` as its parameters."""

    def __call__(self, *tensors: torch.Tensor, reads: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        args, kwargs = put_together(self.arguments, list(tensors))
        with self.casting():
            found, structure = take_apart(self.call(args, kwargs, reads))
        if self.result is not None:
            self.compare(found, structure)
        return tuple(found)

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Autocast as it was where the piece stood."""
        with ExitStack() as stack:
            for device, (on, dtype) in self.autocast.items():
                if torch.is_autocast_enabled(device) != on:
                    stack.enter_context(torch.autocast(device, enabled=on, dtype=dtype))
            yield

    def compare(self, found: list[torch.Tensor], structure: Structure) -> None:
        """Raise ExecutionError where the answer differs in more than values from the captured one."""
        assert self.result is not None
        problem = ""
        if not alike(self.result, structure):
            problem = "it returned another structure, or other numbers inside it"
        elif self.shapes and not _fit(self.shapes, [tuple(t.shape) for t in found]):
            shapes = [tuple(t.shape) for t in found]
            problem = f"it returned shapes {shapes}, the graph was made for {list(self.shapes)}"
        if problem:
            raise ExecutionError(
                f"{self.label} runs as one piece ({self.source}), and its answer depends on values: {problem}. "
                "Capture the model again with these inputs, or run it undivided."
            )


@dataclass(eq=False)
class OpaqueModule(Opaque):
    """A module call. ``own``: its parameters and buffers, in the order of ``reads``."""

    module: nn.Module = field(kw_only=True)
    own: tuple[torch.Tensor, ...] = field(kw_only=True)

    def call(self, args: Any, kwargs: Any, reads: Sequence[torch.Tensor]) -> Any:
        with substituted(self.module, self.own, reads):
            return self.module(*args, **kwargs)


@dataclass(eq=False)
class OpaqueMethod(Opaque):
    """A call of a method of a module. ``own`` as above."""

    module: nn.Module = field(kw_only=True)
    own: tuple[torch.Tensor, ...] = field(kw_only=True)
    method: Any = field(kw_only=True)

    def call(self, args: Any, kwargs: Any, reads: Sequence[torch.Tensor]) -> Any:
        with substituted(self.module, self.own, reads):
            return self.method(self.module, *args, **kwargs)


@dataclass(eq=False)
class OpaqueFunction(Opaque):
    """``Function.apply``: its own backward is used."""

    function: Any = field(kw_only=True)

    def call(self, args: Any, kwargs: Any, reads: Sequence[torch.Tensor]) -> Any:
        return self.function.apply(*args, **kwargs)


def autocast_state() -> dict[str, tuple[bool, torch.dtype]]:
    """For each device type, whether autocast is on, and to which type."""
    return {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}


@contextmanager
def substituted(module: nn.Module, own: Sequence[torch.Tensor], reads: Sequence[torch.Tensor]) -> Iterator[None]:
    """The module with these tensors for its parameters and buffers. A buffer bound anew inside keeps its value."""
    instead = {id(old): new for old, new in zip(own, reads, strict=True) if old is not new}
    if not instead:
        yield
        return
    with _swapping:
        undo: list[tuple[dict[str, Any], str, Any, Any]] = []
        lists: list[tuple[nn.Module, list[Any]]] = []
        for part in module.modules():
            registries: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for registry in registries:
                for key, old in list(registry.items()):
                    if old is not None and id(old) in instead:
                        undo.append((registry, key, old, instead[id(old)]))
                        registry[key] = instead[id(old)]
            flat = part.__dict__.get("_flat_weights")
            if isinstance(flat, list):
                lists.append((part, flat))
                part.__dict__["_flat_weights"] = [instead.get(id(w), w) for w in flat]
        try:
            yield
        finally:
            for part, flat in lists:
                part.__dict__["_flat_weights"] = flat
            for registry, key, old, new in undo:
                now = registry.get(key)
                registry[key] = old
                if now is new or not isinstance(now, torch.Tensor):
                    continue
                if now.shape == new.shape and now.dtype == new.dtype:
                    with torch.no_grad():
                        new.copy_(now)
                else:
                    registry[key] = now


def alike(a: Structure, b: Structure) -> bool:
    """Same nesting, and the same plain numbers and strings in it."""
    if len(a.nodes) != len(b.nodes):
        return False
    for x, y in zip(a.nodes, b.nodes, strict=True):
        if (x.kind, x.keys, x.children, x.names, x.attributes) != (y.kind, y.keys, y.children, y.names, y.attributes):
            return False
        if x.kind == "tensor" and x.value != y.value:
            return False
        if x.kind == "atom" and isinstance(x.value, _PLAIN) and not _equal(x.value, y.value):
            return False
    return True


def _equal(x: Any, y: Any) -> bool:
    return type(x) is type(y) and bool(x == y or x != x)


def _fit(expected: tuple[tuple[Dim, ...], ...], found: list[tuple[int, ...]]) -> bool:
    """Whether these shapes are the expected ones at some batch size."""
    batches = set()
    if len(expected) != len(found):
        return False
    for dims, sizes in zip(expected, found, strict=True):
        if len(dims) != len(sizes):
            return False
        for dim, size in zip(dims, sizes, strict=True):
            if isinstance(dim, Size):
                batch, rest = divmod(size - dim.fixed, dim.per_sample) if dim.per_sample else (0, size - dim.fixed)
                if rest:
                    return False
                batches.add(batch)
            elif dim != size:
                return False
    return len(batches) <= 1
