"""Surge: bytes alive at the worst moments of a stage's backward, from the life of every value and gradient.

Backward undoes the ops in reverse. At each, alive are: what was saved by it and those before it, what its recomputed
range made again, the gradients still needed, and the weights' gradients made so far. Accuracy: a few per cent of what a
run on CPU measures (benchmarks/planner/memory_limits.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from partita.cost.affine import Affine, through
from partita.cost.ops import family, short
from partita.graph import Graph, Op

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Lines = tuple[Affine, ...]
PASSES_ON = frozenset({"add", "add_"})
TAKES_PART = frozenset(
    {"select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "expand", "diagonal", "as_strided",
     "unfold", "contiguous", "broadcast_to"}
)  # fmt: skip
"""Views whose backward makes a tensor as large as what they are a view of."""
PUT_OFF = frozenset({"linear", "addmm", "embedding"})
"""Ops whose weight gradient may be made later."""


def tensor_bytes(graph: Graph, name: str) -> Affine:
    """Bytes of one tensor as a line through one sample and the graph's batch."""
    batch = max(graph.batch, 2)
    tensor = graph.tensor(name)
    return through(1, tensor.nbytes(1), batch, tensor.nbytes(batch))


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


def surges(
    graph: Graph, index: Indices, rows: Array, recompute: Sequence[tuple[int, int]], saved: Affine
) -> tuple[Lines, Lines, Lines]:
    """Lines in the microbatch's size that are highest at some size, above ``saved``: of a first backward, which makes
    the weights' gradients; of the others; of one that puts them off. ``index``: the ops; ``rows``: bytes that
    each saves; ``recompute``: ranges of positions that run again.
    """
    again, rows = np.zeros_like(rows), rows.copy()
    for start, stop in recompute:
        again[start:stop] = rows[start:stop].sum(axis=0)
        rows[start:stop] = 0.0
    total = np.array([saved.fixed, saved.per_sample])
    enters = total - rows.sum(axis=0)
    alive = np.cumsum(rows, axis=0) + again + enters + _gradients(graph, index) - total
    first, later, put_off = alive.copy(), alive.copy(), alive + _put_off(graph, index)
    made, own, own_now = _weights(graph, index)
    first[:, 0] += made
    later[:, 0] += own
    put_off[:, 0] += own_now
    return _highest(graph, first), _highest(graph, later), _highest(graph, put_off)


def _highest(graph: Graph, alive: Array) -> Lines:
    batch = max(graph.batch, 1)
    sizes = {1, batch, *(batch >> k for k in range(1, 8) if batch >> k)}
    best = {int(np.argmax(alive[:, 0] + alive[:, 1] * n)) for n in sizes}
    return tuple(Affine(float(alive[i, 0]), float(alive[i, 1])) for i in sorted(best))


def _weights(graph: Graph, index: Indices) -> tuple[Array, Array, Array]:
    """Bytes of weights' gradients when each op has been undone: made so far by a first backward; of the op itself, on
    their way to be added to earlier ones; of the op itself where it does not put them off.
    """
    made, own, own_now = np.zeros(len(index)), np.zeros(len(index)), np.zeros(len(index))
    last: dict[str, int] = {}
    for at in range(len(index) - 1, -1, -1):
        op = graph.ops[int(index[at])]
        for name, size, trains in parameters_of(graph, (int(index[at]),)):
            if not trains:
                continue
            if name not in last:
                last[name] = at
                made[at] += size
                own[at] += size
                own_now[at] += 0 if short(op.target) in PUT_OFF else size
            else:  # used again: the pieces so far, the new one and their sum
                own[at : last[name]] += size
                own[at] += 2 * size
                made[at] += 2 * size
                made[at - 1 if at else 0] -= 2 * size if at else 0
                last[name] = at
    return np.cumsum(made[::-1])[::-1], own, own_now


def _put_off(graph: Graph, index: Indices) -> Array:
    """Bytes kept for weight gradients to come, while each op is undone: the inputs and output gradients of those after
    it. An input counts once what made it has been undone; before, it is among what is saved.
    """
    result = np.zeros((len(index) + 1, 2))
    made = {out: at for at, i in enumerate(index) for out in graph.ops[int(i)].outputs if out}
    seen: set[str] = set()
    for at, i in enumerate(index):
        op = graph.ops[int(i)]
        if short(op.target) not in PUT_OFF:
            continue
        for name in (*op.uses(), *(o for o in op.outputs if o)):
            base = graph.tensor(name).base or name
            before = at if name in op.outputs else made.get(base, 0)
            if name not in op.outputs and (base in seen or base not in made):
                continue
            seen.add(base)
            size = tensor_bytes(graph, name if name in op.outputs else base)
            result[before] -= (size.fixed, size.per_sample)
            result[0] += (size.fixed, size.per_sample)
    return np.cumsum(result[:-1], axis=0)


def _gradients(graph: Graph, index: Indices) -> Array:
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
            result[len(index) - 1] += (3.0 * size.fixed, 3.0 * size.per_sample)
            result[len(index)] -= (3.0 * size.fixed, 3.0 * size.per_sample)
    for name, (first, last) in life.items():
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
