"""CostTable: seconds and saved bytes of every op on every kind of device; any set of ops costs the sum of its shares.

Where a block was measured, its timing is shared over its ops in proportion to the analytic model, so a plan that cuts
a block apart is still priced, and the blocks' sums are the measured numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from partita.cluster import Cluster, Device
from partita.cost.affine import Affine, total
from partita.cost.away import Going, Lent, Ranges, Trips, copies_alive, has_host, trips, ways
from partita.cost.blocks import Block, profile_units
from partita.cost.kept import Kept, Lives, given_bytes, kept_by_maker, lives, tensor_bytes
from partita.cost.measured import Measured, Timing
from partita.cost.ops import op_cost, saved_tensors
from partita.cost.pairs import is_apart
from partita.cost.surge import Rises, parameters_of, parameters_of_op, rises, together
from partita.graph import Graph
from partita.program import Partial, Program, Segment, Split

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """Of a set of ops on one kind of device. Seconds and bytes for a microbatch; ``saved``: kept from F to B.

    ``parameters``: (name, bytes, trains) of each parameter and buffer it takes. ``held``: tensors it makes whose memory
    stays to backward.
    ``first``: seconds more that the first microbatch of a step takes. ``rises``: bytes above ``saved`` while it runs.
    ``owed``: kept between B and W where weight gradients are put off; ``later``: bytes of the gradients that W makes;
    ``products``: the parameters they are of. ``given``: what the caller holds for the whole batch and these ops use
    (inputs, noise), which ``saved`` leaves out; ``rows``: of it, what backward needs of a microbatch.
    ``joined``: what it takes in one piece that its makers hold in parts. ``alone``: share of the seconds that it takes
    while the devices beside it do nothing. ``trips``: what waits in host memory meanwhile, which is not ``saved``;
    ``fetched``: as ``rises``, of backwards that find nothing of it on the device.
    """

    forward: Affine
    backward: Affine = Affine()
    weight: Affine = Affine()
    saved: Affine = Affine()
    held: frozenset[str] = frozenset()
    parameters: tuple[tuple[str, int, bool], ...] = ()
    first: Affine = Affine()
    rises: Rises = Rises()
    owed: Affine = Affine()
    later: int = 0
    products: frozenset[str] = frozenset()
    given: tuple[tuple[str, Affine], ...] = ()
    rows: Affine = Affine()
    joined: Affine = Affine()
    alone: float = 1.0
    trips: Trips = Trips()
    fetched: Rises = Rises()


@dataclass(frozen=True, slots=True, eq=False)
class CostTable:
    """Arrays of shape (ops, 2): fixed and per sample. ``blocks``: the units measured, in order. ``kept``: what each op
    makes that backward needs, ``saved`` its bytes. ``users``: tensor -> ops that take it. ``alone``: of each op on
    kinds that were measured, the share of its seconds that it takes while the devices beside it do nothing.
    """

    graph: Graph
    blocks: tuple[Block, ...]
    forward: Mapping[str, Array]
    backward: Mapping[str, Array]
    weight: Mapping[str, Array]
    saved: Array
    kept: tuple[tuple[Kept, ...], ...]
    first: Mapping[str, Array]
    given: Mapping[str, Affine]
    users: Mapping[str, tuple[int, ...]]
    alone: Mapping[str, Array]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.forward)


def cost_table(
    graph: Graph,
    cluster: Cluster,
    *,
    measured: Measured | None = None,
    units: Sequence[Block] | None = None,
) -> CostTable:
    """Prices for each kind of device in the cluster. ``units``: what was measured as one (None: ``profile_units``)."""
    parts = tuple(units) if units is not None else profile_units(graph) if measured is not None else ()
    devices: dict[str, Device] = {}
    for device in cluster.devices:
        devices.setdefault(device.kind, device)
    forward: dict[str, Array] = {}
    backward: dict[str, Array] = {}
    weight: dict[str, Array] = {}
    first: dict[str, Array] = {}
    alone: dict[str, Array] = {}
    given = given_bytes(graph)
    kept = kept_by_maker(graph, given)
    batch = max(graph.batch, 1)
    alike, examples = _alike(graph)
    for kind, device in devices.items():
        distinct = np.array([
            [(line.fixed, line.per_sample) for line in (cost.forward, cost.backward, cost.weight)]
            for cost in (op_cost(graph, graph.ops[i], device) for i in examples)
        ]).reshape(-1, 3, 2)  # fmt: skip
        f, b, w = (np.ascontiguousarray(distinct[alike, part]) for part in range(3))
        extra = np.zeros_like(f)
        for block in parts if measured is not None else ():
            timing = measured.get(block.signature, kind) if measured is not None else None
            if timing is None:
                continue
            where = slice(block.start, block.stop)
            extra[where] = w[where] + b[where]
            alone.setdefault(kind, np.ones(len(graph.ops)))[where] = timing.alone
            for array, value in ((f, timing.forward), (b, timing.backward), (w, timing.weight), (extra, timing.first)):
                _share(array[where], value, batch)
            if timing.saved is not None:
                kept[where] = _rescaled(kept[where], timing.saved, batch, block.start)
        forward[kind], backward[kind], weight[kind], first[kind] = f, b, w, extra
    saved = np.array([(s.fixed, s.per_sample) for s in (total(k.size for k in row) for row in kept)]).reshape(-1, 2)
    users: dict[str, tuple[int, ...]] = {}
    for i, op in enumerate(graph.ops):
        for name in op.uses():
            users[name] = (*users.get(name, ()), i)
    return CostTable(graph, parts, forward, backward, weight, saved, tuple(kept), first, given, users, alone)


def priced_as(
    arrays: Mapping[str, Array], kept: Sequence[tuple[Kept, ...]], ops: Sequence[int], timing: Timing, batch: int
) -> list[tuple[Kept, ...]]:
    """Writes what was measured of these ops together into the rows of ``arrays``; the rows of ``kept``, likewise."""
    where, result = np.asarray(ops, dtype=np.int64), list(kept)
    for name in ("forward", "backward", "weight", "first"):
        rows = arrays[name][where]
        _share(rows, getattr(timing, name), batch)
        arrays[name][where] = rows
    if timing.saved is not None:
        for i, row in zip(ops, _rescaled([kept[i] for i in ops], timing.saved, batch, ops[0]), strict=True):
            result[i] = row
    return result


def _alike(graph: Graph) -> tuple[Indices, list[int]]:
    """For each op the number of its kind, all of which cost the same; an example of each kind."""
    shapes: dict[object, int] = {}
    shape_of = {t.name: shapes.setdefault(t.kind, len(shapes)) for t in graph.tensors}
    kinds: dict[object, int] = {}
    examples: list[int] = []
    of = np.zeros(len(graph.ops), dtype=np.int64)
    for i, op in enumerate(graph.ops):
        operands = (tuple(shape_of[n] for n in op.uses()), tuple(shape_of[o] for o in op.outputs if o))
        of[i] = kinds.setdefault((op.target, op.grad, op.flops, operands), len(examples))
        if of[i] == len(examples):
            examples.append(i)
    return of, examples


def _share(rows: Array, value: Affine, batch: int) -> None:
    """Writes ``value`` over the rows in proportion to what they were at ``batch`` (equally where that is 0)."""
    now = rows[:, 0] + rows[:, 1] * batch
    total = now.sum()
    part = now / total if total > 0 else np.full(len(rows), 1.0 / max(len(rows), 1))
    rows[:, 0], rows[:, 1] = part * value.fixed, part * value.per_sample


def _rescaled(rows: Sequence[tuple[Kept, ...]], value: Affine, batch: int, start: int) -> list[tuple[Kept, ...]]:
    """The block's storages, as many bytes together as were measured."""
    now = sum(k.size.at(batch) for row in rows for k in row)
    if now <= 0:
        return [(Kept("", value, (start,)),), *rows[1:]]
    factor = value.at(batch) / now
    return [tuple(k.scaled(factor) for k in row) for row in rows]


def segment_cost(
    table: CostTable,
    kind: str,
    ops: Sequence[int],
    recompute: Ranges = (),
    *,
    apart: bool = False,
    train: bool = True,
    offload: Ranges = (),
    going: Going = (),
    lent: Lent = (),
    device: Device | None = None,
    replicas: int = 0,
    compiled: Ranges = (),
) -> SegmentCost:
    """Of these ops (indices). ``recompute``: ranges of positions in ``ops`` that run again in backward: their saved
    bytes shrink to what enters the range, their forward time is paid twice. ``apart``: it runs for several
    microbatches. ``train``: something is kept for backward. ``going``: what ops in the ranges ``offload`` save and
    what leaves the ``device`` till then (``Segment.away``); ``lent``: parameters that live there (``Segment.lent``).
    ``replicas``: so many of a program's one stage. ``compiled``: ranges that are one function each. Where there are
    any, no weight gradient of the segment counts as put off: of what is compiled none is, of the rest few would be.
    """
    graph, index = table.graph, np.asarray(ops, dtype=np.int64)
    if not len(index):
        return SegmentCost(Affine())
    forward = _sum(table.forward[kind][index])
    backward, weight = _sum(table.backward[kind][index]), _sum(table.weight[kind][index])
    if compiled:
        apart, inside = False, np.zeros(len(index), dtype=bool)
        for start, stop in compiled:
            inside[start:stop] = True
        backward = backward + _sum(table.weight[kind][index[inside]])
        weight = _sum(table.weight[kind][index[~inside]])
    for start, stop in recompute:
        backward = backward + _sum(table.forward[kind][index[start:stop]])
    made = [o for i in ops for o in graph.ops[i].outputs if o]
    mine = set(map(int, ops))
    elsewhere = frozenset(o for o in made if not mine.issuperset(table.users.get(o, ())))
    positions, hosted = [int(i) for i in ops], bool(going or lent) and device is not None
    away = frozenset(n for _, names in lent for n in names) if device is not None and has_host(device) else frozenset()

    def living(there: bool) -> Lives:
        gone = ways(graph, offload, going, len(index), there=there, lent=lent) if train else {}
        found = lives(
            graph, positions, table.kept, recompute, sent=elsewhere, train=train, gone=gone, compiled=compiled
        )
        if not lent:
            return found
        copies = copies_alive(graph, offload, going, lent, [graph.ops[i] for i in positions], there=there)
        return replace(found, done=found.done + copies[0], undone=found.undone + copies[1])

    life = living(True)
    held = frozenset(o for o in made if (graph.tensor(o).base or o) in life.stays)
    first = _sum(table.first[kind][index])
    owed, later = _owed(graph, () if compiled else ops)
    allowed = together(graph, [int(i) for i in ops], recompute) if apart and replicas and train else None
    found, fetched = Trips(), Rises()

    def worst(life: Lives) -> Rises:
        return rises(
            graph, index, life, elsewhere, apart=apart, lent=away, allowed=allowed, replicas=replicas, compiled=compiled
        )

    if hosted and device is not None:
        fetched = worst(living(False))
        there = [Affine(*row) for row in table.forward[kind][index].tolist()]
        back = [Affine(*row) for row in (table.backward[kind][index] + table.weight[kind][index]).tolist()]
        found = trips(graph, offload, going, there, back, device, lent)
    parameters = tuple(p for p in parameters_of(graph, ops) if p[0] not in away)
    return SegmentCost(
        forward, backward, weight, life.saved, held, parameters, first, worst(life), owed, later,
        products(graph, () if compiled else ops),
        *given_to(table, ops), alone=_alone(table, kind, index), trips=found,
        fetched=fetched,
    )  # fmt: skip


def _alone(table: CostTable, kind: str, index: Indices) -> float:
    """Of these ops together, by the seconds that each takes; 1 where none was measured."""
    if kind not in table.alone:
        return 1.0
    rows = table.forward[kind][index] + table.backward[kind][index] + table.weight[kind][index]
    seconds = rows @ np.array([1.0, max(table.graph.batch, 1)])
    total = float(seconds.sum())
    return float(seconds @ table.alone[kind][index]) / total if total > 0 else 1.0


def products(graph: Graph, ops: Iterable[int]) -> frozenset[str]:
    """Parameters whose gradients are products of their own and nothing else."""
    inside: set[str] = set()
    outside: set[str] = set()
    for i in ops:
        found = inside if is_apart(graph, graph.ops[i]) else outside
        found.update(name for name, _, trains in parameters_of_op(graph, graph.ops[i]) if trains)
    return frozenset(inside - outside)


def given_to(table: CostTable, ops: Iterable[int]) -> tuple[tuple[tuple[str, Affine], ...], Affine]:
    """Of these ops: what is given to them, whole, and the rows of it that their backward needs."""
    graph = table.graph
    found: dict[str, bool] = {}
    for i in ops:
        names = [name for name in graph.ops[i].uses() if (graph.tensor(name).base or name) in table.given]
        kept = saved_tensors(graph, graph.ops[i]) if names else ()
        for name in names:
            base = graph.tensor(name).base or name
            found[base] = found.get(base, False) or name in kept
    rows = sum((table.given[base] for base, kept in found.items() if kept), Affine())
    return tuple((base, table.given[base]) for base in found), rows


def _owed(graph: Graph, ops: Sequence[int]) -> tuple[Affine, int]:
    """Bytes of inputs and output gradients of ops whose weight gradient may be put off, and of those gradients."""
    held, weights = owed_tensors(graph, ops)
    return total(size for _, size in held.values()), sum(weights.values())


def owed_tensors(graph: Graph, ops: Sequence[int]) -> tuple[dict[str, tuple[int, Affine]], dict[str, int]]:
    """Of ops whose weight gradient may be put off: their inputs and output gradients, with the first op that needs
    each, and bytes of the weights.
    """
    held: dict[str, tuple[int, Affine]] = {}
    made = {graph.tensor(o).base or o for i in ops for o in graph.ops[i].outputs if o}
    weights: dict[str, int] = {}
    for i in ops:
        op = graph.ops[i]
        if not is_apart(graph, op):
            continue
        for name in (*op.uses(), *(o for o in op.outputs if o)):
            tensor = graph.tensor(name)
            base = tensor.base or name
            if tensor.role == "op" and (name in op.outputs or base in made):  # what was received counts as that
                key = base if name in op.uses() else name
                if key not in held:
                    held[key] = i, tensor_bytes(graph, key)
            elif tensor.role == "parameter" and tensor.needs_grad:
                weights[base] = tensor.nbytes(1)
    return held, weights


def _sum(rows: Array) -> Affine:
    fixed, per_sample = rows.sum(axis=0)
    return Affine(float(fixed), float(per_sample))


def _joined(graph: Graph, program: Program, segment: Segment) -> Affine:
    if segment.phase != "whole" or len(program.sizes) == 1:
        return Affine()
    parts = {use.tensor for use in segment.uses if use.source >= 0 and isinstance(use.layout, (Split, Partial))}
    return total(tensor_bytes(graph, name) for name in sorted(parts))


def segment_costs(program: Program, table: CostTable, cluster: Cluster) -> dict[tuple[int, str], SegmentCost]:
    """(segment, device name) -> its cost, for every device the program may run the segment on."""
    position = {op.name: i for i, op in enumerate(table.graph.ops)}
    known: dict[tuple[int, str], SegmentCost] = {}
    result: dict[tuple[int, str], SegmentCost] = {}
    devices = {device.name: device for device in cluster.devices}
    for s, segment in enumerate(program.segments):
        ops = [position[name] for name in segment.ops]
        for name in dict.fromkeys(program.placement[s]):
            if name not in devices:
                continue
            kind = devices[name].kind
            if (s, kind) not in known:
                apart = len(program.sizes) > 1 and segment.phase == "split"
                cost = segment_cost(
                    table, kind, ops, segment.recompute, apart=apart, train=program.train, offload=segment.offload,
                    going=segment.away, lent=segment.lent, device=devices[name], replicas=len(program.replicas),
                    compiled=segment.compiled,
                )  # fmt: skip
                known[s, kind] = replace(cost, joined=_joined(table.graph, program, segment))
            result[s, name] = known[s, kind]
    return result
