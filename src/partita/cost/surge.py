"""Surge: bytes alive at the worst moments of a stage's backward, from the life of every value and gradient.

Backward undoes the ops in reverse. At each, alive are: what was saved by it and those before it, what its recomputed
range made again, the gradients still needed, and the weights' gradients made so far. Accuracy: a few per cent of what a
run on CPU measures (benchmarks/planner/memory_limits.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partita.cost.affine import Affine
from partita.cost.kept import HELD, TWICE, Lives, given_bytes, kept_by_maker, lives, tensor_bytes
from partita.cost.ops import family, short
from partita.cost.pairs import copies, is_apart, kept_pairs, kept_until, leads, places_of, weight_of
from partita.graph import ITEMSIZE, Graph, Op

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Lines = tuple[Affine, ...]
PASSES_ON = frozenset({"add", "add_"})
TAKES_PART = frozenset(
    {"select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "expand", "diagonal", "as_strided",
     "unfold", "contiguous", "broadcast_to"}
)  # fmt: skip
"""Views whose backward makes a tensor as large as what they are a view of."""


@dataclass(frozen=True, slots=True)
class Product:
    """One weight gradient of a W step, in their order.

    Bytes: ``used``: gone by then of what waited; ``made``: gradients made, its own too; ``table``: of its own beside an
    earlier one; ``pair``: of its input and output gradient, copied into one where they have at most ``rows`` rows a
    further microbatch; ``length``: rows they have.
    """

    used: Affine
    made: float
    table: float
    pair: Affine
    length: Affine
    rows: float

    def at(self, samples: int, runs: int, first: bool) -> float:
        """Bytes more than before the W step. ``samples``: of all ``runs`` together; ``first``: of the batch's step."""
        joins = runs > 1 and self.length.at(samples) <= self.rows * (runs - 1)
        new = self.made if first else self.table
        return new + (self.pair.at(samples) if joins else 0.0) - self.used.at(samples)


@dataclass(frozen=True, slots=True)
class Rises:
    """Bytes above ``saved`` at the worst moments of a segment, as lines that are highest at some microbatch's size.

    ``forward``: of a forward, whose ``saved`` is there already; of backwards ``first``: of one that makes the weights'
    gradients; ``later``: of one that adds to them; ``put_off``: of one that leaves them to a W step, ``lagged``: of
    such a one while another device keeps what was sent to it for its own W step, ``products``: of that; ``owner``,
    ``helper``: of replicas that make each product once, the first and the others.
    """

    forward: Lines = ()
    first: Lines = ()
    later: Lines = ()
    put_off: Lines = ()
    lagged: Lines = ()
    owner: Lines = ()
    helper: Lines = ()
    products: tuple[Product, ...] = ()


def parameters_of(graph: Graph, ops: Iterable[int]) -> tuple[tuple[str, int, bool], ...]:
    """(name, bytes, trains) of each parameter, buffer and constant these ops take; tied ones once."""
    return tuple({row[0]: row for i in ops for row in parameters_of_op(graph, graph.ops[i])}.values())


def parameters_of_op(graph: Graph, op: Op) -> tuple[tuple[str, int, bool], ...]:
    """As ``parameters_of``, of one op."""
    known = graph.known("parameters_of")
    if op.name not in known:
        rows: dict[str, tuple[str, int, bool]] = {}
        for name in op.uses():
            base = graph.tensor(name).base or name
            tensor = graph.tensor(base)
            if tensor.role in HELD:
                trains = tensor.role == "parameter" and tensor.needs_grad
                rows[base] = (base, tensor.nbytes(max(graph.batch, 1)), trains)
        known[op.name] = tuple(rows.values())
    found: tuple[tuple[str, int, bool], ...] = known[op.name]
    return found


def rises(
    graph: Graph,
    index: Indices,
    life: Lives,
    elsewhere: frozenset[str] = frozenset(),
    *,
    apart: bool,
    lent: frozenset[str] = frozenset(),
    allowed: Mapping[str, int] | None = None,
    replicas: int = 1,
    compiled: Sequence[tuple[int, int]] = (),
) -> Rises:
    """``index``: the ops, ``life``: of what they keep; ``apart``: weight gradients are products of their own
    (``is_apart``): there are several microbatches. ``elsewhere``: what they make that others take. ``lent``: parameters
    whose gradients stay elsewhere. ``allowed``: of so many ``replicas`` that make products together, ``leads``.
    ``compiled``: ranges of positions that are one function, which hands over all its weights' gradients at its end.
    """
    total = np.array([life.saved.fixed, life.saved.per_sample])
    forward = _highest(graph, life.done - total)
    alive = life.undone + _gradients(graph, index, elsewhere) - total
    made, own, kept = _weights(graph, index, apart, lent)
    for start, stop in compiled:
        own[start:stop] = np.cumsum(own[start:stop][::-1])[::-1]

    def with_fixed(rows: Array, extra: Array) -> Lines:
        rows = rows.copy()
        rows[:, 0] += extra
        return _highest(graph, rows)

    first, later = with_fixed(alive, made), with_fixed(alive, own)
    if not apart:
        return Rises(forward, first, later)
    pairs = alive + kept_pairs(graph, index, life.ends)
    put_off = with_fixed(pairs, kept)
    lagged = with_fixed(pairs + _still_sent(graph, index, elsewhere, life), kept) if elsewhere else put_off
    if allowed is None:
        return Rises(forward, first, later, put_off, lagged, products=_products(graph, index))
    until = kept_until(graph, index, allowed)
    owner = alive + kept_pairs(graph, index, life.ends, until, copies(graph, index, replicas))
    helper = alive + kept_pairs(graph, index, life.ends, until)
    return Rises(
        forward,
        first,
        later,
        put_off,
        lagged,
        with_fixed(owner, made),
        with_fixed(helper, kept),
        _products(graph, index),
    )


def _still_sent(graph: Graph, index: Indices, elsewhere: frozenset[str], life: Lives) -> Array:
    """Bytes, while each op is undone, of what others took and this device itself would have let go of by then."""
    rows = np.zeros((len(index), 2))
    for base in {graph.tensor(name).base or name for name in elsewhere} & life.stays:
        size = tensor_bytes(graph, base)
        rows[: life.ends.get(base, len(index))] += (size.fixed, size.per_sample)
    return rows


def together(graph: Graph, ops: Sequence[int], recompute: Sequence[tuple[int, int]] = ()) -> Mapping[str, int]:
    """``pairs.leads`` of a replica that runs these ops: how far it may be ahead with each weight's gradient."""
    key = f"{tuple(ops)} {tuple(recompute)}"
    known = graph.known("together")
    if key not in known:
        index, inside = np.asarray(ops, dtype=np.int64), set(ops)
        taken = {name for i, op in enumerate(graph.ops) if i not in inside for name in op.uses()}
        elsewhere = frozenset(o for i in ops for o in graph.ops[i].outputs if o in taken)
        life = lives(graph, ops, kept_by_maker(graph, given_bytes(graph)), recompute, sent=elsewhere)
        alive = life.undone + _gradients(graph, index, elsewhere)
        least = {weight_of(graph.ops[int(index[at])]): 1 for at in places_of(graph, index)}
        alive += kept_pairs(graph, index, life.ends, kept_until(graph, index, least))
        alive[:, 0] += _weights(graph, index, True)[2]
        known[key] = leads(graph, index, life.ends, alive, _sizes(graph))
    found: Mapping[str, int] = known[key]
    return found


def _products(graph: Graph, index: Indices) -> tuple[Product, ...]:
    """The last op's first, as backward meets them. What several products take goes with the last of them."""
    found: list[Product] = []
    gone, made, total = Affine(), set[str](), 0.0
    apart = [graph.ops[int(i)] for i in index if is_apart(graph, graph.ops[int(i)])]
    taken_at: dict[str, int] = {}
    for at, op in enumerate(apart):
        for name in op.uses():
            taken_at.setdefault(graph.tensor(name).base or name, at)
    for at in range(len(apart) - 1, -1, -1):
        op = apart[at]
        own, used, length = Affine(), Affine(), Affine()
        wide: tuple[int, ...] = (0, 0)
        for name in (*op.uses(), *(o for o in op.outputs if o)):
            tensor = graph.tensor(name)
            base = name if name in op.outputs else tensor.base or name
            if tensor.role in ("op", "input"):
                size = tensor_bytes(graph, base)
                own = own + size
                used = used + (size if taken_at.get(base, at) >= at else Affine())
                if name in op.outputs:
                    width = max(int(tensor.shape[-1]) if isinstance(tensor.shape[-1], int) else 1, 1)
                    length = size.scaled(1.0 / (ITEMSIZE.get(tensor.dtype, 4) * width))
            elif tensor.role == "parameter" and len(tensor.shape) == 2:
                wide = tuple(d for d in tensor.shape if isinstance(d, int)) or wide
        weights = [(n, size) for n, size, trains in parameters_of_op(graph, op) if trains]
        total += float(sum(size for n, size in weights if n not in made))
        made.update(n for n, _ in weights)
        table = short(op.target) == "embedding"
        beside = float(sum(size for _, size in weights)) if table else 0.0
        rows = float("inf") if table else wide[0] * wide[-1] / max(sum(wide), 1)
        found.append(Product(gone, total, beside, own, length, rows))
        gone = gone + used
    return tuple(found)


def _highest(graph: Graph, alive: Array) -> Lines:
    best = {int(np.argmax(alive[:, 0] + alive[:, 1] * n)) for n in _sizes(graph)}
    return tuple(Affine(float(alive[i, 0]), float(alive[i, 1])) for i in sorted(best))


def _sizes(graph: Graph) -> list[int]:
    """Samples of the microbatches that are looked at."""
    batch = max(graph.batch, 1)
    return sorted({1, batch, *(batch >> k for k in range(1, 8) if batch >> k)})


def _weights(
    graph: Graph, index: Indices, apart: bool, lent: frozenset[str] = frozenset()
) -> tuple[Array, Array, Array]:
    """Bytes of weights' gradients when each op has been undone: made so far by a first backward; of the op itself, on
    their way to be added to earlier ones; made so far, but for those that are products of their own.
    """
    made, own, kept = np.zeros(len(index)), np.zeros(len(index)), np.zeros(len(index))
    last: dict[str, int] = {}
    for at in range(len(index) - 1, -1, -1):
        op = graph.ops[int(index[at])]
        inside = apart and is_apart(graph, op)  # added to the gradient as it is made
        table = inside and short(op.target) == "embedding"
        for name, size, trains in parameters_of_op(graph, op):
            if not trains or name in lent:
                continue
            pieces = 0 if inside and not table else 1
            if name not in last:
                last[name] = at
                made[at] += size
                own[at] += pieces * size
                kept[at] += 0 if inside else size
            elif inside:
                made[at] += pieces * size
                made[at - 1 if at else 0] -= pieces * size if at else 0
                last[name] = at
            else:  # used again: the pieces so far, the new one and their sum
                own[at : last[name]] += size
                own[at] += 2 * size
                made[at] += 2 * size
                made[at - 1 if at else 0] -= 2 * size if at else 0
                last[name] = at
    return np.cumsum(made[::-1])[::-1], own, np.cumsum(kept[::-1])[::-1]


def _gradients(graph: Graph, index: Indices, elsewhere: frozenset[str]) -> Array:
    """Bytes of the gradients alive while each op is undone.

    The gradient of a value lives from its last use to the op that made it. Views and sums pass theirs on as it is, so
    that a value used by one of them only shares its result's. Where a value has several uses, the pieces are added: two
    more copies for a moment (one, where the piece was passed on).
    """
    result = np.zeros((len(index) + 1, 2))
    uses: dict[str, list[int]] = {}
    for at, i in enumerate(index):
        for name in graph.ops[int(i)].uses():
            if graph.tensor(name).needs_grad and graph.tensor(name).role in ("op", "input"):
                uses.setdefault(name, []).append(at)
    made = {out: at for at, i in enumerate(index) for out in graph.ops[int(i)].outputs if out}
    shares: dict[str, str] = {}
    life: dict[str, tuple[int, int]] = {}
    for at in range(len(index) - 1, -1, -1):
        op = graph.ops[int(index[at])]
        passes = _passes_on(op)
        if short(op.target) in TWICE and op.uses():
            size = tensor_bytes(graph, op.uses()[0]).scaled(TWICE[short(op.target)])
            result[at] += (size.fixed, size.per_sample)
            result[at + 1] -= (size.fixed, size.per_sample)
        for out in op.outputs:
            if out and graph.tensor(out).needs_grad and out not in shares:
                first, last = life.get(out, (at, at))
                life[out] = (min(first, at), max(last, uses.get(out, [at])[-1]))
        for name in op.uses():
            where = uses.get(name)
            if where is None:
                continue
            out = op.outputs[0] if op.outputs else ""
            if passes and len(where) == 1 and out:
                root = shares[name] = shares.get(out, out)
                first, last = life.get(root, (at, at))
                life[root] = (min(first, made.get(name, 0)), last)
                continue
            life.setdefault(name, (made.get(name, 0), where[-1]))
            if len(where) > 1 and at != where[-1]:
                size = tensor_bytes(graph, name)
                result[at] += np.array([size.fixed, size.per_sample]) * (1.0 if passes else 2.0)
                result[at + 1] -= np.array([size.fixed, size.per_sample]) * (1.0 if passes else 2.0)
    for name in () if has_loss(graph) else dict.fromkeys(graph.outputs):
        if name in made and graph.tensor(name).needs_grad:  # a loss to come: its gradient, and the loss's own
            root = shares.get(name, name)
            life[root] = (life.get(root, (made[name], 0))[0], len(index) - 1)
            size = tensor_bytes(graph, name)
            result[len(index) - 1] += (2.0 * size.fixed, 2.0 * size.per_sample)
            result[len(index)] -= (2.0 * size.fixed, 2.0 * size.per_sample)
    for name, (first, last) in life.items():
        if name in elsewhere and name in made and name not in uses:  # received, and counted as that
            continue
        size = tensor_bytes(graph, name)
        result[first] += (size.fixed, size.per_sample)
        result[last + 1] -= (size.fixed, size.per_sample)
    return np.cumsum(result[:-1], axis=0)


def has_loss(graph: Graph) -> bool:
    """Whether the model gives its own loss: a differentiable number."""
    return any(graph.tensor(o).needs_grad and not graph.tensor(o).shape for o in graph.outputs)


def _passes_on(op: Op) -> bool:
    """Whether its inputs' gradients are its result's, in the same memory."""
    name = short(op.target)
    return name in PASSES_ON or (family(op) == "view" and name not in TAKES_PART)
