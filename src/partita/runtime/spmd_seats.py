"""Seats: what each member of a group runs, holds and sends, where a plan divides single ops.

    group (a, b)   a: rank 0, the leader, whose list both walk      a ── rows 0..1 of w ── all_reduce ──┐
                   b: rank 1                                        b ── rows 2..3 of w ── all_reduce ──┘

What crosses between stages is whole and equal on all members, so member i simply talks to member i of the other group
(modulo the sender's size), and the leader alone hands results to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from partita.divide import Division
from partita.graph import Graph
from partita.program import Program
from partita.runtime.codegen import SegmentCode
from partita.runtime.collectives import Group
from partita.runtime.spmd_ops import own_rows, put_rows
from partita.sharding.placements import Shard


@dataclass(frozen=True)
class Seat:
    """One member's place. ``codes``: of its own local graph. ``shards``: parameters of which it holds rows."""

    leader: str
    rank: int
    size: int
    group: Group | None
    graph: Graph
    codes: tuple[SegmentCode, ...]
    shards: Mapping[str, Shard]

    def rows(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """What this member holds of a parameter: a view where its rows lie together. (Rows already taken stay.)"""
        shard = self.shards.get(name)
        if shard is None or tuple(parameter.shape) == self.graph.tensor(name).shape:
            return parameter
        return own_rows(parameter, shard.dim, shard.cut.rounds, self.rank)


def receivers(program: Program, size: int, rank: int, peer: str) -> tuple[str, ...]:
    """The members of the peer's group that member ``rank`` of a group of ``size`` sends to; one that is alone sends to
    all of them."""
    return tuple(d for i, d in enumerate(program.members(peer)) if i % size == rank)


def places(program: Program) -> dict[str, tuple[str, int, int]]:
    """Device -> (its leader, its rank, its group's size), for every device of a program."""
    found = {d: (d, 0, 1) for d in program.devices}
    for leader, members in program.groups:
        if leader in found:
            found.update({d: (leader, i, len(members)) for i, d in enumerate(members)})
    return found


def whole_gradients(
    division: Division,
    program: Program,
    found: Mapping[str, list[tuple[str, torch.Tensor]]],
    parameters: Mapping[str, torch.Tensor],
) -> dict[str, list[torch.Tensor]]:
    """Of each parameter the gradients that are to be added up. ``found``: (device, its leaf's gradient), .... Rows are
    put in place, and what every member has alike is taken once."""
    where = places(program)
    result: dict[str, list[torch.Tensor]] = {}
    for name, grads in found.items():
        shard = division.members[0].shards.get(name)
        if shard is None:
            keep = [g for d, g in grads if name in division.members[0].partial or where[d][1] == 0]
            result[name] = keep
            continue
        parameter = parameters[name]
        groups: dict[str, torch.Tensor] = {}
        for device, grad in grads:
            leader, rank, _ = where[device]
            if leader not in groups:
                groups[leader] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            with torch.no_grad():
                put_rows(groups[leader], grad.to(parameter.device), shard.dim, shard.cut.rounds, rank)
        result[name] = list(groups.values())
    return result
