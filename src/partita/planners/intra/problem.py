"""The labelling problem of a graph on a mesh: a node per op, per parameter and per tensor that several ops use.

    op node         its ways, at their seconds
    held node       forms of a parameter or an input at rest; parameters cost what the optimizer reads and writes
    shared node     the one form to which a tensor with several users is brought for all of them
    edges           seconds from the form a tensor has to the form it is needed in, forward and backward

A step's seconds are the sum: work and messages one after another. Parameters divided at rest and gathered for their
use are the sharding of Rajbhandari et al. (*ZeRO*, 2020), divided in use Megatron's (Shoeybi et al., 2019), and batches
divided need no word of their own: all three are labels. Ops whose results follow from no input or parameter run whole;
so do user code taken as it is, with the parameters it reads, and ops that draw random numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import numpy as np

from partita.cost.roofline import Assumptions, Shapes
from partita.errors import PlanError
from partita.graph import ITEMSIZE, Arg, Dim, Graph, Op, Size, Tensor, at
from partita.planners.intra.forms import Form, Moves, part, spell
from partita.planners.intra.labels import Table, Tables, held_forms
from partita.planners.intra.mesh import Mesh
from partita.planners.labelling import Edge, Problem
from partita.planners.labelling.problem import Floats
from partita.sharding.call import Call
from partita.sharding.placements import REPLICATE, Copied, Partial, Replicate, Shard

TRAFFIC_BYTES = (
    28.0  # an element: Adam reads 16-bit gradient, 32-bit weight and two moments; writes all but the gradient
)
STATE_BYTES = 16.0  # an element: 16-bit weight and gradient, 32-bit weight and two moments
Wish = tuple[int | str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Posed:
    """``ops[i]``: the op of node ``i``, with its table; then ``held`` and ``shared`` tensors with their forms."""

    problem: Problem
    ops: tuple[tuple[str, Table], ...]
    held: tuple[tuple[str, tuple[Form, ...]], ...]
    shared: tuple[tuple[str, tuple[Form, ...]], ...]
    state_bytes: tuple[Floats, ...]


def at_batch(graph: Graph) -> Graph:
    """The graph with plain numbers for all dims, at its own batch."""
    batch = graph.batch

    def plain(arg: Arg) -> Arg:
        if isinstance(arg, Size):
            return arg.at(batch)
        return tuple(map(plain, arg)) if isinstance(arg, tuple) else arg

    def dims(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        return tuple(at(d, batch) for d in shape)

    ops = tuple(
        replace(op, args=tuple(map(plain, op.args)), kwargs=tuple((k, plain(v)) for k, v in op.kwargs))
        for op in graph.ops
    )
    return replace(graph, tensors=tuple(replace(t, shape=dims(t.shape)) for t in graph.tensors), ops=ops)


def pose(graph: Graph, mesh: Mesh, assume: Assumptions, fixed: Mapping[str, Wish]) -> Posed:
    """The problem of ``graph`` (``at_batch``). ``fixed``: as in ``plan_intra_op``."""
    poser = _Poser(graph, mesh, assume, fixed)
    poser.nodes()
    poser.edges()
    return poser.posed()


class _Poser:
    def __init__(self, graph: Graph, mesh: Mesh, assume: Assumptions, fixed: Mapping[str, Wish]) -> None:
        self.graph, self.mesh, self.assume, self.fixed = graph, mesh, assume, fixed
        self.moves = Moves(mesh.axes)
        self.shapes = Shapes(graph, assume)
        self.tables = Tables(graph, self.shapes, mesh)
        self.moving = _moving(graph)
        self.costs: list[Floats] = []
        self.links: list[Edge] = []
        self.node: dict[str, int] = {}  # op -> its node
        self.at: dict[str, tuple[int, Hashable, tuple[Form, ...]]] = {}  # tensor -> node, key and forms it is had in
        self.ops: list[tuple[str, Table]] = []
        self.held: list[tuple[str, tuple[Form, ...]]] = []
        self.shared: list[tuple[str, tuple[Form, ...]]] = []
        self.users: dict[str, list[tuple[int, Table, int]]] = {}
        self.known: dict[Hashable, Floats] = {}
        self.unions: dict[Hashable, tuple[Form, ...]] = {}
        self.state: list[Floats] = []

    def nodes(self) -> None:
        for op in self.graph.ops:
            if op.name not in self.moving:
                continue
            table = self.tables.of(op)
            node = self._node(table.seconds)
            self.ops.append((op.name, table))
            for i, name in enumerate(op.outputs):
                if name:
                    self.at[name] = node, (id(table), i), table.outputs[i]
            for i, name in enumerate(self._operands(op)):
                self.users.setdefault(name, []).append((node, table, i))
        forms: dict[Hashable, tuple[Form, ...]] = {}
        inside = {name for op in self.graph.ops for name in op.reads}
        for tensor in self.graph.of_role("parameter", "input"):
            if tensor.name in inside:
                self._hold(tensor, ((REPLICATE,) * len(self.mesh.axes),))
            elif tensor.name in self.users:
                wish = self._wish(tensor)
                key = tensor.shape, wish
                if key not in forms:
                    forms[key] = self._held_forms(tensor, wish)
                self._hold(tensor, forms[key])

    def _operands(self, op: Op) -> tuple[str, ...]:
        return tuple(t.name for t in Call(op, self.graph).operands())

    def _node(self, costs: Floats) -> int:
        self.costs.append(costs)
        return len(self.costs) - 1

    def _wish(self, tensor: Tensor) -> Wish | None:
        names = (tensor.path, tensor.name)
        return next((w for pattern, w in self.fixed.items() if any(fnmatchcase(n, pattern) for n in names)), None)

    def _held_forms(self, tensor: Tensor, wish: Wish | None) -> tuple[Form, ...]:
        forms = held_forms(tensor, self.mesh)
        if wish is None:
            return forms
        kept = tuple(f for f in forms if _spoken(f) == wish)
        if not kept:
            said = "; ".join(spell(f) for f in forms)
            raise PlanError(f"{tensor.path or tensor.name} cannot be held as {wish}; it can be: {said}")
        return kept

    def _hold(self, tensor: Tensor, forms: tuple[Form, ...]) -> None:
        parts = np.array([part(form) for form in forms])
        elements = prod(d for d in tensor.shape if isinstance(d, int))
        trained = tensor.role == "parameter" and tensor.needs_grad
        rate = self.mesh.device.memory_bandwidth * self.assume.memory
        node = self._node(parts * elements * TRAFFIC_BYTES / rate if trained else np.zeros(len(forms)))
        each = STATE_BYTES if trained else float(ITEMSIZE.get(tensor.dtype, 4)) * (tensor.role == "parameter")
        self.state.append(parts * elements * each)
        self.held.append((tensor.name, forms))
        self.at[tensor.name] = node, ("held", tensor.shape, forms), forms

    # -- edges -----------------------------------------------------------------------------------------------------

    def edges(self) -> None:
        outputs = set(self.graph.outputs)
        shared = []
        for name, users in self.users.items():
            if name not in self.at:
                for node, table, i in users:
                    self.costs[node] = self.costs[node] + self._given(name, table, i)
            elif len(users) == 1:
                node, table, i = users[0]
                self._edge(name, self.at[name], node, (id(table), i, "in"), table.inputs[i])
            else:
                shared.append((name, users))
        for name, users in shared:
            self._share(name, users)
        for name in outputs & set(self.at):
            node, _, forms = self.at[name]
            self.costs[node] = self.costs[node] + self._left(name, forms)

    def _share(self, name: str, users: list[tuple[int, Table, int]]) -> None:
        source, key, made = self.at[name]
        union = key, tuple((id(table), i) for _, table, i in users)
        if union not in self.unions:
            needed = (form for _, table, i in users for form in table.inputs[i])
            self.unions[union] = tuple(dict.fromkeys(needed))
        forms = self.unions[union]
        node = self._node(np.zeros(len(forms)))
        self.shared.append((name, forms))
        self._edge(name, (source, key, made), node, union, forms)
        for user, table, i in users:
            self._edge(name, (node, union, forms), user, (id(table), i, "in"), table.inputs[i])

    def _edge(
        self, name: str, had: tuple[int, Hashable, tuple[Form, ...]], user: int, key: Hashable, needed: tuple[Form, ...]
    ) -> None:
        node, made_key, made = had
        tensor = self.graph.tensor(name)
        nbytes = self.shapes.nbytes(tensor, self.graph.batch)
        whole = made_key, key, nbytes, tensor.needs_grad
        if whole not in self.known:
            self.known[whole] = self.moves.table(nbytes, made, needed, grad=tensor.needs_grad)
        self.links.append(Edge(node, user, self.known[whole]))

    def _given(self, name: str, table: Table, index: int) -> Floats:
        """A buffer, a constant, or what follows from them: everybody has it whole."""
        whole = ((REPLICATE,) * len(self.mesh.axes),)
        nbytes = self.shapes.nbytes(self.graph.tensor(name), self.graph.batch)
        seconds: Floats = self.moves.table(nbytes, whole, table.inputs[index], grad=False)[0]
        return seconds

    def _left(self, name: str, forms: tuple[Form, ...]) -> Floats:
        """Results are left as they come; sums are added up."""
        tensor = self.graph.tensor(name)
        nbytes = self.shapes.nbytes(tensor, self.graph.batch)
        done = [tuple(REPLICATE if isinstance(p, Partial) else p for p in form) for form in forms]
        return np.array(
            [self.moves.seconds(nbytes, f, d, grad=tensor.needs_grad) for f, d in zip(forms, done, strict=True)]
        )

    def posed(self) -> Posed:
        problem = Problem(tuple(self.costs), tuple(self.links))
        return Posed(problem, tuple(self.ops), tuple(self.held), tuple(self.shared), tuple(self.state))


def _moving(graph: Graph) -> frozenset[str]:
    """Ops whose results follow from an input or a parameter, or are drawn at random."""
    live = {t.name for t in graph.of_role("input", "parameter")}
    found = set()
    for op in graph.ops:
        if op.random or op.writes or any(name in live for name in op.uses()):
            found.add(op.name)
            live.update(o for o in op.outputs if o)
    return frozenset(found)


def _spoken(form: Form) -> Wish:
    """Dims and ``'Replicate'``: what a plan says of a form at rest."""
    said: list[int | str] = []
    for p in form:
        said.append(p.dim if isinstance(p, Shard) else "Replicate" if isinstance(p, Replicate | Copied) else "Partial")
    return tuple(said)
