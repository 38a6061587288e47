"""Parts: the modules that blocks of a graph consist of, and which blocks may run again in backward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from partita.cost.blocks import Block
from partita.graph import Graph


def _plain(module: str) -> tuple[str, ...]:
    return tuple(part.partition("@")[0] for part in module.split(".")) if module else ()


def units(graph: Graph, parts: Sequence[Block]) -> tuple[tuple[str, ...], ...]:
    """For each block the modules that together are exactly its ops, or none."""
    count: dict[tuple[str, ...], int] = {}
    paths = [_plain(op.module) for op in graph.ops]
    for path in paths:
        for depth in range(1, len(path) + 1):
            count[path[:depth]] = count.get(path[:depth], 0) + 1
    result = []
    for block in parts:
        names: list[str] = []
        i = block.start
        while i < block.stop:
            path, stop = paths[i], i
            for depth in range(1, len(path) + 1):
                size = count[path[:depth]]
                if i + size <= block.stop and all(paths[j][:depth] == path[:depth] for j in range(i, i + size)):
                    names.append(".".join(path[:depth]))
                    stop = i + size
                    break
            if stop == i:
                names = []
                break
            i = stop
        result.append(tuple(names))
    return tuple(result)


def ranges(graph: Graph, block: Block, names: Sequence[str]) -> tuple[range, ...]:
    """The ops of each of the block's modules; the whole block where it has no names."""
    if len(names) < 2:
        return (block.ops,)
    found: list[range] = []
    start = block.start
    for name in names:
        depth = len(name.split("."))
        stop = start
        while stop < block.stop and ".".join(_plain(graph.ops[stop].module)[:depth]) == name:
            stop += 1
        found.append(range(start, stop))
        start = stop
    return tuple(found)


def repeatable(graph: Graph, block: Block, once: Sequence[bool] | NDArray[np.bool_]) -> bool:
    """Whether running the block again changes nothing: it draws nothing and mutates nothing older than itself."""
    made: set[str] = set()
    for i in block.ops:
        op = graph.ops[i]
        if once[i]:
            continue
        if op.random or any(base not in made for base in op.writes):
            return False
        made.update(graph.tensor(o).base or o for o in op.outputs if o)
    return len(block.ops) > 1
