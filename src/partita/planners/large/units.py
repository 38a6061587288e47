"""Units: a large model as a row of repeated pieces, each distinct one ("kind") priced once.

Modules are taken apart until none holds more than a ``pieces``-th of the work; light ops go with the neighbour that
leaves least to send. Equal layers have equal signatures, so a thousand of them are one kind.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.cost.blocks import legal_cuts, signature
from partita.cost.ops import family
from partita.graph import Graph, Op

PIECES = 64
LIGHT = 0.1
WIDE = 1.5


@dataclass(frozen=True, slots=True)
class Unit:
    """Ops [start, stop) of the graph. ``kind``: equal numbers mean equal work. ``name``: the module it is."""

    start: int
    stop: int
    kind: int
    name: str

    @property
    def ops(self) -> range:
        return range(self.start, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """``sent``: for each unit, the tensors that live on past its end and follow the batch (names). ``extra``: units
    that begin at an op only because somebody named it.
    """

    row: tuple[Unit, ...]
    sent: tuple[tuple[str, ...], ...]
    extra: frozenset[int] = frozenset()

    @property
    def num_kinds(self) -> int:
        return 1 + max(u.kind for u in self.row)

    def example(self, kind: int) -> int:
        """The first unit of a kind."""
        return next(i for i, u in enumerate(self.row) if u.kind == kind)


def units(graph: Graph, pieces: int = PIECES, also: Iterable[int] = ()) -> Units:
    """The model's ops in order, as few units as leave no heavy one undivided.

    ``also``: ops at which a unit begins too, where a cut may stand.
    """
    work = np.array([op_work(graph, op) for op in graph.ops])
    weights = _weights(graph)
    paths = [tuple(op.module.split(".")) if op.module else () for op in graph.ops]
    runs: list[tuple[int, int]] = []
    _split(paths, np.concatenate(([0.0], np.cumsum(work))), 0, len(paths), 0, work.sum() / pieces, runs)
    crossing = _crossing(graph)
    legal = legal_cuts(graph)
    done = np.array([work[a:b].sum() for a, b in runs])
    held = np.array([weights[a:b].sum() for a, b in runs])
    heavy = [
        r for r, w, h in zip(runs, done > LIGHT * _typical(done), held > LIGHT * _typical(held), strict=True) if w or h
    ]
    starts = [a for a, _ in runs]
    edges = [0]
    for (_, stop), (start, _) in zip(heavy, heavy[1:], strict=False):
        options = _between(starts, stop, start, legal)
        if options:
            edges.append(min(options, key=lambda e: (crossing[e], e)))
    narrow = _narrow(sorted(set(edges)), crossing)
    named = {e for e in also if 0 < e < len(graph.ops) and legal[e]} - set(narrow)
    edges = [*sorted({*narrow, *named}), len(graph.ops)]
    known: dict[str, int] = {}
    row = []
    for a, b in zip(edges, edges[1:], strict=False):
        kind = known.setdefault(signature(graph, graph.ops[a:b]), len(known))
        row.append(Unit(a, b, kind, _name(graph.ops[a:b])))
    return Units(tuple(row), _sent(graph, row), frozenset(i for i, u in enumerate(row) if u.start in named))


def _typical(sizes: NDArray[np.float64]) -> float:
    """The size at or above which half of the total lies; never 0."""
    down = np.sort(sizes)[::-1]
    return max(float(down[np.searchsorted(np.cumsum(down), 0.5 * down.sum())]), 1.0)


def _narrow(edges: Sequence[int], crossing: NDArray[np.float64]) -> list[int]:
    """Without the cuts that send more than ``WIDE`` times what a neighbour does: those stand inside a layer."""
    kept = list(edges[:1])
    for i, e in enumerate(edges[1:], 1):
        beside = [crossing[x] for x in (*edges[max(i - 2, 1) : i], *edges[i + 1 : i + 3])]
        if not beside or crossing[e] <= WIDE * min(beside):
            kept.append(e)
    return kept


def _between(starts: Sequence[int], low: int, high: int, legal: Sequence[bool]) -> list[int]:
    a, b = bisect_left(starts, low), bisect_right(starts, high)
    return [e for e in starts[a:b] if legal[e]]


def _split(
    paths: Sequence[tuple[str, ...]], sums: NDArray[np.float64], start: int, stop: int, depth: int, most: float,
    runs: list[tuple[int, int]],
) -> None:  # fmt: skip
    if sums[stop] - sums[start] <= most or all(len(paths[i]) <= depth for i in range(start, stop)):
        runs.append((start, stop))
        return
    begin = start
    for i in range(start + 1, stop + 1):
        if i == stop or paths[i][depth : depth + 1] != paths[begin][depth : depth + 1]:
            if len(paths[begin]) > depth:
                _split(paths, sums, begin, i, depth + 1, most, runs)
            else:
                runs.append((begin, i))
            begin = i


def op_work(graph: Graph, op: Op) -> float:
    if family(op) == "view":
        return 0.0
    moved = sum(graph.tensor(o).nbytes(max(graph.batch, 1)) for o in op.outputs if o)
    return float(op.flops) + 4.0 * moved


def _weights(graph: Graph) -> NDArray[np.float64]:
    found = np.zeros(len(graph.ops))
    for i, op in enumerate(graph.ops):
        for name in op.uses():
            if graph.tensor(name).role == "parameter":
                found[i] += graph.tensor(name).nbytes(1)
    return found


def _spans(graph: Graph) -> list[tuple[str, int, int]]:
    """(tensor, op that makes it, last op that uses it) of everything that follows the batch."""
    last: dict[str, int] = {}
    for i, op in enumerate(graph.ops):
        for name in op.uses():
            last[name] = i
    found = []
    for i, op in enumerate(graph.ops):
        for name in op.outputs:
            if name and last.get(name, i) > i and graph.tensor(name).follows_batch:
                found.append((name, i, last[name]))
    return found


def _crossing(graph: Graph) -> NDArray[np.float64]:
    """Bytes a sample that a cut before each op would send."""
    change = np.zeros(len(graph.ops) + 2)
    for name, made, last in _spans(graph):
        size = graph.tensor(name).nbytes(1)
        change[made + 1] += size
        change[last + 1] -= size
    return np.cumsum(change)


def _sent(graph: Graph, row: Sequence[Unit]) -> tuple[tuple[str, ...], ...]:
    stops = np.array([u.stop for u in row])
    found: list[list[str]] = [[] for _ in row]
    for name, made, last in _spans(graph):
        first = int(np.searchsorted(stops, made, side="right"))
        for i in range(first, int(np.searchsorted(stops, last, side="right"))):
            found[i].append(name)
    return tuple(map(tuple, found))


def _name(ops: Sequence[Op]) -> str:
    names = [op.module for op in ops if op.module] or [ops[0].name]
    low, high = min(names).split("."), max(names).split(".")
    common = []
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        common.append(a)
    return ".".join(common) or names[0]
