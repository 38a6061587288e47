"""Holding: which ranks hold which parts of which parameters; what a rank does not hold takes no memory there.

The parameters a stage uses are held by the ranks of the stage (of one whose op is divided, each member holds its rows);
those that no stage uses, by rank 0. The model's own parameter keeps its object, shape and dtype, and where it is not
held whole its values become one NaN seen through strides of zero: reading it gives NaN, writing it raises. A call that
needs a parameter elsewhere (another branch of the model, say) borrows it for that call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn

from partita.runtime.distributed.boxes import Boxes
from partita.runtime.distributed.collective import Members
from partita.runtime.distributed.messages import Sent
from partita.runtime.distributed.world import World
from partita.runtime.spmd_ops import own_rows, put_rows
from partita.sharding.placements import Shard


class Holding:
    """``of``: qualified name -> who has which part. ``own``: the parameters that this rank's optimizer must see: the
    model's, or this rank's rows of one. ``cuts``: how the rows are taken, where a divided op takes rows.
    """

    def __init__(self, world: World, module: nn.Module, sent: Sent) -> None:
        self.world, self.module, self.sent = world, module, sent
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.of: dict[str, Boxes] = {}
        self.cuts: dict[str, Shard] = {}
        self.own: dict[str, nn.Parameter] = {}
        self._members: dict[tuple[int, ...], Members] = {}
        self.gathered: Callable[[str], torch.Tensor | None] = lambda name: None

    def settle(self, using: Mapping[str, Boxes], cuts: Mapping[str, Shard]) -> None:
        """Fix who holds what, and give back the memory of the rest. All ranks call it alike."""
        for name, parameter in self.parameters.items():
            found = self.of[name] = using.get(name, Boxes(((0,),)))
            for group in found.groups:
                self.world.group(group, "rows")
            if name in cuts and found.groups:
                self.cuts[name] = cuts[name]
            if not self.holds(name):
                parameter.grad = None
                parameter.data = absent(parameter)
                continue
            if parameter.device != self.world.device:
                parameter.data = parameter.data.to(self.world.device)
            self.own[name] = parameter
            if name in self.cuts:
                rows = self.rows_of(name, parameter.detach()).clone()
                self.own[name] = nn.Parameter(rows, parameter.requires_grad)
                parameter.data = absent(parameter)

    def cuts_of(self, name: str) -> Shard | None:
        """How a parameter is cut, where it is."""
        return self.cuts.get(name)

    def holds(self, name: str) -> bool:
        return bool(self.of[name].of(self.world.rank))

    def first(self, name: str) -> int:
        """The rank that speaks for a parameter."""
        return self.of[name].ranks[0]

    def group(self, name: str) -> tuple[int, ...]:
        """The members among which this rank's rows lie."""
        return next(g for g in self.of[name].groups if self.world.rank in g)

    def rows_of(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole tensor of a cut parameter's shape."""
        cut = self.cuts[name]
        return own_rows(whole, cut.dim, cut.cut.rounds, self.group(name).index(self.world.rank))

    @contextlib.contextmanager
    def shaped(self) -> Iterator[None]:
        """While open, parameters not held whole are zeros of their size in memory nobody has touched, for tracing."""
        away = [p for n, p in self.parameters.items() if is_absent(p) or not self.holds(n)]
        for parameter in away:
            parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype)
        try:
            yield
        finally:
            for parameter in away:
                parameter.data = absent(parameter)

    @contextlib.contextmanager
    def on_meta(self) -> Iterator[None]:
        """While open, stand-ins without memory are in the places of parameters not held whole: loading passes over
        their values, and still checks names and shapes."""
        away = {id(p): p for n, p in self.parameters.items() if is_absent(p) or not self.holds(n)}
        stand_ins = {key: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for key, p in away.items()}
        moved: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        for owner in self.module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) in stand_ins:
                    moved.append((owner._parameters, key, parameter))
        for registry, key, parameter in moved:
            registry[key] = stand_ins[id(parameter)]
        try:
            yield
        finally:
            for registry, key, parameter in moved:
                registry[key] = parameter

    # -- whole tensors -------------------------------------------------------------------------------------------------

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """All of a tensor of this parameter's shape (its values, its gradient) of the parts its holders have.
        Collective among the members where it is cut."""
        return self.assembled(name, part, self.cuts[name], self.group(name)) if name in self.cuts else part

    def assembled(self, name: str, part: torch.Tensor, cut: Shard, group: tuple[int, ...]) -> torch.Tensor:
        """The whole, of the rows that the members of a group have. Collective among them."""
        shape = self.parameters[name].shape
        if group not in self._members:
            self._members[group] = Members(self.world, group, self.sent, "rows")
        members = self._members[group]
        each = [sum(r[i] for r in cut.cut.rounds) for i in range(len(group))]
        width = shape.numel() // sum(each)
        splits = [n * width for n in each]
        out = part.new_empty(shape.numel())
        members.gather(out, part.contiguous().view(-1), splits, name).land()
        whole = part.new_empty(shape)
        for i, mine in enumerate(out.split(splits)):  # type: ignore[no-untyped-call]
            put_rows(
                whole, mine.view(*self._part_shape(shape, cut.dim, each[i], sum(each))), cut.dim, cut.cut.rounds, i
            )
        return whole

    def _part_shape(self, shape: torch.Size, dim: int, rows: int, total: int) -> tuple[int, ...]:
        return (*shape[:dim], shape[dim] // total * rows, *shape[dim + 1 :])

    def value(self, name: str) -> torch.Tensor:
        """All of a parameter that this rank holds a part of. Collective among its holders where it is in parts."""
        sharded = self.gathered(name)
        return self.whole(name, sharded if sharded is not None else self.own[name].detach().contiguous())

    def broadcast(self, name: str) -> torch.Tensor:
        """A parameter's values on every rank. Collective."""
        owner, parameter = self.first(name), self.parameters[name]
        if self.holds(name):
            value = self.value(name)
        else:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.world.device)
        if len(self.of[name].ranks) < self.world.size:
            with self.world.watch.waiting(f"{name} of rank {owner}"):
                dist.broadcast(value, src=owner, group=self.world.whole)
        return value


def absent(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape that holds one value, and that one no number."""
    return torch.full((), float("nan") if tensor.is_floating_point() else 0, dtype=tensor.dtype).expand(tensor.shape)


def is_absent(tensor: torch.Tensor) -> bool:
    """Of a scalar, which has no strides, it cannot be told; its holding knows."""
    return tensor.dim() > 0 and tensor.numel() > 0 and not any(tensor.stride())


def same_everywhere(world: World, module: nn.Module) -> str:
    """Give every rank rank 0's parameters and buffers, as DistributedDataParallel does. Returns a note where they
    differed, else ''. Only what differs is sent. Collective."""
    tensors: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    mine = {name: checksum(t) for name, t in tensors.items()}
    every = world.gather(mine, "checksums of the parameters")
    differ = [name for name in mine if any(other.get(name) != every[0].get(name) for other in every)]
    with torch.no_grad(), world.watch.waiting("rank 0's parameters"):
        for name in differ:
            value = tensors[name].detach().to(world.device).contiguous()
            dist.broadcast(value, src=0, group=world.whole)
            tensors[name].detach().copy_(value)
    if not differ:
        return ""
    return (
        f"{len(differ)} of {len(mine)} parameters and buffers differed between ranks ({differ[0]}, ...), as where each "
        "rank has its own seed; all now have rank 0's"
    )


def checksum(tensor: torch.Tensor) -> tuple[float, int]:
    """A sum over all values and a hash of some."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return 0.0, 0
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    some = flat[:: max(1, flat.numel() // 256)][:512].to("cpu", torch.float64)
    return float(torch.nan_to_num(flat).sum(dtype=torch.float64)), crc32(some.numpy().tobytes())
