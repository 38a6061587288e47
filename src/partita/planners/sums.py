"""Sums: what blocks take, added up from their ops: seconds, bytes, what crosses between them, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from partita.cost.affine import Affine
from partita.cost.away import SMALL
from partita.cost.blocks import Block
from partita.cost.kept import tensor_bytes
from partita.cost.surge import parameters_of_op
from partita.cost.table import CostTable, given_to, owed_tensors
from partita.graph import Graph
from partita.planners.parts import ranges
from partita.planners.problem import Array, Edge, Weights

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]


class Layouts(Protocol):
    """What the planner asks of ``sharding.batch.BatchLayouts``."""

    @property
    def microbatchable(self) -> bool: ...

    @property
    def phase(self) -> Mapping[str, str]: ...


def owners(parts: Sequence[Block]) -> Indices:
    """The block of each op."""
    return np.repeat(np.arange(len(parts)), [block.stop - block.start for block in parts])


def phases(graph: Graph, layouts: Layouts) -> tuple[Bools, Bools]:
    """Which ops run once on the joined batch of a step, and which before it begins."""
    found = [layouts.phase.get(op.name, "split") for op in graph.ops]
    return np.array([p == "whole" for p in found], np.bool_), np.array([p == "once" for p in found], np.bool_)


def block_seconds(
    table: CostTable, kinds: Sequence[str], owner: Indices, whole: Bools, once: Bools, *, batch: int, train: bool
) -> tuple[list[Array], list[Array], Array]:
    """Sums over blocks, for each kind of device. Forward, backward, weight of all ops that a microbatch runs, and of
    those that run on cut batches (``~whole``); the seconds of the others once a step.
    """
    n = int(owner[-1]) + 1 if len(owner) else 0

    def rows(source: Mapping[str, Array], which: Bools) -> Array:
        result = np.zeros((len(kinds), n, 2))
        for p, kind in enumerate(kinds):
            np.add.at(result[p], owner[which], source[kind][which])
        return result

    steps = (table.forward, table.backward, table.weight)
    joined = sum((rows(source, whole) for source in steps[: 3 if train else 1]), np.zeros((len(kinds), n, 2)))
    return (
        [rows(source, ~once) for source in steps], [rows(source, ~whole & ~once) for source in steps],
        joined[:, :, 0] + joined[:, :, 1] * batch,
    )  # fmt: skip


def activations(
    graph: Graph, table: CostTable, parts: Sequence[Block], owner: Indices, units: Sequence[Sequence[str]]
) -> tuple[Array, Array, Array]:
    """Per block: bytes saved, bytes kept when recomputed (what enters each of its modules), the largest result."""
    n = len(parts)
    saved, kept, transient = np.zeros((n, 2)), np.zeros((n, 2)), np.zeros((n, 2))
    batch = max(graph.batch, 1)
    np.add.at(saved, owner, table.saved)
    size_of: dict[str, tuple[float, float]] = {}

    def size(name: str) -> tuple[float, float]:
        if name not in size_of:
            found = tensor_bytes(graph, name)
            size_of[name] = (found.fixed, found.per_sample)
        return size_of[name]

    for b, block in enumerate(parts):
        entering: dict[str, None] = {}
        for span in ranges(graph, block, units[b]):
            for i in span:
                for name in graph.ops[i].uses():
                    tensor = graph.tensor(name)
                    producer = graph.producer(name)
                    if tensor.role in ("op", "input") and (producer is None or producer < span.start):
                        entering[tensor.base or name] = None
        largest = 0.0  # weights of one op: their new gradient is there beside the sum of earlier ones
        for i in block.ops:
            for out in graph.ops[i].outputs:
                if out:
                    fixed, per_sample = size(out)
                    if fixed + per_sample * batch > transient[b, 0] + transient[b, 1] * batch:
                        transient[b] = (fixed, per_sample)
            largest = max(largest, sum(nbytes for _, nbytes, trains in parameters_of_op(graph, graph.ops[i]) if trains))
        transient[b, 0] += largest
        for name in entering:
            kept[b] += size(name)
    return saved, kept, transient


def leaving(graph: Graph, table: CostTable, parts: Sequence[Block], owner: Indices) -> Array:
    """(blocks, 2): of what each block makes and saves, the bytes that nothing outside it uses: they may wait in host
    memory. Of a tensor of a sample, those of ``SMALL`` bytes and more."""
    found = np.zeros((len(parts), 2))
    result = {graph.tensor(name).base or name for name in graph.outputs}
    users: dict[str, set[int]] = {}
    for name, ops in table.users.items():
        users.setdefault(graph.tensor(name).base or name, set()).update(int(owner[i]) for i in ops)
    for i, row in enumerate(table.kept):
        b = int(owner[i])
        for k in row:
            if k.base and k.base not in result and k.size.at(1) >= SMALL and users.get(k.base, set()) <= {b}:
                found[b] += (k.size.fixed, k.size.per_sample)
    return found


def lendable(
    graph: Graph, users: Mapping[str, tuple[int, ...]], owner: Indices, count: int, once: Bools
) -> tuple[Array, Bools]:
    """(blocks, 2): bytes of the parameters that only this block uses, and of those that train; and which blocks use no
    others, before the step or in it, and have as much as is worth a copy: they may live in host memory."""
    found, alone = np.zeros((count, 2)), np.ones(count, dtype=np.bool_)
    for base, blocks in users.items():
        tensor = graph.tensor(base)
        if tensor.role != "parameter":
            continue
        if len(blocks) > 1:
            alone[list(blocks)] = False
            continue
        found[blocks[0]] += (tensor.nbytes(1), tensor.nbytes(1) * tensor.needs_grad)
    for i in np.flatnonzero(once):
        if any(graph.tensor(graph.tensor(n).base or n).role == "parameter" for n in graph.ops[i].uses()):
            alone[owner[i]] = False
    return found, alone & (found[:, 0] >= SMALL)


def edges(graph: Graph, owner: Indices, once: Bools) -> tuple[Edge, ...]:
    users: dict[str, set[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in op.uses():
            producer = graph.producer(name)
            if producer is not None and owner[producer] != owner[i] and not once[producer]:
                users.setdefault(name, set()).add(int(owner[i]))
    edges = []
    for name, consumers in users.items():
        producer = graph.producer(name)
        assert producer is not None
        size = tensor_bytes(graph, name)
        edges.append(Edge(int(owner[producer]), tuple(sorted(consumers)), size.fixed, size.per_sample))
    return tuple(edges)


def users_of(graph: Graph, owner: Indices) -> dict[str, tuple[int, ...]]:
    """Parameter, buffer or constant -> the blocks that use it."""
    users: dict[str, set[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in op.uses():
            base = graph.tensor(name).base or name
            if graph.tensor(base).role in ("parameter", "buffer", "constant"):
                users.setdefault(base, set()).add(int(owner[i]))
    return {base: tuple(sorted(where)) for base, where in users.items()}


def weights(
    graph: Graph, users: Mapping[str, tuple[int, ...]], parts: Mapping[str, float] | None = None
) -> tuple[Weights, ...]:  # fmt: skip
    """What blocks use, by the blocks that do. ``parts``: bytes of what is held in part."""
    merged: dict[tuple[int, ...], tuple[float, float]] = {}
    for base, key in users.items():
        tensor = graph.tensor(base)
        size = float((parts or {}).get(base, tensor.nbytes(max(graph.batch, 1))))
        trained = size if tensor.role == "parameter" and tensor.needs_grad else 0.0
        old = merged.get(key, (0.0, 0.0))
        merged[key] = (old[0] + size, old[1] + trained)
    return tuple(Weights(key, *value) for key, value in merged.items())


def given(table: CostTable, parts: Sequence[Block]) -> tuple[dict[str, tuple[Affine, set[int]]], Array]:
    """What the caller holds for the whole batch with the blocks that use it; per block, rows its backward needs."""
    users: dict[str, tuple[Affine, set[int]]] = {}
    rows = np.zeros((len(parts), 2))
    for b, block in enumerate(parts):
        found, kept = given_to(table, block.ops)
        rows[b] = kept.fixed, kept.per_sample
        for base, size in found:
            users.setdefault(base, (size, set()))[1].add(b)
    return users, rows


def given_weights(handed: Mapping[str, tuple[Affine, set[int]]], batch: int) -> tuple[Weights, ...]:
    """Where devices share the caller's memory, a stage holds all of what its blocks use, like a parameter."""
    merged: dict[tuple[int, ...], float] = {}
    for size, users in handed.values():
        key = tuple(sorted(users))
        merged[key] = merged.get(key, 0.0) + size.at(batch)
    return tuple(Weights(key, nbytes, 0.0, given=True) for key, nbytes in merged.items())


def owed(graph: Graph, owner: Indices, count: int) -> Array:
    """(blocks, 2): bytes kept from backward to the weights' gradients, where these are put off."""
    found = np.zeros((count, 2))
    for i, size in owed_tensors(graph, range(len(graph.ops)))[0].values():
        found[owner[i]] += (size.fixed, size.per_sample)
    return found
