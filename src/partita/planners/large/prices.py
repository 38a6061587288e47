"""Prices: what one unit of a model costs on one kind of device, for a tensor degree and a microbatch.

Seconds and bytes of everything a layout is chosen by; each distinct unit is divided and priced once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from partita.cluster import Device
from partita.cost.communication import COLLECTIVES, Channel, Team
from partita.cost.ops import workspace_bytes
from partita.cost.roofline import ALL, MASK, Assumptions, Seconds, Shapes, Share, kept_bytes, kept_tensors, op_seconds
from partita.graph import Graph, Op
from partita.planners.large.tensor import WHOLE, Division, Form, divide
from partita.planners.large.units import Units


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal devices: ``count`` of them, ``per_node`` in a node; channels inside and across nodes."""

    device: Device
    names: tuple[str, ...]
    per_node: int
    inside: Channel
    across: Channel

    @property
    def count(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class UnitPrice:
    """Seconds of a microbatch, collectives included (``exchanged``: their part; ``late``: backward's part that makes
    weight gradients, for which nobody waits). Bytes on one device: ``saved`` from forward to backward, ``entry`` if the
    unit is recomputed instead, ``working`` while it runs, ``sent`` to the next. ``weights``: elements; ``trained``: of
    those, elements with a gradient.
    """

    forward: float
    backward: float
    late: float
    exchanged: float
    saved: float
    entry: float
    working: float
    sent: float
    weights: float
    trained: float


class Prices:
    """Prices of a model's units for every degree and microbatch asked; what was computed is kept."""

    def __init__(
        self,
        graph: Graph,
        units: Units,
        assume: Assumptions,
        shapes: Shapes | None = None,
        wanted: Mapping[str, Form] | None = None,
    ) -> None:
        """``wanted``: parameters that must be held so wherever ops are divided."""
        self.wanted = dict(wanted or {})
        self.graph, self.units, self.assume = graph, units, assume
        self.shapes = shapes or Shapes(graph, assume)
        self._divisions: dict[tuple[int, str, int, bool], Division | None] = {}
        self._known: dict[tuple[str, int, bool, int], tuple[UnitPrice, ...] | None] = {}

    def team(self, pool: Pool, degree: int) -> Team:
        """The devices that divide one unit: within a node as far as it reaches."""
        inside = min(degree, pool.per_node)
        return Team(inside, -(-degree // inside), pool.inside, pool.across)

    def of(self, pool: Pool, degree: int, sequence: bool, samples: int) -> tuple[UnitPrice, ...] | None:
        """One price a kind of unit; None where a degree divides none of the model's weights."""
        key = (pool.device.kind, degree, sequence, samples)
        if key not in self._known:
            rows = [self._price(pool, k, degree, sequence, samples) for k in range(self.units.num_kinds)]
            self._known[key] = None if any(r is None for r in rows) else tuple(r for r in rows if r is not None)
        return self._known[key]

    def form(self, name: str, degree: int, sequence: bool) -> Form:
        """How a value that crosses from unit to unit is held."""
        tensor = self.graph.tensor(name)
        length = tensor.shape[1] if len(tensor.shape) > 2 else 0
        divides = isinstance(length, int) and length >= degree and length % degree == 0
        return 1 if sequence and divides and tensor.needs_grad and tensor.role == "op" else WHOLE

    def division(self, pool: Pool, kind: int, degree: int, sequence: bool) -> Division | None:
        key = (kind, pool.device.kind, degree, sequence)
        if key not in self._divisions:
            team, device = self.team(pool, degree), pool.device
            ops = self.units.row[self.units.example(kind)].ops

            def seconds(op: Op, share: Share) -> Seconds:
                return op_seconds(self.shapes, op, 1, device, share)

            def exchange(collective: str, name: str) -> float:
                return COLLECTIVES[collective](self._exchanged_bytes(name, 1), team)

            self._divisions[key] = divide(
                self.shapes, ops, degree, seconds=seconds, exchange=exchange, sequence=sequence,
                entering=lambda name: self.form(name, degree, sequence),
                leaving=lambda name: self.form(name, degree, sequence), wanted=self.wanted,
            )  # fmt: skip
        return self._divisions[key]

    def _exchanged_bytes(self, name: str, samples: int) -> float:
        return self.shapes.nbytes(self.graph.tensor(name), samples)

    def _price(self, pool: Pool, kind: int, degree: int, sequence: bool, samples: int) -> UnitPrice | None:
        unit = self.units.row[self.units.example(kind)]
        graph, shapes, device = self.graph, self.shapes, pool.device
        division = None
        if degree > 1:
            division = self.division(pool, kind, degree, sequence)
            if division is None:
                return None
        team = self.team(pool, degree)
        forward = backward = late = exchanged = 0.0
        labels = division.labels if division else ("",) * len(unit.ops)
        working = 0.0
        for i, label in zip(unit.ops, labels, strict=True):
            op = graph.ops[i]
            took = op_seconds(shapes, op, samples, device, Share(label, degree) if label else ALL)
            forward, backward, late = forward + took.forward, backward + took.backward, late + took.weight
            alive = sum(self._bytes(o, samples, degree, division) for o in op.outputs if o and not _alias(graph, o))
            working = max(working, 2.0 * alive)
        for turn in division.changes if division else ():
            for collective, back in ((turn.forward, False), (turn.backward, True)):
                if collective:
                    took_here = COLLECTIVES[collective](self._exchanged_bytes(turn.tensor, samples), team)
                    exchanged += took_here
                    forward, backward = forward + took_here * (not back), backward + took_here * back
        saved = self._saved(unit.ops, samples, degree, division)
        position = self.units.row.index(unit)
        sent = sum(self._crossing_bytes(n, samples, degree, sequence) for n in self.units.sent[position])
        entering = self.units.sent[position - 1] if position else ()
        entry = sum(self._crossing_bytes(n, samples, degree, sequence) for n in entering)
        weights, trained = self._weights(unit.ops, degree, division)
        return UnitPrice(forward, backward, late, exchanged, saved, entry, working, sent, weights, trained)

    def _crossing_bytes(self, name: str, samples: int, degree: int, sequence: bool) -> float:
        whole = self.shapes.nbytes(self.graph.tensor(name), samples)
        return whole / degree if self.form(name, degree, sequence) == 1 else whole

    def _bytes(self, name: str, samples: int, degree: int, division: Division | None) -> float:
        tensor = self.graph.tensor(name)
        divided = division is not None and isinstance(division.form(name), int)
        return self.shapes.nbytes(tensor, samples) / (degree if divided else 1)

    def _saved(self, ops: range, samples: int, degree: int, division: Division | None) -> float:
        """Each storage once; values that were whole for one product only are kept as they were made (Korthikanti).

        What stays in registers between two element-wise ops cannot be kept: what it was made of is, instead.
        """
        graph = self.graph
        total, seen = 0.0, set[str]()
        cut = {c.tensor for c in division.changes if isinstance(c.needed, int)} if division else set[str]()
        sequence = division is not None and _sequential(division)
        for i in ops:
            total += workspace_bytes(graph, graph.ops[i], samples)
            for name in self._kept(graph.ops[i]):
                base = graph.tensor(name).base or name
                if base in seen or graph.tensor(base).role in ("parameter", "buffer", "constant"):
                    continue
                seen.add(base)
                form: Form = WHOLE
                if division is not None:
                    made = graph.producer(name)
                    inside = made is not None and made in ops
                    form = division.form(name) if inside else self.form(name, degree, sequence)
                    if name in cut and not graph.tensor(name).needs_grad:
                        form = 0
                total += kept_bytes(self.shapes, base, samples) / (degree if isinstance(form, int) else 1)
        return total

    def _kept(self, op: Op) -> Iterator[str]:
        """Tensors of memory that the op's backward needs."""
        for name in kept_tensors(self.graph, op):
            made = self.graph.producer(name)
            fused = made is not None and name in op.uses() and self.shapes.passing(op, name)
            if made is not None and fused and self.graph.ops[made].target != MASK:
                yield from self.graph.ops[made].uses()
            else:
                yield name

    def _weights(self, ops: range, degree: int, division: Division | None) -> tuple[float, float]:
        forms = dict(division.parameters) if division else {}
        weights, trained = 0.0, 0.0
        for name in dict.fromkeys(n for i in ops for n in self.graph.ops[i].uses()):
            tensor = self.graph.tensor(name)
            if tensor.role not in ("parameter", "buffer"):
                continue
            count = prod(tensor.shape_at(1)) / (degree if isinstance(forms.get(name), int) else 1)
            weights += count
            trained += count if tensor.role == "parameter" and tensor.needs_grad else 0.0
        return weights, trained


def _alias(graph: Graph, name: str) -> bool:
    base = graph.tensor(name).base
    return bool(base) and base != name


def _sequential(division: Division) -> bool:
    return any("reduce_scatter" in (c.forward, c.backward) for c in division.changes)
