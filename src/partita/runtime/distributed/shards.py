"""Shards: the rows of each replicated parameter that this rank keeps or updates (ZeRO, Rajbhandari et al. 2020).

    zero 1   parameters and gradients whole on each replica; the optimizer sees, and keeps state for, a rank's rows only
    zero 2   a gradient is summed to whose rows they are, and the rest of it given back
    zero 3   of the parameters, too, only the rows are kept; they are gathered ahead of use and given back
    (``gathering``)

Rows are torch's chunks of dim 0, as in DTensor's ``Shard(0)``: ``pm.parameters()`` are DTensors over the replicas,
so that optimizers and ``clip_grad_norm_`` see one sharded model. With zero 1 and 2 the local part of a DTensor is a
view of the whole parameter's own memory; what the other ranks' optimizers changed is gathered before the next use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from partita.runtime.distributed.collective import Members
from partita.runtime.distributed.holding import Holding, absent
from partita.runtime.distributed.messages import Sent
from partita.runtime.distributed.world import World
from partita.runtime.layout import as_parameter
from partita.runtime.pieces import Piece
from partita.torch_compat import version

AXIS = "dp_shard"
Landing = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Sharded:
    """One parameter. ``rows``: of each rank, ``splits``: their elements; ``local``: this rank's; ``parameter``: the
    DTensor around it."""

    name: str
    whole: nn.Parameter
    rows: tuple[int, ...]
    start: int
    local: torch.Tensor
    parameter: nn.Parameter
    members: Members
    splits: tuple[int, ...]


class Shards:
    """The sharded parameters of this rank, by qualified name: of each, the rows of what it holds (``Holding.own``)."""

    def __init__(self, world: World, holding: Holding, level: int, sent: Sent) -> None:
        self.world, self.holding, self.level = world, holding, level
        self.of: dict[str, Sharded] = {}
        chosen: dict[str, tuple[int, ...]] = {}
        sets: set[tuple[int, ...]] = set()
        for name, boxes in holding.of.items():
            parameter = holding.parameters[name]
            if level and parameter.dim() and parameter.requires_grad:
                sets.update(s for s in boxes.sets if len(s) > 1)
                if len(boxes.of(world.rank)) > 1:
                    chosen[name] = boxes.of(world.rank)
        members: dict[tuple[int, ...], Members] = {}
        meshes: dict[tuple[int, ...], DeviceMesh] = {}
        for ranks in sorted(sets):
            group = world.group(ranks, "gather")
            if world.rank in ranks:
                members[ranks] = Members(world, ranks, sent, "gather")
                meshes[ranks] = DeviceMesh.from_group(
                    group, world.device.type, mesh=torch.tensor(ranks), mesh_dim_names=(AXIS,)
                )
        for name, ranks in chosen.items():
            self.of[name] = self._shard(name, members[ranks], meshes[ranks])
        self._seen, self._delivered = self._versions(), False

    def _shard(self, name: str, members: Members, mesh: DeviceMesh) -> Sharded:
        whole = self.holding.own[name]
        if not whole.is_contiguous():
            whole.data = whole.data.contiguous()
        rows = chunks(whole.shape[0], members.size)
        start = sum(rows[: members.position])
        local = whole.data.narrow(0, start, rows[members.position])
        if self.level == 3:
            local = local.clone()
        spread = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        parameter = nn.Parameter(spread)
        if self.level == 3:
            whole.data = absent(whole)
        width = torch.Size(spread.shape[1:]).numel()
        return Sharded(name, whole, rows, start, local, parameter, members, tuple(r * width for r in rows))

    def rows_of(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """Of a gradient of all that is held, what ``deliver`` takes."""
        entry = self.of[name]
        return grad if self.level == 1 else grad.narrow(0, entry.start, entry.rows[entry.members.position]).clone()

    def deliver(self, name: str, grad: torch.Tensor) -> None:
        """Add a gradient (all of it, or this rank's rows) to the shard's ``.grad``."""
        self._delivered = True
        entry = self.of[name]
        if self.level == 1:
            grad = grad.narrow(0, entry.start, entry.rows[entry.members.position]).clone()
        held = entry.parameter.grad
        if isinstance(held, DTensor):
            held.to_local().add_(grad)
            return
        whole = entry.whole
        entry.parameter.grad = DTensor.from_local(
            as_parameter(grad, entry.local),
            entry.parameter.device_mesh,  # type: ignore[attr-defined]
            [Shard(0)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    # -- what optimizers have changed ------------------------------------------------------------------------------

    def _versions(self) -> int:
        return sum(version(e.local) + version(e.parameter) for e in self.of.values())

    @property
    def changed(self) -> bool:
        """Whether this rank's rows may have been written to since the last ``refresh``: an optimizer that updates many
        tensors at once (``foreach``, ``fused``), or through ``.data``, moves no version counter on, so new gradients
        count as well."""
        return self.level in (1, 2) and (self._delivered or self._versions() != self._seen)

    def refresh(self) -> None:
        """Gather the rows that other ranks have changed into the whole parameters (zero 1 and 2). Collective."""
        with torch.no_grad():
            self.gather(self.of.values(), {n: e.whole.data for n, e in self.of.items()})
        self._seen, self._delivered = self._versions(), False

    def gather(self, entries: Iterable[Sharded], into: dict[str, torch.Tensor]) -> None:
        """All rows of each, from the ranks that have them: large ones where they belong, small ones packed."""
        for land in start_gathering(list(entries), into):
            land()

    def full(self, name: str) -> torch.Tensor:
        """All rows of one parameter, on the ranks that hold it. Collective among them."""
        entry = self.of[name]
        out = torch.empty(entry.whole.shape, dtype=entry.local.dtype, device=entry.local.device)
        entry.members.gather(out.view(-1), entry.local.contiguous().view(-1), entry.splits, name).land()
        return out

    # -- state -----------------------------------------------------------------------------------------------------

    def gradient(self, name: str) -> torch.Tensor | None:
        """A parameter's gradient whole, on the ranks that hold it. Collective among them."""
        entry = self.of[name]
        held = entry.parameter.grad
        if not isinstance(held, DTensor):
            return None
        out = torch.empty(entry.whole.shape, dtype=entry.local.dtype, device=entry.local.device)
        entry.members.gather(out.view(-1), held.to_local().reshape(-1), entry.splits, name).land()
        return out

    def load(self, name: str, value: torch.Tensor) -> None:
        """Take this rank's rows of a value for what it holds."""
        entry = self.of[name]
        with torch.no_grad():
            if self.level == 3:
                entry.local.copy_(value.narrow(0, entry.start, entry.rows[entry.members.position]))
            else:
                entry.whole.copy_(value)

    def piece(self, name: str) -> tuple[Piece, ...]:
        """This rank's rows; nothing where it has none."""
        entry = self.of[name]
        shape, count = tuple(entry.whole.shape), entry.rows[entry.members.position]
        if not count:
            return ()
        offsets = (entry.start, *(0,) * (len(shape) - 1))
        return (Piece(name, shape, offsets, (count, *shape[1:]), entry.local, 0, entry.parameter),)


SMALL_BYTES = 1 << 16


def start_gathering(entries: list[Sharded], into: dict[str, torch.Tensor]) -> list[Landing]:
    """Begin to gather these into the tensors given; each of what is returned, called, waits for its part."""
    landings: list[Landing] = []
    packs: dict[tuple[tuple[int, ...], torch.dtype], list[Sharded]] = {}
    for entry in entries:
        if entry.whole.numel() * entry.whole.element_size() >= SMALL_BYTES:
            out, own = into[entry.name].view(-1), entry.local.reshape(-1)
            landings.append(entry.members.gather(out, own, entry.splits, f"the rows of {entry.name}").land)
        else:
            packs.setdefault((entry.members.ranks, entry.local.dtype), []).append(entry)
    for pack in packs.values():
        landings.append(_gather_packed(pack, into))
    return landings


def _gather_packed(pack: list[Sharded], into: dict[str, torch.Tensor]) -> Landing:
    members = pack[0].members
    own = torch.cat([e.local.reshape(-1) for e in pack])
    splits = [sum(e.splits[r] for e in pack) for r in range(members.size)]
    out = own.new_empty(sum(splits))
    flight = members.gather(out, own, splits, f"the rows of {pack[0].name} and {len(pack) - 1} more")

    def land() -> None:
        flight.land()
        for part, rank in zip(out.split(splits), range(members.size), strict=True):  # type: ignore[no-untyped-call]
            begin = 0
            for entry in pack:
                count = entry.splits[rank]
                target = into[entry.name].narrow(0, sum(entry.rows[:rank]), entry.rows[rank])
                target.copy_(part[begin : begin + count].view(target.shape))
                begin += count

    return land


def chunks(length: int, parts: int) -> tuple[int, ...]:
    """Rows of each part, as ``torch.chunk`` and DTensor deal them out: the last ones may have fewer, or none."""
    each = -(-length // parts)
    return tuple(max(0, min(each, length - i * each)) for i in range(parts))
