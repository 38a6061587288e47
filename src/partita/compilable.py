"""Compilable: which ops of a segment ``torch.compile`` takes together.

A range is as long as it can be: it ends where an op must stay as it is (a draw of random numbers, user code, a
collective, statistics shared over replicas, memory that is changed elsewhere), and where equal modules follow each
other, each is a range of its own, so that they share one compilation.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from partita.cost.blocks import Block, legal_cuts, repeated
from partita.cost.ops import family
from partita.graph import Graph, Op

Ranges = tuple[tuple[int, int], ...]
ENOUGH = 1.5
"""Times the ops of distinct modules that a range must have to be cut between equal ones."""
LEAST = 2
"""Ops other than views below which there is nothing to fuse."""


def ranges(
    graph: Graph, ops: Sequence[Op], listing: Callable[[Op], int], where: Mapping[str, int], eager: Collection[str] = ()
) -> Ranges:
    """Index ranges [a, b) of ``ops``, each to be one compiled function. ``listing``: which listed name an op falls
    under (-1: none); what follows each other is one range, whatever names list it. ``where``: of each op in the graph.
    ``eager``: names of ops that are left out. Random draws that take no tensor may stand in a range: they are made
    before it, in order.
    """
    edges = _edges(graph)
    unit = [bisect_right(edges, where[op.name]) for op in ops]
    starts = {i for i in range(1, len(ops)) if unit[i] != unit[i - 1]}
    wanted = [listing(op) >= 0 and op.name not in eager and is_compilable(graph, op) for op in ops]
    found = _runs(wanted, starts)
    while True:  # what a range may not change makes it shorter, which may leave out more
        inside = {ops[i].name: at for at, (a, b) in enumerate(found) for i in range(a, b)}
        out = [i for a, b in found for i in range(a, b) if _shares_changed(graph, ops[i], inside)]
        if not out:
            break
        for i in out:
            wanted[i] = False
        found = _runs(wanted, starts)
    return tuple((a, b) for a, b in (_trimmed(ops, *r) for r in found) if _pays(ops[a:b]))


def is_compilable(graph: Graph, op: Op) -> bool:
    """Whether it may stand in a compiled range, as far as it alone says."""
    if is_loose(op):
        return True
    if op.random or op.reads or not op.target.startswith("aten."):
        return False
    return not any(graph.tensor(n).dtype.startswith("complex") for n in (*op.uses(), *op.outputs) if n)


def is_loose(op: Op) -> bool:
    """A draw that takes no tensor: it can be made before the ops around it."""
    return op.random and not op.uses() and not op.writes


def _runs(wanted: Sequence[bool], starts: Collection[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for i in (i for i, want in enumerate(wanted) if want):
        if found and found[-1][1] == i and i not in starts:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def _edges(graph: Graph) -> tuple[int, ...]:
    """Where modules that the model repeats begin and end, ascending: the same in every stage of every plan."""
    known = graph.known("repeated")
    if "" not in known:
        whole = Block(0, len(graph.ops), "", "")
        parts = repeated(graph, whole, legal_cuts(graph), ENOUGH) if graph.ops else ()
        times = Counter(part.signature for part in parts)
        known[""] = tuple(
            after.start for before, after in itertools.pairwise(parts)
            if max(times[before.signature], times[after.signature]) > 1 and not _amid_convolutions(graph, after.start)
        )  # fmt: skip
    found: tuple[int, ...] = known[""]
    return found


def _amid_convolutions(graph: Graph, at: int) -> bool:
    """Whether images cross between convolutions before this op: compiled code keeps them in a layout of its own, and a
    border would turn them round and back (ResNet by blocks: no faster than as it is)."""
    convolutions = [i for i, op in enumerate(graph.ops) if family(op) == "conv"]
    if not convolutions or not convolutions[0] < at <= convolutions[-1]:
        return False
    crossing = {name for op in graph.ops[at:] for name in op.uses()}
    return any(len(graph.tensor(o).shape) > 3 for op in graph.ops[:at] for o in op.outputs if o in crossing)


def _shares_changed(graph: Graph, op: Op, inside: dict[str, int]) -> bool:
    """Whether it touches memory that is changed in place, but not by this range alone."""
    changed = _changed(graph)
    for name in {graph.tensor(n).base or n for n in (*op.uses(), *op.outputs, *op.writes) if n}:
        touching = changed.get(name)
        if touching is None:
            continue
        if graph.tensor(name).role not in ("op", "buffer"):
            return True
        if any(inside.get(other) != inside[op.name] for other in touching):
            return True
    return False


def _changed(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Of memory that is changed in place: every op that makes, takes or changes it, up to the last change."""
    known = graph.known("changed")
    if "" not in known:
        written = {base for op in graph.ops for base in op.writes}
        touching: dict[str, list[str]] = {base: [] for base in written}
        last = {base: i for i, op in enumerate(graph.ops) for base in op.writes}
        for i, op in enumerate(graph.ops):
            names = (*op.uses(), *op.outputs, *op.writes)
            for base in {graph.tensor(n).base or n for n in names if n} & written:
                if i <= last[base] or graph.tensor(base).role == "buffer":
                    touching[base].append(op.name)
        known[""] = {base: tuple(names) for base, names in touching.items()}
    found: dict[str, tuple[str, ...]] = known[""]
    return found


def _trimmed(ops: Sequence[Op], start: int, stop: int) -> tuple[int, int]:
    """Without draws at its ends."""
    while start < stop and is_loose(ops[start]):
        start += 1
    while stop > start and is_loose(ops[stop - 1]):
        stop -= 1
    return start, stop


def _pays(ops: Sequence[Op]) -> bool:
    return sum(family(op) != "view" and not is_loose(op) for op in ops) >= LEAST
