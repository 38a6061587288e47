"""Kept: what autograd keeps of a forward until backward, and when each of it comes and goes.

    forward    made ──────── last use ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄   freed, where no op saves it
    backward        ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ undone down to its first saver ┘  freed, where one does

A storage counts once however many tensors view it; parameters, buffers and what the caller holds do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from partita.cost.affine import Affine, through
from partita.cost.ops import saved_tensors, short, workspace_bytes
from partita.graph import Graph

Array = NDArray[np.float64]
HELD = ("parameter", "buffer", "constant")
TWICE = MappingProxyType({"cross_entropy_loss": 1, "divided_cross_entropy": 2})
"""Ops of several steps, and how many tensors as large as their first input are between these, forward and backward."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A storage and the ops (indices, ascending) whose backward reads it. ``base``: '' for an op's workspace."""

    base: str
    size: Affine
    savers: tuple[int, ...]

    def scaled(self, factor: float) -> Kept:
        return replace(self, size=self.size.scaled(factor))


def tensor_bytes(graph: Graph, name: str) -> Affine:
    """Bytes of one tensor as a line through one sample and the graph's batch."""
    known = graph.known("tensor_bytes")
    if name not in known:
        batch = max(graph.batch, 2)
        tensor = graph.tensor(name)
        known[name] = through(1, tensor.nbytes(1), batch, tensor.nbytes(batch))
    found: Affine = known[name]
    return found


def kept_by_maker(graph: Graph, given: Iterable[str]) -> list[tuple[Kept, ...]]:
    """Of each op, what it makes and some op saves. ``given``: bases that the caller holds."""
    left_out = set(given)
    savers: dict[str, list[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in saved_tensors(graph, op):
            base = graph.tensor(name).base or name
            if base not in left_out and graph.tensor(base).role not in HELD:
                of = savers.setdefault(base, [])
                if not of or of[-1] != i:
                    of.append(i)
    result: list[list[Kept]] = [[] for _ in graph.ops]
    for base, ops in savers.items():
        producer = graph.producer(base)
        result[ops[0] if producer is None else producer].append(Kept(base, tensor_bytes(graph, base), tuple(ops)))
    batch = max(graph.batch, 2)
    for i, op in enumerate(graph.ops):
        extra = workspace_bytes(graph, op, 1)
        if extra:
            size = through(1, extra, batch, workspace_bytes(graph, op, batch))
            result[i].append(Kept("", size, (i,)))
    return [tuple(row) for row in result]


def given_bytes(graph: Graph) -> dict[str, Affine]:
    """Base -> bytes of what the caller holds for the whole batch during a step: inputs of the call, and what depends on
    none of them (noise, masks, positions).
    """
    found = {t.base or t.name: tensor_bytes(graph, t.base or t.name) for t in graph.of_role("input")}
    once = {t.name for t in graph.tensors if t.role in ("parameter", "buffer", "constant")}
    for op in graph.ops:
        if not op.writes and all(name in once for name in op.uses()):
            for out in op.outputs:
                if out and not graph.tensor(out).needs_grad:
                    once.add(out)
                    base = graph.tensor(out).base or out
                    if graph.tensor(base).role == "op":
                        found.setdefault(base, tensor_bytes(graph, base))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Lives:
    """Of a segment's ops, by position: bytes (fixed, per sample) of what is kept and alive while each is undone, and of
    everything alive while each is done; ``saved``: kept from forward to backward, of the bases ``stays``; ``ends``:
    base -> position at which it goes in backward.
    """

    saved: Affine
    undone: Array
    done: Array
    ends: Mapping[str, int]
    stays: frozenset[str]


def lives(
    graph: Graph,
    index: Sequence[int],
    kept: Sequence[tuple[Kept, ...]],
    recompute: Sequence[tuple[int, int]],
    *,
    sent: Iterable[str] = (),
    train: bool = True,
    gone: Mapping[str, int] = MappingProxyType({}),
    compiled: Sequence[tuple[int, int]] = (),
) -> Lives:
    """``index``: the segment's ops; ``kept``: of every op of the graph; ``recompute``: ranges of positions whose
    activations are dropped and made again: what enters one stays, what it saves comes back when it is undone. ``sent``:
    what others take: they keep it until they have its gradient; so does whoever makes a loss of the graph's outputs.
    ``gone``: bases that wait in host memory, and the position at which they have left in forward and are back in
    backward (``away.ways``): nothing of them is ``saved``. ``compiled``: ranges of positions that are one function:
    what it saves goes when all of it has been undone.
    """
    n = len(index)
    position = {int(op): at for at, op in enumerate(index)}
    range_of: dict[int, tuple[int, int]] = {at: r for r in recompute for at in range(*r)} if train else {}
    one_function = {at: start for start, stop in compiled for at in range(start, stop)}
    made = {graph.tensor(o).base or o: at for at, i in enumerate(index) for o in graph.ops[i].outputs if o}
    enters = _enters(graph, index, made, range_of)
    undone, done = np.zeros((n + 1, 2)), np.zeros((n + 1, 2))
    saved, stays, ends = Affine(), set[str](), dict[str, int]()
    back: dict[int, list[tuple[str, Affine]]] = {}  # where it is made, what is saved by recomputing

    def alive(rows: Array, start: int, stop: int, size: Affine) -> None:
        rows[start] += (size.fixed, size.per_sample)
        rows[stop] -= (size.fixed, size.per_sample)

    for at, i in enumerate(index) if train else ():
        here = range_of.get(at)
        for k in kept[i]:
            inside = [position[s] for s in k.savers if s in position]
            if k.base in gone:
                ends[k.base] = min(inside)
                alive(undone, min(inside), gone[k.base], k.size)
                continue
            again = [s for s in inside if here is not None and range_of.get(s) == here]
            marks = [range_of[s][0] if s in range_of else one_function.get(s, s) for s in inside if s not in again]
            marks += [start for start in enters.get(k.base, ()) if k.base]
            if here is not None and again:
                alive(undone, min(again), here[1], k.size)
                ends[k.base] = min(again)
                back.setdefault(at, []).append((k.base, k.size))
            if marks or len(inside) < len(k.savers):  # (its savers in other stages have gone before this backward)
                saved = saved + k.size
                stays.add(k.base)
                alive(done, at, n, k.size)
                if marks:
                    alive(undone, min(marks), n, k.size)
                    ends[k.base] = min([*marks, *again])
            elif not k.base:
                alive(done, at, at + 1, k.size)
    for base, starts in enters.items():
        if base not in stays and train:
            size = tensor_bytes(graph, base)
            saved = saved + size
            stays.add(base)
            alive(done, made[base], n, size)
            alive(undone, min(starts), n, size)
    for at, i in enumerate(index):
        if short(graph.ops[i].target) in TWICE and graph.ops[i].uses():
            between = tensor_bytes(graph, graph.ops[i].uses()[0]).scaled(TWICE[short(graph.ops[i].target)])
            alive(done, at, at + 1, between)
    for name in (*sent, *(o for o in graph.outputs if graph.producer(o) is not None)) if train else ():
        base = graph.tensor(name).base or name
        if base in made and base not in stays and graph.tensor(name).needs_grad and graph.tensor(name).shape:
            size = tensor_bytes(graph, base)
            saved = saved + size
            stays.add(base)
            alive(done, made[base], n, size)
            if name in graph.outputs:
                alive(undone, n - 1, n, size)
    last = dict(made)
    for at, i in enumerate(index):
        for name in graph.ops[i].uses():
            base = graph.tensor(name).base or name
            if base in last:
                here = range_of.get(at)  # what enters a range lives to its end
                last[base] = at if here is None or range_of.get(made[base]) == here else here[1] - 1
    for base, at in made.items():
        if base not in stays and graph.tensor(base).role == "op":
            alive(done, at, max(last[base] + 1, gone.get(base, 0)), tensor_bytes(graph, base))
    made_at: dict[int, list[str]] = {}
    for base, at in made.items():
        made_at.setdefault(at, []).append(base)
    for start, stop in set(range_of.values()):
        more = _more_while_made_again(graph, start, stop, made_at, last, back)
        undone[stop - 1] += more
        undone[stop] -= more
    return Lives(saved, np.cumsum(undone[:-1], axis=0), np.cumsum(done[:-1], axis=0), ends, frozenset(stays))


def _more_while_made_again(
    graph: Graph,
    start: int,
    stop: int,
    made_at: Mapping[int, Sequence[str]],
    last: Mapping[str, int],
    back: Mapping[int, Sequence[tuple[str, Affine]]],
) -> Array:
    """Bytes (fixed, per sample) above what the range has saved in the end, at most, while its ops run again."""
    rows = np.zeros((stop - start + 1, 2))
    saved = set[str]()
    for at in range(start, stop):
        for base, size in back.get(at, ()):
            rows[at - start] += (size.fixed, size.per_sample)
            saved.add(base)
    whole = rows.sum(axis=0)
    for at in range(start, stop):
        for base in made_at.get(at, ()):
            if base not in saved and graph.tensor(base).role == "op":
                size = tensor_bytes(graph, base)
                rows[at - start] += (size.fixed, size.per_sample)
                rows[min(last[base] + 1, stop) - start] -= (size.fixed, size.per_sample)
    most: Array = np.maximum(np.cumsum(rows[:-1], axis=0).max(axis=0) - whole, 0.0)
    return most


def _enters(
    graph: Graph, index: Sequence[int], made: Mapping[str, int], range_of: Mapping[int, tuple[int, int]]
) -> dict[str, list[int]]:
    """Base made by these ops -> where each range begins that takes it from outside."""
    found: dict[str, list[int]] = {}
    for at, i in enumerate(index):
        here = range_of.get(at)
        if here is None:
            continue
        for name in graph.ops[i].uses():
            base = graph.tensor(name).base or name
            if base in made and made[base] < here[0] and graph.tensor(base).role == "op":
                starts = found.setdefault(base, [])
                if here[0] not in starts:
                    starts.append(here[0])
    return found
