"""CostTable: seconds and saved bytes of every op on every kind of device; any set of ops costs the sum of its shares.

Where a block was measured, its timing is shared over its ops in proportion to the analytic model, so a plan that cuts
a block apart is still priced, and the blocks' sums are the measured numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.cluster import Cluster, Device
from partita.cost.affine import Affine, through
from partita.cost.blocks import Block, profile_units
from partita.cost.measured import Measured
from partita.cost.ops import family, op_cost, saved_tensors, short
from partita.graph import Graph
from partita.program import Program

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
PUT_OFF = frozenset({"linear", "addmm", "embedding"})


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """Of a set of ops on one kind of device. Seconds and bytes for a microbatch; ``saved``: kept from F to B.

    ``parameters``: (name, bytes, trains) of each parameter and buffer it takes. ``transient``: alive while it runs.
    ``first``: seconds more that the first microbatch of a step takes. ``climb``: bytes above ``saved`` at the worst
    moments of the first backward, when gradients come as activations go; ``surge``: of the others.
    ``owed``: kept between B and W where weight gradients are put off, ``joined``: of the largest op; ``later``: bytes
    of the gradients that W makes.
    """

    forward: Affine
    backward: Affine = Affine()
    weight: Affine = Affine()
    saved: Affine = Affine()
    transient: Affine = Affine()
    parameters: tuple[tuple[str, int, bool], ...] = ()
    first: Affine = Affine()
    climb: tuple[Affine, ...] = ()
    surge: tuple[Affine, ...] = ()
    owed: Affine = Affine()
    joined: Affine = Affine()
    later: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class CostTable:
    """Arrays of shape (ops, 2): fixed and per sample. ``blocks``: the units measured, in order."""

    graph: Graph
    blocks: tuple[Block, ...]
    forward: Mapping[str, Array]
    backward: Mapping[str, Array]
    weight: Mapping[str, Array]
    saved: Array
    first: Mapping[str, Array]

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
    saved = _saved(graph)
    batch = max(graph.batch, 1)
    for kind, device in devices.items():
        rows = [op_cost(graph, op, device) for op in graph.ops]
        f, b, w = (
            np.array([(getattr(r, part).fixed, getattr(r, part).per_sample) for r in rows]).reshape(-1, 2)
            for part in ("forward", "backward", "weight")
        )
        extra = np.zeros_like(f)
        for block in parts if measured is not None else ():
            timing = measured.get(block.signature, kind) if measured is not None else None
            if timing is None:
                continue
            where = slice(block.start, block.stop)
            extra[where] = w[where] + b[where]
            for array, value in ((f, timing.forward), (b, timing.backward), (w, timing.weight), (extra, timing.first)):
                _share(array[where], value, batch)
            if timing.saved is not None:
                _share(saved[where], timing.saved, batch)
        forward[kind], backward[kind], weight[kind], first[kind] = f, b, w, extra
    return CostTable(graph, parts, forward, backward, weight, saved, first)


def _share(rows: Array, value: Affine, batch: int) -> None:
    """Writes ``value`` over the rows in proportion to what they were at ``batch`` (equally where that is 0)."""
    now = rows[:, 0] + rows[:, 1] * batch
    total = now.sum()
    part = now / total if total > 0 else np.full(len(rows), 1.0 / max(len(rows), 1))
    rows[:, 0], rows[:, 1] = part * value.fixed, part * value.per_sample


def tensor_bytes(graph: Graph, name: str) -> Affine:
    """Bytes of one tensor as a line through one sample and the graph's batch."""
    batch = max(graph.batch, 2)
    tensor = graph.tensor(name)
    return through(1, tensor.nbytes(1), batch, tensor.nbytes(batch))


def _saved(graph: Graph) -> Array:
    """Bytes kept for backward, with the op that makes them (inputs of the call: the first that keeps them).

    A stage that receives a tensor counts it as a received one; every storage is counted once.
    """
    result = np.zeros((len(graph.ops), 2))
    seen: set[str] = set()
    for i, op in enumerate(graph.ops):
        for name in saved_tensors(graph, op):
            base = graph.tensor(name).base or name
            if base in seen or graph.tensor(base).role in ("parameter", "buffer", "constant"):
                continue
            seen.add(base)
            producer = graph.producer(base)
            size = tensor_bytes(graph, base)
            result[i if producer is None else producer] += (size.fixed, size.per_sample)
    return result


def parameters_of(graph: Graph, ops: Iterable[int]) -> tuple[tuple[str, int, bool], ...]:
    """(name, bytes, trains) of each parameter, buffer and constant these ops take; tied ones once."""
    found: dict[str, tuple[str, int, bool]] = {}
    for i in ops:
        for name in graph.ops[i].uses():
            base = graph.tensor(name).base or name
            tensor = graph.tensor(base)
            if tensor.role in ("parameter", "buffer", "constant"):
                found[base] = (
                    base,
                    tensor.nbytes(max(graph.batch, 1)),
                    tensor.role == "parameter" and tensor.needs_grad,
                )
    return tuple(found.values())


def segment_cost(
    table: CostTable, kind: str, ops: Sequence[int], recompute: Sequence[tuple[int, int]] = ()
) -> SegmentCost:
    """Of these ops (indices). ``recompute``: ranges of positions in ``ops`` that run again in backward: their saved
    bytes shrink to what enters the range, their forward time is paid twice.
    """
    graph, index = table.graph, np.asarray(ops, dtype=np.int64)
    if not len(index):
        return SegmentCost(Affine())
    forward = _sum(table.forward[kind][index])
    backward, weight = _sum(table.backward[kind][index]), _sum(table.weight[kind][index])
    saved = _sum(table.saved[index])
    for start, stop in recompute:
        inside = index[start:stop]
        again = _sum(table.saved[inside])
        made = {o for i in inside for o in graph.ops[i].outputs}
        entering = {
            graph.tensor(n).base or n
            for i in inside
            for n in graph.ops[i].uses()
            if n not in made and graph.tensor(n).role in ("op", "input")
        }
        kept = sum((tensor_bytes(graph, n) for n in entering), Affine())
        backward = backward + _sum(table.forward[kind][inside])
        saved = saved + again.scaled(-1.0) + kept
    largest = max(
        (tensor_bytes(graph, o) for i in ops for o in graph.ops[i].outputs if o),
        key=lambda a: a.at(max(graph.batch, 1)),
        default=Affine(),
    )
    first = _sum(table.first[kind][index])
    owed, joined, later = _owed(graph, ops)
    return SegmentCost(
        forward, backward, weight, saved, largest, parameters_of(graph, ops), first,
        _surge(table, index, recompute, saved, fresh=True), _surge(table, index, recompute, saved, fresh=False),
        owed, joined, later,
    )  # fmt: skip


def _surge(
    table: CostTable, index: Indices, recompute: Sequence[tuple[int, int]], saved: Affine, *, fresh: bool
) -> tuple[Affine, ...]:
    """Backward undoes the ops in reverse; at each: saved by it and those before, made again by its range, the gradients
    it works on, weights' gradients made (``fresh``), less all that is saved. The lines that are highest at some size.
    """
    graph, rows = table.graph, table.saved[index].copy()
    again = np.zeros_like(rows)
    for start, stop in recompute:
        again[start:stop] = rows[start:stop].sum(axis=0)
        rows[start:stop] = 0.0
    held = np.cumsum(rows, axis=0) + again
    kept = np.array([saved.fixed, saved.per_sample]) - rows.sum(axis=0)  # what enters the ranges
    held += kept
    seen: set[str] = set()
    made = 0.0
    for at in range(len(index) - 1, -1, -1) if fresh else ():
        for name, size, trains in parameters_of(graph, (int(index[at]),)):
            if trains and name not in seen:
                seen.add(name)
                made += size
        held[at, 0] += made
    held += _gradients_of(graph, index) - np.array([saved.fixed, saved.per_sample])
    batch = max(graph.batch, 1)
    sizes = {1, batch, *(batch >> k for k in range(1, 8) if batch >> k)}
    best = {int(np.argmax(held[:, 0] + held[:, 1] * n)) for n in sizes}
    return tuple(Affine(float(held[i, 0]), float(held[i, 1])) for i in sorted(best))


def _gradients_of(graph: Graph, index: Indices) -> Array:
    """Bytes of the gradients alive while each op is undone: of its result and, where they are new, of its inputs."""
    result = np.zeros((len(index), 2))
    for at, i in enumerate(index):
        op = graph.ops[int(i)]
        kind = family(op)
        new = () if kind in ("view", "linear") else op.uses()
        for name in {*new, *(o for o in op.outputs if o)} if kind != "view" else ():
            tensor = graph.tensor(name)
            if tensor.needs_grad and tensor.role in ("op", "input"):
                size = tensor_bytes(graph, name)
                result[at] += (size.fixed, size.per_sample)
    return result


def _owed(graph: Graph, ops: Sequence[int]) -> tuple[Affine, Affine, int]:
    """Bytes of inputs and output gradients of ops whose weight gradient may be put off: of all, of the largest op
    (which are joined for several microbatches); and of those gradients.
    """
    held: dict[str, Affine] = {}
    most, batch = Affine(), max(graph.batch, 1)
    weights: dict[str, int] = {}
    for i in ops:
        op = graph.ops[i]
        if short(op.target) not in PUT_OFF:
            continue
        own = Affine()
        for name in (*op.uses(), *(o for o in op.outputs if o)):
            tensor = graph.tensor(name)
            base = tensor.base or name
            if tensor.role in ("op", "input"):
                key = base if name in op.uses() else name
                held[key] = tensor_bytes(graph, key)
                own = own + held[key]
            elif tensor.role == "parameter" and tensor.needs_grad:
                weights[base] = tensor.nbytes(1)
        most = max(most, own, key=lambda a: a.at(batch))
    return sum(held.values(), Affine()), most, sum(weights.values())


def _sum(rows: Array) -> Affine:
    fixed, per_sample = rows.sum(axis=0)
    return Affine(float(fixed), float(per_sample))


def segment_costs(program: Program, table: CostTable, cluster: Cluster) -> dict[tuple[int, str], SegmentCost]:
    """(segment, device name) -> its cost, for every device the program may run the segment on."""
    position = {op.name: i for i, op in enumerate(table.graph.ops)}
    known: dict[tuple[int, str], SegmentCost] = {}
    result: dict[tuple[int, str], SegmentCost] = {}
    kinds = {device.name: device.kind for device in cluster.devices}
    for s, segment in enumerate(program.segments):
        ops = [position[name] for name in segment.ops]
        for name in dict.fromkeys(program.placement[s]):
            kind = kinds.get(name)
            if kind is None:
                continue
            if (s, kind) not in known:
                known[s, kind] = segment_cost(table, kind, ops, segment.recompute)
            result[s, name] = known[s, kind]
    return result
