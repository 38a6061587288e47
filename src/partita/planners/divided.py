"""Divided: what a graph's blocks cost on teams of devices that divide every op between them.

    block  ─▶  a graph of its own  ─▶  its cheapest division  ─▶  one member's local graph  ─▶  seconds, bytes
    block.1, block.2, ...: equal work, the same numbers

A small graph is divided as one piece, so that neighbouring blocks may agree on a division; of a large one each distinct
block is divided by itself (of a block of equal modules each distinct module): what crosses its border is whole. What is
priced so is searched; plans that win are then divided and simulated as they will run (``pricing``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from partita.cluster import Cluster
from partita.cost.blocks import Block, legal_cuts, repeated
from partita.cost.communication import Channel
from partita.cost.likened import factors, likened
from partita.cost.table import CostTable
from partita.graph import Graph
from partita.group_costs import collective_seconds
from partita.planners.build import Built, build, of_pools
from partita.planners.constraints import Constraints
from partita.planners.problem import Array, Shares, Times
from partita.planners.resolved import Resolved
from partita.planners.sums import block_seconds, owners, phases, users_of, weights
from partita.sharding.batch import BatchLayouts
from partita.sharding.choose import Wishes, choose
from partita.sharding.prices import Prices
from partita.sharding.spmd import Local, Part, localise

WHOLE_OPS = 200
Seconds = tuple[tuple[Array, ...], tuple[Array, ...]]
"""With one microbatch and with more: forward, backward, weight, once a step."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive blocks divided together. ``local``: the first member's graph of them."""

    blocks: tuple[Block, ...]
    local: Local


@dataclass(eq=False)
class Divider:
    """Prices the blocks of one Built for any number of members. ``table``: of whole ops, measured or not."""

    graph: Graph
    layouts: BatchLayouts
    table: CostTable
    cluster: Cluster
    batch: int
    optimizer: str
    train: bool
    wishes: Wishes = ()
    known: dict[tuple[object, ...], Shares] = field(default_factory=dict)
    pieces: dict[tuple[str, int, Channel], Piece] = field(default_factory=dict)
    faster: dict[str, Array] = field(default_factory=dict)
    users: dict[tuple[Block, ...], dict[str, tuple[int, ...]]] = field(default_factory=dict)
    used: dict[tuple[Block, ...], list[str]] = field(default_factory=dict)
    units: dict[Block, tuple[Block, ...]] = field(default_factory=dict)
    legal: list[bool] = field(default_factory=list)
    bare: dict[tuple[object, ...], tuple[Seconds, Seconds]] = field(default_factory=dict)

    def shares(self, built: Built, members: int, channel: Channel) -> Shares:
        """Of the built problem's blocks; arrays have a row for each of its pools, by their device's kind."""
        kinds = [self.cluster.device(pool.devices[0]).kind for pool in built.problem.pools]
        key = (members, channel, built.blocks, tuple(kinds))
        if key not in self.known:
            self.known[key] = self._shares(built, members, channel, kinds)
        return self.known[key]

    def least(self, built: Built, members: int) -> Shares:
        """No division is faster or holds less: all is shared perfectly, but for what the smallest op takes."""
        problem = built.problem
        kinds = tuple(self.cluster.device(pool.devices[0]).kind for pool in problem.pools)
        if (built.blocks, kinds) not in self.bare:
            self.bare[built.blocks, kinds] = self._bare(built, kinds)
        whole, floor = self.bare[built.blocks, kinds]
        times = [
            _shared(t, w, f, members) for t, w, f in zip((problem.single, problem.split), whole, floor, strict=True)
        ]
        held = tuple(
            w if w.given else replace(w, nbytes=w.nbytes / members, trained=w.trained / members)
            for w in problem.weights
        )
        return Shares(members, times[0], times[1], held)

    def _bare(self, built: Built, kinds: Sequence[str]) -> tuple[Seconds, Seconds]:
        """Of the blocks: seconds as divided ones are priced, and the part of them that no division makes less."""
        table = self.table_of(Local(self.graph, self.layouts, {}), self.cluster) if self.table.blocks else self.table
        at_least = {}
        for kind in table.kinds:
            launch = next(d.overhead_seconds for d in self.cluster.devices if d.kind == kind)
            at_least[kind] = launch * self._factors().get(kind, 1.0)

        def floors(rows: Mapping[str, Array]) -> dict[str, Array]:
            return {k: np.stack([np.minimum(r[:, 0], at_least[k]), np.zeros(len(r))], axis=1) for k, r in rows.items()}

        lowest = replace(
            table, forward=floors(table.forward), backward=floors(table.backward), weight=floors(table.weight)
        )
        whole, once = phases(self.graph, self.layouts)
        found = []
        for priced in (table, lowest):
            one, many, joined = block_seconds(
                priced, kinds, owners(built.blocks), whole, once, batch=self.batch, train=self.train
            )
            found.append(((*one, np.zeros_like(joined)), (*many, joined)))
        return found[0], found[1]

    def _shares(self, built: Built, members: int, channel: Channel, kinds: Sequence[str]) -> Shares:
        problem, n = built.problem, len(built.blocks)
        where = {d.kind: d for d in reversed(self.cluster.devices)}
        alone = Cluster(tuple(where.values()))
        row = [list(where).index(kind) for kind in kinds]
        single, split = (_empty(problem.single, len(kinds)) for _ in range(2))
        sizes: dict[str, float] = {}
        numbers: dict[str, tuple[Times, Times]] = {}
        step = n if len(self.graph.ops) <= WHOLE_OPS else 1
        for b in range(0, n, step):
            here = slice(b, b + step)
            units = [built.blocks[here]] if step > 1 else [(unit,) for unit in self._repeated(built.blocks[b])]
            priced = []
            for blocks in units:
                signature = " ".join(block.signature for block in blocks)
                piece = self._piece(blocks, signature, members, channel)
                if signature not in numbers:
                    numbers[signature] = self._numbers(piece, members, channel, alone)
                priced.append(numbers[signature])
                sizes |= self._sizes(piece, blocks)
            for k, (into, whole) in enumerate(((single, problem.single), (split, problem.split))):
                parts = [pair[k] for pair in priced]
                found = parts[0] if len(parts) == 1 else _joined(parts, whole.kept[here], self.batch)
                for name in ("forward", "backward", "weight", "whole"):
                    getattr(into, name)[:, here] = getattr(found, name)[row]
                for name in ("saved", "kept", "transient", "whole_saved", "owed", "gone"):
                    getattr(into, name)[here] = getattr(found, name)
        given = tuple(w for w in problem.weights if w.given)
        return Shares(members, single, split, (*weights(self.graph, self._users(built.blocks), sizes), *given))

    def _repeated(self, block: Block) -> tuple[Block, ...]:
        if block not in self.units:
            self.legal = self.legal or legal_cuts(self.graph)
            self.units[block] = repeated(self.graph, block, self.legal)
        return self.units[block]

    def _users(self, blocks: tuple[Block, ...]) -> dict[str, tuple[int, ...]]:
        if blocks not in self.users:
            self.users[blocks] = users_of(self.graph, owners(blocks))
        return self.users[blocks]

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _prices(self, channel: Channel) -> Prices:
        """Of the slowest device; a transfer within a memory reads twice and writes twice (``shards.prices``)."""
        memory = min(d.memory_bandwidth for d in self.cluster.devices)
        return Prices(min(d.flops for d in self.cluster.devices), memory, min(channel.bandwidth, memory / 4))

    def _piece(self, blocks: tuple[Block, ...], signature: str, members: int, channel: Channel) -> Piece:
        """These blocks, or others of equal work, divided."""
        key = (signature, members, channel)
        if key not in self.pieces:
            graph = part_of(self.graph, range(blocks[0].start, blocks[-1].stop))
            ops = frozenset(op.name for op in graph.ops if self.layouts.phase[op.name] != "once")
            outside = frozenset(graph.outputs)
            prices = self._prices(channel)
            choice = choose(graph, ops, members, wishes=self.wishes, outside=outside, prices=prices)
            segment_of = {op.name: self.layouts.phase[op.name] for op in graph.ops}
            part = Part(members, ops, choice)
            local = localise(graph, self.layouts, [part], 0, segment_of=segment_of, outside=outside)
            known = {t.name for t in local.graph.tensors}
            enters = tuple(t for t in graph.tensors if t.name not in known and graph.producer(t.name) is None)
            whole = replace(local.graph, tensors=(*local.graph.tensors, *enters))
            self.pieces[key] = Piece(blocks, replace(local, graph=whole))
        return self.pieces[key]

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _numbers(self, piece: Piece, members: int, channel: Channel, alone: Cluster) -> tuple[Times, Times]:
        graph, origin = piece.local.graph, piece.local.origin
        of = {op.name: i for i, op in enumerate(self.graph.ops)}
        came = [of[origin.get(op.name, op.name)] for op in graph.ops]
        table = self.table_of(piece.local, alone)
        for kind in table.kinds:
            for i, op in enumerate(graph.ops):
                there, back = collective_seconds(graph, op, members, channel, train=self.train)
                table.forward[kind][i] += (there.fixed, there.per_sample)
                table.backward[kind][i] += (back.fixed, back.per_sample)
        edges = [0]
        for block in piece.blocks:
            edges.append(next((i for i, at in enumerate(came) if at >= block.stop), len(came)))
        parts = [
            replace(block, start=a, stop=b)
            for block, a, b in zip(piece.blocks, edges, edges[1:], strict=False)
        ]  # fmt: skip
        made = build(
            graph, piece.local.layouts, alone, table, parts, batch=self.batch, optimizer=self.optimizer,
            train=self.train, constraints=Constraints(), resolved=Resolved(), processes=True,
        ).problem  # fmt: skip
        order = [next(p for p, pool in enumerate(made.pools) if d.name in pool.devices) for d in alone.devices]
        return of_pools(made.single, order), of_pools(made.split, order)

    def table_of(self, local: Local, cluster: Cluster) -> CostTable:
        """Prices of a member's ops; as much slower or faster than counted as the whole ops were measured to be."""
        return likened(self.table, local.graph, local.origin, cluster, self._factors())

    def _factors(self) -> dict[str, Array]:
        """How much slower or faster each whole op was measured than it was counted, by kind."""
        if not self.faster:
            self.faster = factors(self.table, self.cluster)
        return self.faster

    def _sizes(self, piece: Piece, blocks: Sequence[Block]) -> dict[str, float]:
        """Bytes a member holds of each parameter that these blocks, equal to the piece's, use."""
        theirs, mine = self._parameters(piece.blocks), self._parameters(tuple(blocks))
        held = piece.local.graph
        return {
            name: float(held.tensor(other).nbytes(max(held.batch, 1)))
            for name, other in zip(mine, theirs, strict=True)
        }  # fmt: skip

    def _parameters(self, blocks: tuple[Block, ...]) -> list[str]:
        """Parameters, buffers and constants in order of first use."""
        if blocks not in self.used:
            found: dict[str, None] = {}
            for op in self.graph.ops[blocks[0].start : blocks[-1].stop]:
                for name in op.uses():
                    base = self.graph.tensor(name).base or name
                    if self.graph.tensor(base).role in ("parameter", "buffer", "constant"):
                        found.setdefault(base)
            self.used[blocks] = list(found)
        return self.used[blocks]


def part_of(graph: Graph, ops: range) -> Graph:
    """These ops as a graph: what comes from before has no producer, what is used after is an output."""
    if len(ops) == len(graph.ops):
        return graph
    chosen = graph.ops[ops.start : ops.stop]
    made = {o for op in chosen for o in op.outputs if o}
    after = {name for op in graph.ops[ops.stop :] for name in op.uses()} | set(graph.outputs)
    names = dict.fromkeys(n for op in chosen for n in (*op.uses(), *op.writes, *filter(None, op.outputs)))
    for name in [*names]:
        base = graph.tensor(name).base
        if base:
            names.setdefault(base, None)
    outputs = tuple(o for o in made if o in after)
    return replace(graph, tensors=tuple(graph.tensor(n) for n in names), ops=chosen, outputs=tuple(sorted(outputs)))


def _joined(parts: Sequence[Times], kept: Array, batch: int) -> Times:
    """One block of what its units take. ``kept``: what enters it, whole, as all does that crosses a border."""
    forward, backward, weight, once, saved, whole_saved, owed, gone = (
        np.sum([getattr(part, name) for part in parts], axis=0)
        for name in ("forward", "backward", "weight", "whole", "saved", "whole_saved", "owed", "gone")
    )
    largest = max((part.transient for part in parts), key=lambda rows: float(rows[0, 0] + rows[0, 1] * batch))
    return Times(forward, backward, weight, once, saved, np.minimum(kept, saved), largest, whole_saved, owed, gone)


def _shared(times: Times, whole: Sequence[Array], floor: Sequence[Array], members: int) -> Times:
    forward, backward, weight, once = (f + (w - f) / members for w, f in zip(whole, floor, strict=True))
    return Times(
        forward, backward, weight, once, times.saved / members, times.kept / members, times.transient / members,
        times.whole_saved / members, times.owed / members, times.gone / members,
    )  # fmt: skip


def _empty(like: Times, pools: int) -> Times:
    n = like.forward.shape[1]
    rows, seconds = [np.zeros((pools, n, 2)) for _ in range(3)], np.zeros((pools, n))
    saved, kept, transient, owed, gone = (np.zeros((n, 2)) for _ in range(5))
    return Times(rows[0], rows[1], rows[2], seconds, saved, kept, transient, np.zeros(n), owed, gone)
