"""Labels: in which ways an op can run on the devices of a mesh, with the form of each operand and result and the work.

Along each axis an op runs whole, or divided along one label of its sharding rule (``sharding.options``: columns and
rows of products, heads, batch, positions, vocabulary); a way of the mesh is one of these an axis. Ops that are alike
share one table, so that a model's repeated blocks are read once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import product

import numpy as np

from partita.cost.communication import all_reduce
from partita.cost.ops import family
from partita.cost.roofline import Shapes, idle, op_seconds
from partita.graph import Arg, Graph, Op, Ref, Tensor
from partita.planners.intra.forms import Form, part
from partita.planners.intra.mesh import Mesh
from partita.planners.labelling.problem import Floats
from partita.sharding.options import Option, Ways
from partita.sharding.placements import PARTIAL, REPLICATE, Placement, Shard, even


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The ways of an op, and of all that are like it. ``inputs[i]``, ``outputs[i]``: a form per way of operand or
    result ``i``. ``seconds``: of each way, forward and backward, with the collectives inside of the op.
    """

    ways: tuple[tuple[Option, ...], ...]
    inputs: tuple[tuple[Form, ...], ...]
    outputs: tuple[tuple[Form, ...], ...]
    seconds: Floats


class Tables:
    """Tables of a graph's ops, which has no dim that follows the batch."""

    def __init__(self, graph: Graph, shapes: Shapes, mesh: Mesh) -> None:
        self.graph, self.shapes, self.mesh = graph, shapes, mesh
        self._known: dict[Hashable, Table] = {}

    def of(self, op: Op) -> Table:
        key = self._signature(op)
        if key not in self._known:
            self._known[key] = self._made(op)
        return self._known[key]

    def _signature(self, op: Op) -> Hashable:
        graph = self.graph
        names: dict[str, int] = {}

        def spoken(arg: Arg) -> Hashable:
            if isinstance(arg, Ref):
                fused = self.shapes.passing(op, arg.name)
                return names.setdefault(arg.name, len(names)), _look(graph.tensor(arg.name)), fused
            return tuple(map(spoken, arg)) if isinstance(arg, tuple) else (type(arg), arg)

        given = spoken(op.args), tuple((k, spoken(v)) for k, v in op.kwargs)
        made = tuple((_look(graph.tensor(o)), self._joins(o)) if o else None for o in op.outputs)
        return op.target, given, made, op.grad, op.random, bool(op.reads), op.writes, op.flops

    def _joins(self, name: str) -> bool:
        users = self.shapes.users.get(name, ())
        return len(users) == 1 and self.shapes.passing(users[0], name)

    def _made(self, op: Op) -> Table:
        per_axis = [self._axis(op, team.size) for team in self.mesh.axes]
        operands, outputs = per_axis[0][0].operands, len(op.outputs)
        tensors = (*operands, *(self.graph.tensor(o) if o else None for o in op.outputs))
        ways = tuple(w for w in product(*(options for _, options in per_axis)) if _divides(tensors, w))
        inputs = tuple(tuple(tuple(o.inputs[i] for o in way) for way in ways) for i in range(len(operands)))
        results = tuple(tuple(tuple(o.outputs[i] for o in way) for way in ways) for i in range(outputs))
        seconds = np.array([self._seconds(op, operands, way) for way in ways])
        return Table(ways, inputs, results, seconds)

    def _axis(self, op: Op, members: int) -> tuple[Ways, list[Option]]:
        ways = Ways(self.graph, op, members)
        found = [ways.replicated()]
        if ways.fixed:
            return ways, found
        labels = dict(label for i in range(len(ways.operands)) for label in ways.labels_of(i))
        for label, size in labels.items():
            cut = even(size, members) if isinstance(size, int) and size % members == 0 else None
            option = ways.divided(label, cut) if cut is not None else None
            if option is not None:
                found.append(option)
        for i, tensor in enumerate(ways.operands):
            for placement in divisions(tensor, members):
                found += ways.from_input(i, placement)
        for i in range(len(ways.operands)):
            found += ways.from_input(i, PARTIAL)
        return ways, list({(o.way, o.inputs, o.outputs): o for o in found}.values())

    def _seconds(self, op: Op, operands: tuple[Tensor, ...], way: tuple[Option, ...]) -> float:
        if idle(op):
            return 0.0
        device, samples = self.mesh.device, self.graph.batch
        whole = op_seconds(self.shapes, op, samples, device)
        launch = min(device.overhead_seconds, whole.forward)
        mine = 1.0
        for option in way:
            mine *= option.share(0)
        forward = launch + (whole.forward - launch) * mine
        backward = min(launch, whole.backward) + max(whole.backward - launch, 0.0) * mine
        if family(op) in ("matmul", "conv", "attention"):
            held = sum(self._bytes(t) * part(tuple(o.inputs[i] for o in way)) for i, t in enumerate(operands))
            for i, name in enumerate(op.outputs):
                held += self._bytes(self.graph.tensor(name)) * part(tuple(o.outputs[i] for o in way)) if name else 0.0
            rate = device.memory_bandwidth * self.shapes.assume.memory
            forward = max(forward, launch + held / rate)
            backward = max(backward, launch + 2 * held / rate) if whole.backward else 0.0
        return forward + backward + self._inside(op, way)

    def _inside(self, op: Op, way: tuple[Option, ...]) -> float:
        """Collectives that are part of the op: a sum before its bias, the rows of a loss over divided classes."""
        found = 0.0
        for axis, option in enumerate(way):
            team = self.mesh.axes[axis]
            if option.way == "summed":
                form = tuple(o.outputs[0] for o in way)
                found += all_reduce(self._bytes(self.graph.tensor(op.outputs[0])) * part(form), team)
            elif option.way == "loss":
                rows = self._bytes(self.graph.tensor(op.uses()[1])) / 2
                found += 2 * all_reduce(rows * part(tuple(o.inputs[1] for o in way)), team)
        return found

    def _bytes(self, tensor: Tensor) -> float:
        return self.shapes.nbytes(tensor, self.graph.batch)


def _divides(tensors: tuple[Tensor | None, ...], way: tuple[Option, ...]) -> bool:
    """Whether every tensor can be divided as the axes ask of it together."""
    forms = zip(*((*o.inputs, *o.outputs) for o in way), strict=True)
    return all(tensor is None or fits(tensor, form) for tensor, form in zip(tensors, forms, strict=True))


def _look(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.role, tensor.needs_grad


def divisions(tensor: Tensor, members: int) -> list[Shard]:
    """Every dim in equal parts."""
    found = []
    for dim, size in enumerate(tensor.shape):
        cut = even(size, members) if isinstance(size, int) and size % members == 0 else None
        if cut is not None:
            found.append(Shard(dim, cut))
    return found


def fits(tensor: Tensor, form: Form) -> bool:
    """Whether the dims that several axes divide have a row for everybody: those of one cut in whole parts."""
    for dim, size in enumerate(tensor.shape):
        cuts = [p.cut for p in form if isinstance(p, Shard) and p.dim == dim]
        if len(cuts) > 1 and isinstance(size, int):
            rounds = max(len(c.rounds) for c in cuts)
            ways = 1
            for c in cuts:
                ways *= len(c.rounds[0])
            alike = len({len(c.rounds) for c in cuts}) == 1
            if size % (ways * rounds if alike else ways):
                return False
    return True


def held_forms(tensor: Tensor, mesh: Mesh) -> tuple[Form, ...]:
    """How a parameter or an input may lie: whole or in equal parts along each axis."""
    per_axis: list[list[Placement]] = [[REPLICATE, *divisions(tensor, n)] for n in mesh.shape]
    return tuple(form for form in product(*per_axis) if fits(tensor, form))
