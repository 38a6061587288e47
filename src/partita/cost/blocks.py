"""Blocks: a graph's ops in order, grouped into the units a plan may be cut between.

A cut never separates an in-place op from the op that made what it changes, nor two ops that touch a buffer which is
changed. Larger graphs are cut at module boundaries first, so that equal layers give equal blocks (``signature``) and
each distinct one is profiled once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partita.cost.ops import family
from partita.graph import Arg, Graph, Op, Ref

MAX_BLOCKS = 320
EXACT_OPS = 200
UNIT_LIMITS = (12, 24, 48, 96, 192, 320)
LARGEST_UNIT = 6


@dataclass(frozen=True, slots=True)
class Block:
    """``ops``: indices [start, stop) into ``graph.ops``. ``name``: for people. Equal ``signature``: equal work."""

    start: int
    stop: int
    name: str
    signature: str

    @property
    def ops(self) -> range:
        return range(self.start, self.stop)


def legal_cuts(graph: Graph) -> list[bool]:
    """``legal[i]``: a cut may stand before op i."""
    n = len(graph.ops)
    legal = [True] * n
    if n:
        legal[0] = False
    touched: dict[str, list[int]] = {}
    written: set[str] = set()
    for i, op in enumerate(graph.ops):
        for base in {graph.tensor(t).base or t for t in op.uses()} | set(op.writes):
            touched.setdefault(base, []).append(i)
        written.update(op.writes)
    for base in written:
        at = touched[base]
        producer = graph.producer(base)
        if producer is not None:
            first, last = producer, max(i for i in at if base in graph.ops[i].writes)
        else:
            first, last = at[0], at[-1]
        for i in range(first + 1, last + 1):
            legal[i] = False
    return legal


def signature(graph: Graph, ops: Sequence[Op]) -> str:
    """A digest of targets, arguments and shapes, with names replaced by order of first use: equal where the work
    is, and where what is held for it is (a layer on a parameter holds one more than one on an activation)."""
    number: dict[str, int] = {}
    text: list[str] = []

    known = graph.known("signature")
    for op in ops:
        if op.name not in known:
            known[op.name] = _spelt(op)
        words, names = known[op.name]
        text.append(words)
        for name in names:
            if name in number:
                text.append(f"%{number[name]}")
            else:
                tensor = graph.tensor(name)
                held = graph.tensor(tensor.base or name).role
                text.append(f"%{len(number)}:{tensor.kind}{'' if held in ('op', 'input') else ' held'}")
                number[name] = len(number)
    return hashlib.blake2b("|".join(text).encode(), digest_size=12).hexdigest()


def _spelt(op: Op) -> tuple[str, tuple[str, ...]]:
    """The op in words, names of tensors left out, and these, in order."""
    names: list[str] = []

    def name_of(name: str) -> str:
        if name:
            names.append(name)
        return "%" if name else "-"

    def arg_of(arg: Arg) -> str:
        if isinstance(arg, Ref):
            return name_of(arg.name)
        if isinstance(arg, tuple):
            return "(" + ",".join(map(arg_of, arg)) + ")"
        return repr(arg)

    words = [op.target, *map(arg_of, op.args), *(f"{key}={arg_of(value)}" for key, value in op.kwargs)]
    words += [",".join(map(name_of, group)) for group in (op.reads, op.writes, op.outputs)]
    return "|".join((*words, f"{op.grad}{op.random};")), tuple(names)


def blocks(
    graph: Graph, *, limit: int = MAX_BLOCKS, exact: int = EXACT_OPS, also: Iterable[int] = (), chunks: bool = True
) -> tuple[Block, ...]:
    """Every legal cut where there are at most ``exact`` ops; else module by module, the heaviest split first, to at
    most ``limit`` blocks, light ops kept with the one before. ``also``: ops that must begin a block, where legal.
    ``chunks``: modules with too many parts are cut between some of them; False: kept whole.
    """
    legal = legal_cuts(graph)
    n = len(graph.ops)
    starts = (set(range(n)) if n <= exact else _by_module(graph, limit, chunks)) | {i for i in also if i < n}
    edges = [0, *sorted(i for i in starts if legal[i]), n] if n else []
    return tuple(_block(graph, a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b)


def profile_units(graph: Graph) -> tuple[Block, ...]:
    """What is measured as one: whole modules, as large as leaves no more than a sixth of the work in one of them."""
    weights = [_weight(graph, op) for op in graph.ops]
    found: tuple[Block, ...] = ()
    for limit in UNIT_LIMITS:
        found = blocks(graph, limit=limit, exact=0, chunks=False)
        if max((sum(weights[b.start : b.stop]) for b in found), default=0.0) * LARGEST_UNIT <= sum(weights):
            break
    return found


def repeated(graph: Graph, block: Block, legal: Sequence[bool], least: float = 2.0) -> tuple[Block, ...]:
    """The modules it consists of, where it has ``least`` times the ops of the distinct ones among them; else itself.

    One that is repeated has two or more ops with flops: a layer is a unit, a single product is not. ``legal``: where
    a cut may stand.
    """
    return _repeated(graph, block, len(_common_path(graph, block)), legal, least)


def _repeated(graph: Graph, block: Block, depth: int, legal: Sequence[bool], least: float) -> tuple[Block, ...]:
    paths = [tuple(graph.ops[i].module.split(".")) for i in block.ops]
    if all(len(path) <= depth for path in paths):
        return (block,)
    keys = [path[: depth + 1] for path in paths]
    starts = [
        i for i in block.ops if i == block.start or (legal[i] and keys[i - block.start] != keys[i - block.start - 1])
    ]
    inner = [_block(graph, a, b) for a, b in zip(starts, [*starts[1:], block.stop], strict=True)]
    if _pays(graph, block, inner, least):
        return tuple(inner)
    deeper = [part for one in inner for part in _repeated(graph, one, depth + 1, legal, least)]
    return tuple(deeper) if _pays(graph, block, deeper, least) else (block,)


def _pays(graph: Graph, block: Block, parts: Sequence[Block], least: float) -> bool:
    distinct = {part.signature: part for part in parts}
    count = Counter(part.signature for part in parts)
    again = [part for s, part in distinct.items() if count[s] > 1]
    layers = all(sum(bool(graph.ops[i].flops) for i in part.ops) > 1 for part in again)
    return bool(again) and layers and least * sum(len(part.ops) for part in distinct.values()) <= len(block.ops)


def _common_path(graph: Graph, block: Block) -> tuple[str, ...]:
    names = [graph.ops[i].module for i in block.ops]
    common = _common(min(names), max(names))
    return tuple(common.split(".")) if common else ()


def _block(graph: Graph, start: int, stop: int) -> Block:
    ops = graph.ops[start:stop]
    names = [op.module for op in ops if op.module] or [""]
    common = _common(min(names), max(names))
    name = common if common and stop - start > 1 else ops[0].name
    return Block(start, stop, name, signature(graph, ops))


def _common(a: str, b: str) -> str:
    parts = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)


def _weight(graph: Graph, op: Op) -> float:
    """A device-free measure of work: flops, and operand bytes at four flops a byte."""
    if family(op) == "view":
        return 0.0
    moved = sum(graph.tensor(o).nbytes(max(graph.batch, 1)) for o in op.outputs if o)
    return float(op.flops) + 4.0 * moved


def _by_module(graph: Graph, limit: int, chunks: bool) -> set[int]:
    weights = [_weight(graph, op) for op in graph.ops]
    paths = [tuple(op.module.split(".")) if op.module else () for op in graph.ops]
    light = 2e-4 * sum(weights)

    def parts(start: int, stop: int, depth: int) -> list[tuple[int, int, int]]:
        """The group's runs of one deeper module each; single ops where no module is deeper."""
        deeper = any(len(paths[i]) > depth for i in range(start, stop))
        found, begin, heavy = [], start, weights[start] > light
        for i in range(start + 1, stop):
            if deeper:
                apart = paths[i][depth : depth + 1] != paths[i - 1][depth : depth + 1]
            else:
                apart = weights[i] > light and heavy
            if apart:
                found.append((begin, i, depth + 1 if deeper else -1))
                begin, heavy = i, False
            heavy = heavy or weights[i] > light
        found.append((begin, stop, depth + 1 if deeper else -1))
        return found

    groups: list[tuple[int, int, int]] = [(0, len(paths), 0)]
    done: list[tuple[int, int, int]] = []
    while groups:
        size = {g: round(sum(weights[g[0] : g[1]]) / (sum(weights) or 1.0), 6) for g in groups}
        top = max(size.values())
        chosen = [g for g in groups if size[g] >= top * 0.999]
        split = {g: parts(*g) for g in chosen}
        room = limit - (len(groups) + len(done) - len(chosen))
        if sum(map(len, split.values())) > room:
            pieces = room // len(chosen) if chunks else 1
            done += [c for g, smaller in split.items() for c in (_chunks(weights, smaller, pieces) or [g])]
        else:
            for g, smaller in split.items():
                if len(smaller) == 1 and smaller[0][2] < 0:
                    done.append(g)
                else:
                    groups += [s for s in smaller if s[2] >= 0 and s[1] - s[0] > 1]
                    done += [s for s in smaller if s[2] < 0 or s[1] - s[0] == 1]
        groups = [g for g in groups if g not in split]
    return {g[0] for g in done}


def _chunks(weights: Sequence[float], parts: Sequence[tuple[int, int, int]], pieces: int) -> list[tuple[int, int, int]]:
    """Neighbouring parts joined to at most ``pieces`` of near-equal weight; none where fewer than 2 are wanted."""
    if pieces < 2:
        return []
    sizes = [sum(weights[a:b]) for a, b, _ in parts]
    total, gone, found = sum(sizes) or 1.0, 0.0, [parts[0][0]]
    for (a, _, _), size in zip(parts, sizes, strict=True):
        if a > found[-1] and gone + 0.5 * size >= total * len(found) / pieces:
            found.append(a)
        gone += size
    edges = [*found, parts[-1][1]]
    return [(a, b, -1) for a, b in zip(edges, edges[1:], strict=False)]
