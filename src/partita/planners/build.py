"""Build: the numeric Problem of a graph on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from partita.apart import largest_unit
from partita.cluster import Cluster, Device
from partita.cost.affine import Affine
from partita.cost.blocks import Block
from partita.cost.kept import tensor_bytes
from partita.cost.memory import optimizer_factor, shares_memory
from partita.cost.surge import parameters_of
from partita.cost.table import CostTable, given_to, owed_tensors
from partita.graph import Graph
from partita.planners.constraints import Constraints, Resolved
from partita.planners.problem import Array, Edge, Pool, Problem, Times, Weights

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]


HEADROOM = 0.95  # of a device's memory a plan may fill: predicted peaks are right to a few per cent, not to the byte


class Layouts(Protocol):
    """What the planner asks of ``sharding.batch.BatchLayouts``."""

    @property
    def microbatchable(self) -> bool: ...

    @property
    def phase(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """The problem and what its numbers stand for. ``units[b]``: the modules that together are exactly block b.

    ``teams``: the devices of each team, by the first of them, which stands for all in the problem.
    """

    problem: Problem
    blocks: tuple[Block, ...]
    units: tuple[tuple[str, ...], ...]
    teams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def build(
    graph: Graph,
    layouts: Layouts,
    cluster: Cluster,
    table: CostTable,
    parts: Sequence[Block],
    *,
    batch: int,
    optimizer: str,
    train: bool,
    constraints: Constraints,
    resolved: Resolved,
    sync: bool = False,
    processes: bool = False,
) -> Built:
    """Sums over blocks of what ``table`` says of ops. ``processes``: devices are processes of their own and share no
    parameters.
    """
    owner, n = owners(parts), len(parts)
    phase = [layouts.phase.get(op.name, "split") for op in graph.ops]
    whole_op, once_op = (np.array([p == which for p in phase], dtype=np.bool_) for which in ("whole", "once"))
    can_split = layouts.microbatchable and batch > 1
    pools = _pools(cluster, resolved, processes)
    rows_shared = all(shares_memory(pool.devices[0]) for pool in pools)
    kinds = [cluster.device(pool.devices[0]).kind for pool in pools]
    units = _units(graph, parts)
    owed = np.zeros((n, 2))
    for i, size in owed_tensors(graph, range(len(graph.ops)))[0].values():
        owed[owner[i]] += (size.fixed, size.per_sample)
    saved, kept, transient = _activations(graph, table, parts, owner, units)
    split_op = ~whole_op & ~once_op
    one, many, whole = block_seconds(table, kinds, owner, whole_op, once_op, batch=batch, train=train)
    held = np.zeros((n, 2))
    np.add.at(held, owner[split_op], table.saved[split_op])
    handed, rows_of = _given(table, parts)
    if not rows_shared:
        saved, held = saved + rows_of, held + rows_of
    whole_saved = np.zeros(n)
    np.add.at(whole_saved, owner[whole_op], table.saved[whole_op, 0] + table.saved[whole_op, 1] * batch)
    single = Times(
        one[0], one[1], one[2], np.zeros_like(whole), saved, np.minimum(kept, saved), transient, np.zeros(n), owed
    )
    split = Times(many[0], many[1], many[2], whole, held, np.minimum(kept, held), transient, whole_saved, owed)
    names = {name for name, _ in resolved.recompute}
    forced = sorted({int(owner[i]) for _, ops in resolved.recompute for i in ops})
    may = tuple(
        b for b in range(n) if units[b] and _repeatable(graph, parts[b], phase) and not whole_op[parts[b].start]
    )
    starts = {block.start: b for b, block in enumerate(parts)}
    link = _worst_link(cluster)
    bandwidth = min((d.memory_bandwidth for d in cluster.devices), default=1e10)
    counts, schedules = _choices(batch, len(cluster.devices), can_split, constraints)
    problem = Problem(
        batch=batch,
        pools=pools,
        single=single,
        split=split,
        edges=_edges(graph, owner, once_op),
        weights=(
            *weights(graph, users_of(graph, owner)),
            *(_whole(handed, batch) if any(shares_memory(pool.devices[0]) for pool in pools) else ()),
        ),
        microbatches=counts,
        schedules=schedules,
        optimizer_factor=float(optimizer_factor(optimizer)) if train else 0.0,
        train=train,
        replicas=can_split and constraints.num_replicas != 1,
        joined=bool(whole_op.any()) and can_split,
        sync=sync,
        latency=link[1],
        seconds_per_byte=link[0],
        reduce_seconds_per_byte=3.0 / (bandwidth * max(len(cluster.devices), 1)),
        together=tuple(tuple(sorted({int(owner[i]) for i in ops})) for _, ops in resolved.together),
        breaks=tuple(starts[i] for _, i in resolved.starts if i in starts),
        pools_of=_places(pools, owner, resolved),
        recompute=tuple(forced) if names else (),
        may_recompute=may if train else (),
        max_stages=constraints.max_stages,
        num_stages=constraints.stages,
        num_replicas=constraints.num_replicas,
        zero=max(constraints.zero, 0),
        gathered=2.0 * largest_unit(graph),
    )
    return Built(problem, tuple(parts), units)


def owners(parts: Sequence[Block]) -> Indices:
    """The block of each op."""
    return np.repeat(np.arange(len(parts)), [block.stop - block.start for block in parts])


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


def regrouped(
    built: Built, before: Cluster, cluster: Cluster, *, constraints: Constraints, resolved: Resolved, processes: bool
) -> Built:  # fmt: skip
    """The same problem where the devices of ``before`` are grouped into those of ``cluster``, of the same kinds."""
    problem = built.problem
    pools = _pools(cluster, resolved, processes)
    of_kind = {before.device(pool.devices[0]).kind: p for p, pool in enumerate(problem.pools)}
    rows = [of_kind[cluster.device(pool.devices[0]).kind] for pool in pools]
    owner = owners(built.blocks)
    slow, late = _worst_link(cluster)
    bandwidth = min(d.memory_bandwidth for d in cluster.devices)
    counts, schedules = _choices(problem.batch, len(cluster.devices), problem.microbatches != (1,), constraints)
    return replace(
        built,
        problem=replace(
            problem, pools=pools, single=of_pools(problem.single, rows), split=of_pools(problem.split, rows),
            microbatches=counts, schedules=schedules, pools_of=_places(pools, owner, resolved), latency=late,
            seconds_per_byte=slow, reduce_seconds_per_byte=3.0 / (bandwidth * len(cluster.devices)),
        ),
    )  # fmt: skip


def of_pools(times: Times, rows: Sequence[int]) -> Times:
    """The times of these pools, in this order."""
    chosen = list(rows)
    return replace(
        times, forward=times.forward[chosen], backward=times.backward[chosen], weight=times.weight[chosen],
        whole=times.whole[chosen],
    )  # fmt: skip


def _places(pools: Sequence[Pool], owner: Indices, resolved: Resolved) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Block -> the pools it may use, of those that were placed."""
    places: dict[int, set[int]] = {}
    for i, device in resolved.place:
        pool = next(p for p, q in enumerate(pools) if device in q.devices)
        b = int(owner[i])
        places[b] = places[b] & {pool} if b in places else {pool}
    return tuple((b, tuple(sorted(p))) for b, p in sorted(places.items()))


def _choices(
    batch: int, devices: int, can_split: bool, constraints: Constraints
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers of microbatches and schedules to try."""
    if constraints.microbatches:
        counts: tuple[int, ...] = (min(constraints.microbatches, max(batch, 1)) if can_split else 1,)
    elif not can_split:
        counts = (1,)
    else:
        most = min(batch, 64, max(8 * devices, 16))
        tried = {1, *(2**k for k in range(7)), *(devices * k for k in (1, 2, 4))}
        counts = tuple(sorted(m for m in tried if m <= most))
    if constraints.schedule:
        return counts, (constraints.schedule,)
    if devices == 1 or counts == (1,):
        return counts, ("1f1b",)
    return counts, ("1f1b", "zero_bubble", "gpipe")


def _pools(cluster: Cluster, resolved: Resolved, processes: bool) -> tuple[Pool, ...]:
    placed = {device for _, device in resolved.place}
    groups: dict[tuple[object, ...], list[Device]] = {}
    for device in cluster.devices:
        alike = (device.kind, device.memory_bytes, device.flops, device.name if device.name in placed else "")
        groups.setdefault(alike, []).append(device)
    return tuple(
        Pool(
            ", ".join(d.name for d in group), tuple(d.name for d in group), HEADROOM * group[0].memory_bytes,
            shares_memory(group[0].name) and not processes,
        )
        for group in groups.values()
    )  # fmt: skip


def _worst_link(cluster: Cluster) -> tuple[float, float]:
    """(seconds per byte, latency) of the slowest link between two of the devices; 0 where there is one device."""
    slow, late = 0.0, 0.0
    names = [d.name for d in cluster.devices]
    by_ends: set[tuple[float, float]] = set()
    for i, a in enumerate(names[:64]):
        for b in names[i + 1 : 64]:
            link = cluster.link(a, b)
            by_ends.add((1.0 / link.bandwidth if link.bandwidth else 0.0, link.latency_seconds))
    for per_byte, latency in by_ends:
        slow, late = max(slow, per_byte), max(late, latency)
    return slow, late


def _activations(
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
            largest = max(largest, sum(nbytes for _, nbytes, trains in parameters_of(graph, (i,)) if trains))
        transient[b, 0] += largest
        for name in entering:
            kept[b] += size(name)
    return saved, kept, transient


def _edges(graph: Graph, owner: Indices, once: Bools) -> tuple[Edge, ...]:
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


def _given(table: CostTable, parts: Sequence[Block]) -> tuple[dict[str, tuple[Affine, set[int]]], Array]:
    """What the caller holds for the whole batch with the blocks that use it; per block, rows its backward needs."""
    users: dict[str, tuple[Affine, set[int]]] = {}
    rows = np.zeros((len(parts), 2))
    for b, block in enumerate(parts):
        found, kept = given_to(table, block.ops)
        rows[b] = kept.fixed, kept.per_sample
        for base, size in found:
            users.setdefault(base, (size, set()))[1].add(b)
    return users, rows


def _whole(handed: Mapping[str, tuple[Affine, set[int]]], batch: int) -> tuple[Weights, ...]:
    """Where devices share the caller's memory, a stage holds all of what its blocks use, like a parameter."""
    merged: dict[tuple[int, ...], float] = {}
    for size, users in handed.values():
        key = tuple(sorted(users))
        merged[key] = merged.get(key, 0.0) + size.at(batch)
    return tuple(Weights(key, nbytes, 0.0, given=True) for key, nbytes in merged.items())


def _plain(module: str) -> tuple[str, ...]:
    return tuple(part.partition("@")[0] for part in module.split(".")) if module else ()


def _units(graph: Graph, parts: Sequence[Block]) -> tuple[tuple[str, ...], ...]:
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


def _repeatable(graph: Graph, block: Block, phase: Sequence[str]) -> bool:
    """Whether running the block again changes nothing: it draws nothing and mutates nothing older than itself."""
    made: set[str] = set()
    for i in block.ops:
        op = graph.ops[i]
        if phase[i] == "once":
            continue
        if op.random or any(base not in made for base in op.writes):
            return False
        made.update(graph.tensor(o).base or o for o in op.outputs if o)
    return len(block.ops) > 1
