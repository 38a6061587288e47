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
from partita.cost.ops import op_cost, saved_tensors, short, workspace_bytes
from partita.cost.surge import PUT_OFF, parameters_of, surges, tensor_bytes
from partita.graph import Graph
from partita.program import Program

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """Of a set of ops on one kind of device. Seconds and bytes for a microbatch; ``saved``: kept from F to B.

    ``parameters``: (name, bytes, trains) of each parameter and buffer it takes. ``transient``: alive while it runs.
    ``first``: seconds more that the first microbatch of a step takes. ``climb``: bytes above ``saved`` at the worst
    moments of the first backward, when gradients come as activations go; ``surge``: of the others; ``put_off``: of one
    that leaves its weight gradients for later.
    ``owed``: kept between B and W where weight gradients are put off, ``joined``: of the largest op; ``later``: bytes
    of the gradients that W makes. ``given``: what the caller holds for the whole batch and these ops use (inputs,
    noise), which ``saved`` leaves out; ``rows``: of it, what backward needs of a microbatch.
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
    put_off: tuple[Affine, ...] = ()
    owed: Affine = Affine()
    joined: Affine = Affine()
    later: int = 0
    given: tuple[tuple[str, Affine], ...] = ()
    rows: Affine = Affine()


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
    given: Mapping[str, Affine]

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
    given = given_bytes(graph)
    saved = _saved(graph, given)
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
    return CostTable(graph, parts, forward, backward, weight, saved, first, given)


def _share(rows: Array, value: Affine, batch: int) -> None:
    """Writes ``value`` over the rows in proportion to what they were at ``batch`` (equally where that is 0)."""
    now = rows[:, 0] + rows[:, 1] * batch
    total = now.sum()
    part = now / total if total > 0 else np.full(len(rows), 1.0 / max(len(rows), 1))
    rows[:, 0], rows[:, 1] = part * value.fixed, part * value.per_sample


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


def _saved(graph: Graph, given: Mapping[str, Affine]) -> Array:
    """Bytes kept for backward, with the op that makes them; what is given is left out.

    A stage that receives a tensor counts it as a received one; every storage is counted once.
    """
    result = np.zeros((len(graph.ops), 2))
    seen: set[str] = set()
    for i, op in enumerate(graph.ops):
        for name in saved_tensors(graph, op):
            base = graph.tensor(name).base or name
            if base in seen or base in given or graph.tensor(base).role in ("parameter", "buffer", "constant"):
                continue
            seen.add(base)
            producer = graph.producer(base)
            size = tensor_bytes(graph, base)
            result[i if producer is None else producer] += (size.fixed, size.per_sample)
        extra = workspace_bytes(graph, op, 1)
        if extra:
            batch = max(graph.batch, 2)
            size = through(1, extra, batch, workspace_bytes(graph, op, batch))
            result[i] += (size.fixed, size.per_sample)
    return result


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
        *surges(graph, index, table.saved[index], recompute, saved), owed, joined, later, *given_to(table, ops),
    )  # fmt: skip


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
