"""Parameters gathered ahead of use and given back after it (ZeRO 3), unit by unit: a block of the model at a time.

    forward    gather 0 | run 0, gather 1 | run 1, gather 2, free 0 | run 2, free 1 |
    backward                              | grad 2, gather 1 | grad 1, gather 0, free 2, sum 2 | grad 0, free 1, sum 1 |

An op that uses a parameter asks for its unit first; in backward autograd does, as it takes a saved weight out.
Asking for a unit starts the next one. A freed parameter keeps its tensor and its place in autograd's graph; its
storage is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from partita.graph import Graph, Op
from partita.program import Program
from partita.runtime.distributed.shards import Landing, Sharded, start_gathering
from partita.torch_compat import storage_key


@dataclass(frozen=True, slots=True)
class Units:
    """``names``: of each unit the parameters, in order of use. ``of``: parameter -> its unit."""

    names: tuple[tuple[str, ...], ...]
    of: Mapping[str, int]


def units(graph: Graph, program: Program, segments: Iterable[int], sharded: frozenset[str]) -> Units:
    """Of the parameters (graph names) that these segments use: one unit a block (``blocks.3``), in order of first
    use."""
    ops = {op.name: op for op in graph.ops}
    blocks: dict[tuple[int, str], list[str]] = {}
    seen: set[str] = set()
    for index in segments:
        for op_name in program.segments[index].ops:
            op = ops[op_name]
            for name in op.uses():
                if name in sharded and name not in seen:
                    seen.add(name)
                    blocks.setdefault((index, _block(op)), []).append(name)
    names = tuple(tuple(found) for found in blocks.values())
    return Units(names, {name: u for u, found in enumerate(names) for name in found})


def _block(op: Op) -> str:
    """The module down to the first number in its path: ``blocks.3`` of ``blocks.3.attn.out``."""
    parts = op.module.split(".")
    for i, part in enumerate(parts):
        if part.partition("@")[0].isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


@dataclass(eq=False)
class Gatherer:
    """One step's units. ``aliases``: this rank's leaves; ``entries``: graph name -> shard."""

    units: Units
    aliases: Mapping[str, torch.Tensor]
    entries: Mapping[str, Sharded]
    present: set[int] = field(default_factory=set)
    flying: dict[int, list[Landing]] = field(default_factory=dict)
    reached: dict[int, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)
    backward: bool = False

    def need(self, unit: int) -> None:
        """Have all of a unit here, and the next one on its way."""
        if unit not in self.present:
            self._start(unit)
            for land in self.flying.pop(unit):
                land()
            self.present.add(unit)
        following = unit - 1 if self.backward else unit + 1
        if 0 <= following < len(self.units.names) and following not in self.present:
            self._start(following)
        if not self.backward:
            for used_up in [u for u in self.present if u < unit]:
                self.free(used_up)

    def _start(self, unit: int) -> None:
        if unit in self.flying:
            return
        into = {}
        for name in self.units.names[unit]:
            alias = self.aliases[name]
            alias.untyped_storage().resize_(alias.numel() * alias.element_size())
            self.keys[storage_key(alias)] = unit
            into[self.entries[name].name] = alias.data
        with torch.no_grad():
            self.flying[unit] = start_gathering([self.entries[n] for n in self.units.names[unit]], into)

    def free(self, unit: int) -> None:
        for land in self.flying.pop(unit, []):
            land()
        for name in self.units.names[unit]:
            self.aliases[name].untyped_storage().resize_(0)
        self.present.discard(unit)

    def free_all(self) -> None:
        for unit in {*self.present, *self.flying}:
            self.free(unit)

    def done(self, name: str) -> None:
        """Backward has come to this leaf; a unit of which it has come to all is given back."""
        unit = self.units.of.get(name)
        if unit is None:
            return
        self.reached[unit] = self.reached.get(unit, 0) + 1
        if self.reached[unit] == len(self.units.names[unit]):
            self.free(unit)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, what autograd saves of a unit is asked for again when it is taken out."""

        def pack(tensor: torch.Tensor) -> Any:
            unit = self.keys.get(storage_key(tensor))
            return tensor if unit is None else (unit, tensor)

        def unpack(saved: Any) -> torch.Tensor:
            if isinstance(saved, tuple):
                unit: int = saved[0]
                tensor: torch.Tensor = saved[1]
                self.backward = True
                self.need(unit)
                return tensor
            found: torch.Tensor = saved
            return found

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def asking(
    resolve: Callable[[Op], Callable[..., Any]], found: Units, current: Callable[[], Gatherer | None]
) -> Callable[[Op], Callable[..., Any]]:
    """``resolve`` whose functions ask for the units of the parameters they use."""

    def wrapped(op: Op) -> Callable[..., Any]:
        function = resolve(op)
        wanted = tuple(dict.fromkeys(found.of[n] for n in op.uses() if n in found.of))
        if not wanted:
            return function

        def run(*args: Any, **kwargs: Any) -> Any:
            gatherer = current()
            if gatherer is not None:
                for unit in wanted:
                    gatherer.need(unit)
            return function(*args, **kwargs)

        for name in ("returns_sequence", "_schema", "in_group"):
            if hasattr(function, name):
                setattr(run, name, getattr(function, name))
        return run

    return wrapped
