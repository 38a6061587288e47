"""Sharing: what a rank exchanges with others around one Program, worked out once: messages, sums, norms, loans.

A parameter that a Program uses elsewhere than it is held, or cut in another way, is lent for that Program
(``borrowed``), and its gradient turned back into what is held (``converted``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.capture import Captured
from partita.cluster import Cluster
from partita.cost.communication import large_bytes, ring
from partita.divide import Division
from partita.graph import Graph
from partita.program import Instruction, Program
from partita.runtime.distributed import results
from partita.runtime.distributed.boxes import Boxes, boxes
from partita.runtime.distributed.collective import Members, RankGroup
from partita.runtime.distributed.gathering import Units, units
from partita.runtime.distributed.holding import Holding
from partita.runtime.distributed.messages import Sent, Traffic, rank_of, traffic
from partita.runtime.distributed.norm import GroupMeeting
from partita.runtime.distributed.reduce import Sums, sums
from partita.runtime.distributed.shards import Shards
from partita.runtime.distributed.world import World
from partita.runtime.local import Lowered
from partita.runtime.spmd_seats import Seat, places


@dataclass(frozen=True)
class Shares:
    """What this rank exchanges with others around one Program, worked out once.

    ``changed``: rank -> the buffers it changes for all. ``drawer``: the rank that draws random numbers last during the
    step, -1 where none does; ``draws``: whether any are drawn. ``uses``: this rank's parameters, by graph name.
    ``borrowed``: parameters that some rank uses and does not hold, and whether this is such a rank. ``units``: what is
    gathered together (ZeRO 3); ``converted``: parameters that this program cuts in another way than they are held;
    ``streams``: as it is used, which needs one microbatch a replica, so that all replicas ask in the same order.
    """

    instructions: tuple[Instruction, ...]
    seat: Seat | None
    leader: str
    group: tuple[str, ...]
    traffic: Traffic
    sums: Sums
    norms: GroupMeeting | None
    changed: dict[int, tuple[results.Changed, ...]]
    drawer: int
    draws: bool
    uses: frozenset[str]
    borrowed: tuple[tuple[str, bool], ...]
    units: Units
    streams: bool
    converted: tuple[str, ...]


class Sharing:
    """Works out the Shares of one captured model's Programs on this rank."""

    def __init__(
        self, world: World, cluster: Cluster, captured: Captured, fqn: Mapping[str, str], holding: Holding,
        shards: Shards, sent: Sent,
    ) -> None:  # fmt: skip
        self.world, self.cluster, self.captured, self.fqn = world, cluster, captured, fqn
        self.holding, self.shards, self.sent = holding, shards, sent

    def units(self, program: Program, graph: Graph) -> Units:
        leader = places(program).get(self.world.name, ("", 0, 1))[0]
        used = {use.tensor for s in program.segments for use in s.uses}
        mine = [i for i, s in enumerate(program.segments) if s.phase != "once" and leader in program.placement[i]]
        sharded = frozenset(
            n
            for n, fqn in self.fqn.items()
            if fqn in self.shards.of
            and n in used
            and tuple(graph.tensor(n).shape_at(0)) == tuple(self.shards.of[fqn].whole.shape)
        )
        return units(graph, program, mine, sharded)

    def of(self, program: Program, lowered: Lowered) -> Shares:
        """All ranks call it alike; process groups that will be needed are made here."""
        world, division = self.world, lowered.division
        leader, position, size = places(program).get(world.name, (world.name, 0, 1))
        graph = division.members[position].graph if division is not None else self.captured.graph
        found = boxes(program, self.fqn, world.size, division)
        wants = {t.name for t in self.captured.graph.of_role("parameter") if t.needs_grad}
        together: dict[str, tuple[int, ...]] = {}
        for name in sorted(found):
            sets = found[name].sets
            if found[name].ranks != self.holding.of[self.fqn[name]].ranks:  # another call's stages use it: sum over all
                sets = (tuple(sorted({*found[name].ranks, *self.holding.of[self.fqn[name]].ranks})),)
            for ranks in sets:
                world.group(ranks, "sum")
            if name in wants:
                together[name] = next((ranks for ranks in sets if world.rank in ranks), ())
        silent = frozenset(n for n, b in found.items() if world.rank in b.silent)
        groups = {where: tuple(map(rank_of, program.members(where))) for where in program.devices}
        for ranks in groups.values():
            world.group(ranks, "tensor")
        mine = RankGroup(Members(world, groups[leader], self.sent, "tensor")) if size > 1 else None
        instructions = dict(program.instructions).get(leader, ())
        drawing = [
            rank_of(program.placement[i][-1])
            for op in self.captured.graph.ops if op.random
            for i, s in enumerate(program.segments) if s.phase != "once" and op.name in s.ops
        ]  # fmt: skip
        scattered = self._scattered(found, division)
        norms = self._norms(program, position) if program.synchronised else None
        once = {use.tensor for s in program.segments if s.phase == "once" for use in s.uses}
        sharded_once = once & set(found) if self.shards.level == 3 else set()  # nobody holds all of these
        borrowed = [
            (name, name in sharded_once or world.rank in b.ranks and not self._has(name, division))
            for name, b in found.items() if name in sharded_once or self._lacking(name, b, division)
        ]  # fmt: skip
        seat = None
        if size > 1 and division is not None:
            codes, shards = lowered.members[position], division.members[position].shards
            seat = Seat(leader, position, size, mine, graph, codes, shards)
        return Shares(
            instructions,
            seat,
            leader,
            program.members(leader),
            traffic(self.captured.graph, program, world.rank),
            sums(self.captured.graph, program, instructions, together, scattered, silent, world.rank, self._large),
            norms,
            results.changed_buffers(division.graph if division is not None else graph, program, world.size),
            drawing[-1] if drawing and len(set(drawing)) else -1,
            any(op.random for op in self.captured.graph.ops),
            frozenset(n for n, b in found.items() if world.rank in b.ranks),
            tuple(borrowed),
            self.units(program, graph) if self.shards.level == 3 else Units((), {}),
            all(len(places) == len(set(places)) for places in program.placement),
            tuple(
                sorted(
                    n
                    for n in wants & set(found)
                    if self._cut(n, division) != self.holding.cuts_of(self.fqn[n])
                    or (self.fqn[n] in self.shards.of and n not in scattered)
                )
            ),
        )

    def _large(self, ranks: tuple[int, ...], total: int) -> int:
        """From how many bytes on a gradient, of so many of them in all, goes alone over these ranks."""
        return large_bytes(ring(self.cluster, tuple(f"{self.world.device.type}:{r}" for r in ranks)), total)

    def _norms(self, program: Program, position: int) -> GroupMeeting:
        """Where this rank's batch norms meet: the members of its position in each replica's group."""
        found = {}
        for segment, where in zip(program.segments, program.placement, strict=True):
            if segment.phase != "split" or len(where) < 2:
                continue
            groups = [program.members(place) for place in where]
            for i in range(max(map(len, groups))):
                ranks = tuple(rank_of(g[min(i, len(g) - 1)]) for g in groups)
                group = self.world.group(ranks, "norm")
                if i == min(position, max(map(len, groups)) - 1):
                    found.update(dict.fromkeys(segment.ops, (ranks, group)))
        return GroupMeeting(self.world, found)

    def _cut(self, name: str, division: Division | None) -> object:
        return division.members[0].shards.get(name) if division is not None else None

    def _lacking(self, name: str, found: Boxes, division: Division | None) -> bool:
        """Whether some rank uses another part of a parameter than it holds."""
        held = self.holding.of[self.fqn[name]]
        return not set(found.ranks) <= set(held.ranks) or self._cut(name, division) != self.holding.cuts_of(
            self.fqn[name]
        )

    def _has(self, name: str, division: Division | None) -> bool:
        fqn = self.fqn[name]
        return self.holding.holds(fqn) and self._cut(name, division) == self.holding.cuts_of(fqn)

    def _scattered(self, found: Mapping[str, Boxes], division: Division | None) -> frozenset[str]:
        """Parameters of whose gradients each rank gets its rows only."""
        return frozenset(
            n
            for n, fqn in self.fqn.items()
            if self.shards.level > 1
            and fqn in self.shards.of
            and n in found
            and found[n].sets == self.holding.of[fqn].sets
            and self._cut(n, division) == self.holding.cuts_of(fqn)
        )
