"""Build: the numeric Problem of a graph on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from partita.apart import largest_unit
from partita.cluster import Cluster, Device
from partita.cost.affine import Affine
from partita.cost.blocks import Block
from partita.cost.memory import host_update, optimizer_factor, shares_memory
from partita.cost.table import CostTable
from partita.graph import Graph
from partita.planners.constraints import Constraints
from partita.planners.parts import repeatable, units
from partita.planners.problem import Array, Edge, Pool, Problem, Times, Weights
from partita.planners.resolved import Resolved
from partita.planners.sums import (
    Bools,
    Indices,
    Layouts,
    activations,
    block_seconds,
    edges,
    given,
    given_weights,
    leaving,
    lendable,
    owed,
    owners,
    phases,
    users_of,
    weights,
)

HEADROOM = 0.95  # of a device's memory a plan may fill: predicted peaks are right to a few per cent, not to the byte
HEADROOM_TOGETHER = 0.99  # core groups of one process: tensors are all there is, and 0.6 % the most they were above


def usable_bytes(device: Device, *, processes: bool) -> float:
    """What a plan may fill of the device's memory. ``processes``: each device is one of its own."""
    return (HEADROOM_TOGETHER if shares_memory(device.name) and not processes else HEADROOM) * device.memory_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """The problem and what its numbers stand for. ``units[b]``: the modules that together are exactly block b.

    ``teams``: the devices of each team, by the first of them, which stands for all in the problem.
    """

    problem: Problem
    blocks: tuple[Block, ...]
    units: tuple[tuple[str, ...], ...]
    teams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """What blocks of a graph are, whatever the devices and the batch: bytes as (blocks, 2), fixed and per sample.

    ``split``: saved by what runs on cut batches; ``once``: by what runs on the joined one; ``gone``: of both, what
    leaves the device where the block is offloaded. ``may``, ``leaves``, ``lends``: blocks that may be recomputed,
    offloaded, or have their parameters (``lendable``) in host memory.
    ``handed``, ``rows``: as
    ``sums.given`` has them.
    """

    owner: Indices
    whole: Bools
    before: Bools
    units: tuple[tuple[str, ...], ...]
    late: Array
    saved: Array
    kept: Array
    transient: Array
    split: Array
    once: Array
    gone: Array
    handed: dict[str, tuple[Affine, set[int]]]
    rows: Array
    may: tuple[int, ...]
    leaves: tuple[int, ...]
    lendable: Array
    lends: tuple[int, ...]
    edges: tuple[Edge, ...]
    weights: tuple[Weights, ...]


def count(graph: Graph, layouts: Layouts, table: CostTable, parts: Sequence[Block]) -> Counted:
    """Of these blocks."""
    owner, n = owners(parts), len(parts)
    whole, before = phases(graph, layouts)
    names_of = units(graph, parts)
    saved, kept, transient = activations(graph, table, parts, owner, names_of)
    split, once, split_op = np.zeros((n, 2)), np.zeros((n, 2)), ~whole & ~before
    np.add.at(split, owner[split_op], table.saved[split_op])
    np.add.at(once, owner[whole], table.saved[whole])
    handed, rows = given(table, parts)
    gone = leaving(graph, table, parts, owner)
    leaves = tuple(b for b in range(n) if names_of[b] and gone[b].any() and not whole[parts[b].start])
    may = tuple(
        b for b in range(n) if names_of[b] and repeatable(graph, parts[b], before) and not whole[parts[b].start]
    )
    users = users_of(graph, owner)
    parameters, alone = lendable(graph, users, owner, n, before)
    lends = tuple(b for b in range(n) if names_of[b] and alone[b] and not whole[parts[b].start])
    return Counted(
        owner, whole, before, names_of, owed(graph, owner, n), saved, kept, transient, split, once, gone, handed, rows,
        may, leaves, parameters, lends, edges(graph, owner, before), weights(graph, users),
    )  # fmt: skip


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
    lends: bool = False,
    counted: Counted | None = None,
) -> Built:
    """Sums over blocks of what ``table`` says of ops. ``processes``: devices are processes of their own and share no
    parameters. ``lends``: parameters may live in host memory. ``counted``: what ``count`` says of these parts, where it
    is known.
    """
    c = counted or count(graph, layouts, table, parts)
    owner, n, late = c.owner, len(parts), c.late
    can_split = layouts.microbatchable and batch > 1
    pools = _pools(cluster, resolved, processes)
    rows_shared = all(shares_memory(pool.devices[0]) for pool in pools)
    kinds = [cluster.device(pool.devices[0]).kind for pool in pools]
    one, many, whole = block_seconds(table, kinds, owner, c.whole, c.before, batch=batch, train=train)
    rows = 0.0 if rows_shared else c.rows
    saved, held, kept, transient = c.saved + rows, c.split + rows, c.kept, c.transient
    whole_saved = c.once[:, 0] + c.once[:, 1] * batch
    single = Times(
        one[0],
        one[1],
        one[2],
        np.zeros_like(whole),
        saved,
        np.minimum(kept, saved),
        transient,
        np.zeros(n),
        late,
        np.minimum(c.gone, saved),
    )
    split = Times(
        many[0], many[1], many[2], whole, held, np.minimum(kept, held), transient, whole_saved, late,
        np.minimum(c.gone, held),
    )  # fmt: skip
    names = {name for name, _ in resolved.recompute}
    forced = sorted({int(owner[i]) for _, ops in resolved.recompute for i in ops})
    hosted, lent = (
        sorted({int(owner[i]) for _, ops in named for i in ops}) for named in (resolved.offload, resolved.lent)
    )
    hosts = [pool.host > 0 for pool in pools]
    starts = {block.start: b for b, block in enumerate(parts)}
    link = _worst_link(cluster)
    bandwidth = min((d.memory_bandwidth for d in cluster.devices), default=1e10)
    counts, schedules = _choices(batch, len(cluster.devices), can_split, constraints)
    problem = Problem(
        batch=batch,
        pools=pools,
        single=single,
        split=split,
        edges=c.edges,
        weights=(
            *c.weights,
            *(given_weights(c.handed, batch) if any(shares_memory(pool.devices[0]) for pool in pools) else ()),
        ),
        microbatches=counts,
        schedules=schedules,
        optimizer_factor=float(optimizer_factor(optimizer)) if train else 0.0,
        train=train,
        replicas=can_split and constraints.num_replicas != 1,
        joined=bool(c.whole.any()) and can_split,
        sync=sync,
        latency=link[1],
        seconds_per_byte=link[0],
        reduce_seconds_per_byte=3.0 / (bandwidth * max(len(cluster.devices), 1)),
        together=tuple(tuple(sorted({int(owner[i]) for i in ops})) for _, ops in resolved.together),
        breaks=tuple(starts[i] for _, i in resolved.starts if i in starts),
        pools_of=_places(pools, owner, resolved),
        recompute=tuple(forced) if names else (),
        may_recompute=c.may if train else (),
        offload=tuple(hosted) if train and all(hosts) else (),
        may_offload=tuple(b for b in c.leaves if b not in lent) if train and any(hosts) else (),
        lend=tuple(lent) if all(hosts) else (),
        may_lend=tuple(b for b in c.lends if b not in {*forced, *hosted, *lent}) if lends and any(hosts) else (),
        lendable=c.lendable,
        update=host_update(optimizer) if train else 0.0,
        max_stages=constraints.max_stages,
        num_stages=constraints.stages,
        num_replicas=constraints.num_replicas,
        zero=max(constraints.zero, 0),
        gathered=2.0 * largest_unit(graph),
    )
    return Built(problem, tuple(parts), c.units)


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
        alike = (
            device.kind,
            device.memory_bytes,
            device.flops,
            device.host_bandwidth,
            device.name if device.name in placed else "",
        )
        groups.setdefault(alike, []).append(device)
    return tuple(
        Pool(
            ", ".join(d.name for d in group), tuple(d.name for d in group), usable_bytes(group[0], processes=processes),
            shares_memory(group[0].name) and not processes,
            host=1.0 / group[0].host_bandwidth if group[0].host_bandwidth else 0.0,
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
            by_ends.add((1.0 / link.bandwidth if link.bandwidth else 0.0, link.message_seconds))
    for per_byte, latency in by_ends:
        slow, late = max(slow, per_byte), max(late, latency)
    return slow, late
