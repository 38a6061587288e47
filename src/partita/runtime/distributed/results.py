"""What a step leaves behind on every rank: the model's outputs, the inputs' gradients, buffers that it changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast
from zlib import crc32

import torch
import torch.distributed as dist

from partita.errors import UsageError
from partita.graph import Graph, Ref
from partita.program import Fixed, Partial, Program, Split
from partita.runtime.distributed.collective import spread
from partita.runtime.distributed.messages import rank_of
from partita.runtime.distributed.world import World
from partita.runtime.progress import StepState
from partita.runtime.spmd_ops import Rounds, own_rows, put_rows

SAMPLE = 1 << 14


def owners(program: Program, name: str) -> tuple[tuple[int, int], ...]:
    """(microbatch, rank) of each part of a result, in order; empty where every rank has it."""
    index = next(i for i, s in enumerate(program.segments) if name in s.outputs)
    segment, places = program.segments[index], program.placement[index]
    if segment.phase == "once":
        return ()
    if segment.phase == "whole":
        return ((-1, rank_of(places[0])),)
    parts = tuple((m, rank_of(place)) for m, place in enumerate(places))
    return parts[:1] if isinstance(dict(program.layouts).get(name), Fixed) else parts


def gather(world: World, state: StepState, name: str) -> torch.Tensor:
    """One output of the model, of all microbatches, on every rank."""
    program = state.program
    where = owners(program, name)
    if not where:
        return state.results[name, -1]
    layout = dict(program.layouts).get(name)
    if isinstance(layout, Partial) and len(where) > 1:
        return _summed(world, state, name, where)
    parts: dict[int, torch.Tensor] = {}
    for owner in dict.fromkeys(rank for _, rank in where):
        mine = [m for m, rank in where if rank == owner]
        own = [state.results[name, m] for m in mine] if owner == world.rank else []
        dim = layout.dim if isinstance(layout, Split) else 0
        value = torch.cat(own, dim) if len(own) > 1 else own[0] if own else None
        meta = state.graph.tensor(name)
        if meta.shape_at(state.batch) == () and len(mine) == 1:  # a loss: nothing about it need be said first
            parts[mine[0]] = _number(world, value, owner, getattr(torch, meta.dtype), name)
            continue
        value = spread(world, value, owner, f"the output {name}")
        if len(mine) == 1:
            parts[mine[0]] = value
            continue
        assert isinstance(layout, Split), "one part, or rows"
        start = 0
        for m in mine:
            rows = program.sizes[m] * layout.factor
            parts[m] = value.narrow(dim, start, rows)
            start += rows
    ordered = [parts[m] for m, _ in where]
    if len(ordered) == 1:
        return ordered[0]
    assert isinstance(layout, Split)
    return torch.cat(ordered, layout.dim)


def _number(world: World, value: torch.Tensor | None, owner: int, kind: torch.dtype, name: str) -> torch.Tensor:
    """One rank's scalar on every rank."""
    found = torch.empty((), dtype=kind, device=world.device) if value is None else value.to(kind)
    with world.watch.waiting(f"the output {name}"):
        dist.broadcast(found, src=owner, group=world.whole)
    return found


def _summed(world: World, state: StepState, name: str, where: tuple[tuple[int, int], ...]) -> torch.Tensor:
    own = [state.results[name, m] for m, rank in where if rank == world.rank]
    meta = state.graph.tensor(name)
    kind: torch.dtype = getattr(torch, meta.dtype)
    if own:
        total = torch.stack(own).sum(0).to(kind)
    else:
        total = torch.zeros(meta.shape_at(state.batch), dtype=kind, device=world.device)
    with world.watch.waiting(f"the output {name}"):
        dist.all_reduce(total, group=world.whole)
    return total


def input_gradients(world: World, state: StepState) -> None:
    """The gradients of the model's inputs, summed over the ranks that used them."""
    for name in sorted(n for n, t in state.given.items() if t.requires_grad):
        own = state.input_grads.get(name)
        flag = torch.tensor([float(own is not None)])
        total = torch.zeros_like(state.given[name]) if own is None else own.contiguous()
        with world.watch.waiting(f"the gradient of the input {name}"):
            dist.all_reduce(flag, group=world.control)
            if flag.item():
                dist.all_reduce(total, group=world.whole)
                state.input_grads[name] = total


@dataclass(frozen=True, slots=True)
class Changed:
    """A buffer that a rank changes in place for all; of one changed by a divided op, the rows of this member."""

    name: str
    cut: Rounds | None = None
    dim: int = 0
    position: int = 0

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.cut is None else own_rows(whole, self.dim, self.cut, self.position)

    def put(self, whole: torch.Tensor, rows: torch.Tensor) -> None:
        if self.cut is None:
            whole.copy_(rows)
        else:
            put_rows(whole, rows, self.dim, self.cut, self.position)


def changed_buffers(graph: Graph, program: Program, size: int) -> dict[int, tuple[Changed, ...]]:
    """Rank -> the buffers that its forward changes in place (of replicas: the first's; of members that each change
    their rows: every member's), but for those that all of ``size`` ranks change alike. ``graph``: the leaders'."""
    found: dict[int, dict[Changed, None]] = {}
    ops = {op.name: op for op in graph.ops}  # of the local graph, where ops are divided
    taken = {op.outputs[0]: op.args for op in graph.ops if op.target == "partita.take"}
    for segment, places in zip(program.segments, program.placement, strict=True):
        if segment.phase == "once" or program.synchronised and segment.phase == "split" and len(set(places)) == size:
            continue
        for op in map(ops.__getitem__, segment.ops):
            for name in (n for n in op.writes if graph.tensor(n).role == "buffer"):
                rows = next((taken[use] for use in op.uses() if use in taken and taken[use][0] == Ref(name)), None)
                if rows is None:
                    found.setdefault(rank_of(places[0]), {})[Changed(name)] = None
                    continue
                dim, rounds = cast("tuple[int, Rounds]", rows[1:])
                for position, member in enumerate(program.members(places[0])):
                    found.setdefault(rank_of(member), {})[Changed(name, rounds, dim, position)] = None
    return {rank: tuple(names) for rank, names in sorted(found.items())}


def share_buffers(world: World, state: StepState, changed: dict[int, tuple[Changed, ...]]) -> None:
    """Send each changed buffer from the rank that changed it; one message a rank and dtype."""
    for rank, names in changed.items():
        kinds: dict[torch.dtype, list[Changed]] = {}
        for each in names:
            kinds.setdefault(state.given[each.name].dtype, []).append(each)
        for buffers in kinds.values():
            # Past the version counters: a batch norm that ran here too keeps its averages for backward, unread.
            wholes = [state.given[each.name].data for each in buffers]
            parts = [each.rows(whole) for each, whole in zip(buffers, wholes, strict=True)]
            flat = torch.cat([p.reshape(-1).to(world.device) for p in parts])
            with world.watch.waiting(f"buffers of rank {rank}"):
                dist.broadcast(flat.view(torch.uint8), src=rank, group=world.whole)
            if rank == world.rank:
                continue
            arrived: tuple[torch.Tensor, ...] = flat.split([p.numel() for p in parts])  # type: ignore[no-untyped-call]
            for each, whole, part, values in zip(buffers, wholes, parts, arrived, strict=True):
                each.put(whole, values.view(part.shape))


class Agreement:
    """That every rank was given the same batch (and would draw the same random numbers): asked for when a call begins,
    looked at when it ends."""

    def __init__(self, world: World, given: dict[str, torch.Tensor], *, draws: bool, changed: bool = False) -> None:
        self.world = world
        inputs = sum(_sample(t) * (i + 1) for i, t in enumerate(given.values())) % (1 << 61)
        state = crc32(torch.get_rng_state().numpy().tobytes()) if draws else 0
        self.mine = torch.tensor([inputs, state, int(changed)])
        self.every = [torch.empty_like(self.mine) for _ in range(world.size)]
        self.work = dist.all_gather(self.every, self.mine, group=world.control, async_op=True)

    def anything_changed(self) -> bool:
        """Whether any rank has changed its rows of a sharded parameter."""
        with self.world.watch.waiting("what the other ranks have changed"):
            self.work.wait()
        return any(bool(other[2]) for other in self.every)

    def check(self) -> None:
        with self.world.watch.waiting("what the other ranks were given"):
            self.work.wait()
        for rank, other in enumerate(self.every):
            if other[0] != self.every[0][0]:
                raise UsageError(
                    f"rank {rank} was given another batch than rank 0. Every rank calls the model with the same whole "
                    "batch, which is divided here: take a DistributedSampler out, and seed the data's shuffling alike"
                )
            if other[1] != self.every[0][1]:
                raise UsageError(
                    f"rank {rank}'s random generator is in another state than rank 0's, and this model draws random "
                    "numbers: seed all ranks alike (torch.manual_seed), and draw the same on each"
                )


def _sample(tensor: torch.Tensor) -> int:
    """A hash of a tensor's shape and of some of its values."""
    if tensor.numel() == 0:
        return 1
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    flat = flat[:: max(1, flat.numel() * size // SAMPLE)].cpu().contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    elif flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    return crc32(flat.numpy().tobytes()) ^ crc32(repr((tuple(tensor.shape), tensor.dtype)).encode())
