"""Pairs: inputs and output gradients kept for weight gradients that are made later, and how many a replica may keep.

    backward    head   down   up   proj   qkv   down  ..     each hands in a pair, and all replicas' make one product
    may keep      2      1     1     2     3      4   ..     so many pairs, whose bytes fit under the peak that is
                                                             reached anyway

A pair is kept while another replica has not handed in its own, and till the product is made. Early in backward most of
what forward saved is still there, so a replica waits for the others; later there is room to be ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from partita.cost.affine import Affine
from partita.cost.kept import tensor_bytes
from partita.cost.ops import short
from partita.graph import ITEMSIZE, Graph, Op, Ref

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
PUT_OFF = MappingProxyType({"linear": 1, "addmm": 2, "embedding": 0})
"""Ops whose weight gradient may be made later, and where their weight stands."""
LEAD = 4
"""Pairs that a replica keeps at most, however much room there is."""


def is_apart(graph: Graph, op: Op) -> bool:
    """Whether its weight gradient is a product of its own, straight into the gradient, where a step has several
    microbatches (``runtime.weight_grad``)."""
    weight = weight_of(op)
    if not weight or graph.tensor(weight).role != "parameter":
        return False
    taken = op.args[0]
    return short(op.target) != "linear" or not isinstance(taken, Ref) or len(graph.tensor(taken.name).shape) > 1


def weight_of(op: Op) -> str:
    """The weight of an op that may be put off; '' of others."""
    position = PUT_OFF.get(short(op.target))
    weight = op.args[position] if position is not None and position < len(op.args) else None
    return weight.name if isinstance(weight, Ref) else ""


def places_of(graph: Graph, index: Indices) -> list[int]:
    """Positions of the ops that are apart."""
    return [at for at, i in enumerate(index) if is_apart(graph, graph.ops[int(i)])]


def kept_pairs(
    graph: Graph, index: Indices, ends: Mapping[str, int], until: Sequence[int] = (), times: Sequence[int] = ()
) -> Array:
    """Bytes (fixed, per sample) kept for weight gradients to come, while each op is undone: pairs of those after it.
    ``until``: of each op that is apart, the last position that its pair is kept at (none: to the end). An input counts
    from where it would go (``ends``); before, it is among what is saved. ``times``: how often each pair counts.
    """
    result = np.zeros((len(index) + 1, 2))
    for number, tensors in enumerate(_pairs(graph, index, ends)):
        last, count = until[number] if until else 0, times[number] if times else 1
        for before, size in tensors:
            before += count > 1  # the copy is made while the pair is there
            if last < before:
                size = size.scaled(float(count))
                result[before] -= (size.fixed, size.per_sample)
                result[last] += (size.fixed, size.per_sample)
    return np.cumsum(result[:-1], axis=0)


def _pairs(graph: Graph, index: Indices, ends: Mapping[str, int]) -> list[list[tuple[int, Affine]]]:
    """Of each op that is apart, its tensors: (position from which on backward keeps it for the pair alone, bytes). What
    several take is the first one's, whose backward is the last."""
    made = {out for i in index for out in graph.ops[int(i)].outputs if out}
    seen: set[str] = set()
    found: list[list[tuple[int, Affine]]] = []
    for at in places_of(graph, index):
        op = graph.ops[int(index[at])]
        tensors: list[tuple[int, Affine]] = []
        for name in (*op.uses(), *(o for o in op.outputs if o)):
            base = graph.tensor(name).base or name
            if name not in op.outputs and (base in seen or base not in made):
                continue
            seen.add(base)
            before = at if name in op.outputs else ends.get(base, at)
            tensors.append((before, tensor_bytes(graph, name if name in op.outputs else base)))
        found.append(tensors)
    return found


def leads(graph: Graph, index: Indices, ends: Mapping[str, int], alive: Array, sizes: Sequence[int]) -> dict[str, int]:
    """Weight -> pairs that a replica may keep when it has handed in one of this weight: as many (from 1, its own, to
    ``LEAD``) as do not pass the peak of ``alive``, the bytes while each op is undone, at any of the ``sizes``, samples.
    """
    places, pairs = places_of(graph, index), _pairs(graph, index, ends)
    samples = np.array([[1.0, n] for n in sizes])
    room = (samples @ alive.T).max(axis=1, keepdims=True) - samples @ alive.T  # by size and position
    found: dict[str, int] = {}
    for number, place in enumerate(places):
        start = places[number - 1] if number else 0  # till the next one has handed in
        extra, lead = np.zeros((place - start, 2)), 1
        while lead < LEAD:
            for before, size in pairs[number + lead - 1] if number + lead <= len(places) else ():
                extra[: max(0, min(before, place) - start)] += (size.fixed, size.per_sample)
            if (samples @ extra.T > room[:, start:place] + 0.5).any():
                break
            lead += 1
        weight = weight_of(graph.ops[int(index[place])])
        found[weight] = min(found.get(weight, LEAD), lead)
    return found


def kept_until(graph: Graph, index: Indices, allowed: Mapping[str, int]) -> list[int]:
    """Of each op that is apart, the last position that its pair may be kept at where ``leads`` are ``allowed``. A
    weight's pairs are all kept till the last of them: its gradient is one product."""
    places = places_of(graph, index)
    weights = [weight_of(graph.ops[int(index[at])]) for at in places]
    result = []
    for weight in weights:
        whole = weights.index(weight)
        at = whole
        while at >= 0 and whole - at + 1 < allowed.get(weights[at], LEAD):
            at -= 1
        result.append(places[at] if at >= 0 else 0)
    return result


def copies(graph: Graph, index: Indices, replicas: int) -> list[int]:
    """Of each op that is apart, how many pairs the first replica holds where it keeps one: all ``replicas``' in one
    copy, where that is how their product is made (``runtime.weight_grad``), else its own."""
    found = []
    for at in places_of(graph, index):
        op = graph.ops[int(index[at])]
        wide = [d for d in graph.tensor(weight_of(op)).shape if isinstance(d, int)]
        out = graph.tensor(op.outputs[0])
        last = out.shape[-1] if out.shape and isinstance(out.shape[-1], int) else 1
        rows = out.nbytes(max(graph.batch, 1)) / (ITEMSIZE.get(out.dtype, 4) * max(last, 1))
        few = len(wide) == 2 and rows * sum(wide) <= wide[0] * wide[1] * (replicas - 1)
        found.append(replicas if few or short(op.target) == "embedding" else 1)
    return found
