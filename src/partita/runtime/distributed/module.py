"""RankModule: a ParallelModule of which this process holds and runs one device's part."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from partita.capture import Captured
from partita.cluster import Cluster
from partita.divide import divide
from partita.errors import PlanError, UsageError
from partita.lower import lower
from partita.plan import Plan
from partita.runtime.bind import Binder
from partita.runtime.distributed.boxes import Boxes, boxes
from partita.runtime.distributed.collective import spread_all
from partita.runtime.distributed.cutting import cut_pieces
from partita.runtime.distributed.engine import Distributed
from partita.runtime.distributed.holding import Holding, is_absent
from partita.runtime.distributed.memory import Held, held, measure_rank
from partita.runtime.distributed.messages import DTYPES, Sent, rank_of
from partita.runtime.distributed.optimizers import guard
from partita.runtime.distributed.shards import Shards
from partita.runtime.distributed.world import World
from partita.runtime.local import Local
from partita.runtime.module import ParallelModule
from partita.runtime.pieces import Piece, persistent, whole
from partita.runtime.team import Team
from partita.sharding.batch import layouts
from partita.sharding.placements import Shard


class RankModule(ParallelModule):
    """``pm(x)``, ``loss.backward()`` and ``pm.train_step`` as in one process, called alike on every rank.

    Every rank passes the same whole batch and gets the whole output. ``pm.parameters()`` are those this rank holds and
    must update. ``state_dict``, ``clip_grad_norm_``, ``gradients`` are collective: all ranks call them.
    """

    def __init__(
        self, module: nn.Module, plan: Plan, cluster: Cluster, *, world: World, captured: Captured | None = None,
        like: Holding | None = None, loss_fn: Callable[..., torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        if any(stage.offload.parameters for stage in plan.stages):
            raise PlanError(
                "offload of parameters is for devices of one process: a rank keeps what it holds on its device; "
                "take zero: 3, which divides parameters over replicas, or start one process for all devices"
            )
        super().__init__(module, plan, cluster, loss_fn=loss_fn)
        self.world = world
        self.sent = Sent()
        self.output_device = world.device
        self._nothing = (nn.Parameter(torch.empty(0, device=world.device)),)
        self.holding = Holding(world, module, self.sent)
        if like is not None:
            self.holding.settle(like.of, like.cuts)
        else:
            self.holding.settle(*_using(self.holding, plan, captured, world.size))
        for buffer in module.buffers():
            buffer.data = buffer.data.to(world.device)
        self.shards = Shards(world, self.holding, plan.zero, self.sent)
        self.holding.gathered = self._gathered
        self._binder = Binder(
            module, partial(_engine, plan, cluster, self._team, world, self.holding, self.shards, self.sent),
            around=self.holding.shaped,
        )  # fmt: skip
        world.watch.describe = partial(_role, plan)
        guard(self)

    # -- state ---------------------------------------------------------------------------------------------------------

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those this rank holds; where the plan gives it none, an empty one, as optimizers refuse an empty list."""
        yield from super().parameters(recurse)
        if not self.holding.own and self.holding.parameters:
            yield self._nothing[0]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those this rank holds; of sharded ones (ZeRO) a DTensor over the ranks that hold them."""
        seen = {n: self.shards.of[n].parameter if n in self.shards.of else p for n, p in self.holding.own.items()}
        held = {id(self.holding.parameters[n]): p for n, p in seen.items()}
        for name, parameter in self.module.named_parameters(*args, **kwargs):
            if id(parameter) in held:
                yield name, held[id(parameter)]

    def _gathered(self, name: str) -> torch.Tensor | None:
        return self.shards.full(name) if name in self.shards.of else None

    def whole_tensors(self, *, to: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer whole, one after the other, under its first name. Collective.

        ``to``: the one rank that gets them (the others get empty tensors); None: all.
        """
        for name, tensor in persistent(self.module):
            value = self.holding.broadcast(name) if name in self.holding.of else tensor.detach()
            yield name, value if to in (None, self.world.rank) else torch.empty(0)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Whole, under the user's model's own names, on every rank. Collective."""
        found = self.module.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        names = self._aliases()
        for name, value in self.whole_tensors():
            for key in names.get(name, ()):
                if prefix + key in found:
                    found[prefix + key] = value
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, from a whole state dict on every rank; each copies what it holds."""
        if assign:
            raise UsageError("load_state_dict(assign=True) would replace parameters that are divided; leave assign out")
        with self.holding.on_meta(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no-op.*")
            found = self.module.load_state_dict(state_dict, strict=strict)
        for name, parameter in self.holding.own.items():
            if not is_absent(self.holding.parameters[name]):
                continue
            value = state_dict[next(a for a in self._aliases()[name] if a in state_dict)]
            if name in self.holding.cuts:
                value = self.holding.rows_of(name, value)
            if name in self.shards.of:
                self.shards.load(name, value)
            else:
                parameter.detach().copy_(value)
        return found

    def _aliases(self) -> dict[str, list[str]]:
        """First name of a parameter -> all its names."""
        first = {id(p): n for n, p in self.module.named_parameters()}
        found: dict[str, list[str]] = {}
        for alias, parameter in self.module.named_parameters(remove_duplicate=False):
            found.setdefault(first[id(parameter)], []).append(alias)
        return found

    def pieces(self) -> tuple[Piece, ...]:
        found: list[Piece] = []
        for name, tensor in persistent(self.module):
            if name not in self.holding.of:
                found.append(whole(name, tensor, replica=self.world.rank))
            elif self.holding.holds(name):
                found += self._boxes(name)
        return tuple(found)

    def _boxes(self, name: str) -> list[Piece]:
        """This rank's part of a parameter: rows of ZeRO, of a divided op, or both, one piece a run of rows."""
        holding, shape = self.holding, tuple(self.holding.parameters[name].shape)
        own, parameter, replica = holding.own[name].detach(), holding.own[name], 0
        start, count = 0, shape[0] if shape else 0
        if name in self.shards.of:
            entry = self.shards.of[name]
            own, parameter = entry.local, entry.parameter
            start, count = entry.start, entry.rows[entry.members.position]
        else:
            replica = holding.of[name].of(self.world.rank).index(self.world.rank)
        if name not in holding.cuts:
            sizes = (count, *shape[1:]) if shape else ()
            offsets = (start, *(0,) * (len(shape) - 1)) if shape else ()
            return [Piece(name, shape, offsets, sizes, own, replica, parameter)] if count or not shape else []
        return cut_pieces(name, shape, holding, own, (start, count), replica, parameter)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every parameter's gradient whole, by name, on every rank; those that have none are left out. Collective."""
        mine: dict[str, torch.Tensor] = {}
        for name in filter(self.holding.holds, self.holding.parameters):
            grad = self.shards.gradient(name) if name in self.shards.of else self.holding.own[name].grad
            if grad is not None:
                mine[name] = self.holding.whole(name, grad)
        first = {n: self.holding.first(n) for n in self.holding.parameters}
        there = torch.tensor(
            [1 + DTYPES.index(mine[n].dtype) if r == self.world.rank and n in mine else 0 for n, r in first.items()]
        )
        with self.world.watch.waiting("which parameters have gradients"):
            dist.all_reduce(there, group=self.world.control)
        kinds = {name: DTYPES[kind - 1] for name, kind in zip(first, there.tolist(), strict=True) if kind}
        shapes = {name: self.holding.parameters[name].shape for name in kinds}
        return spread_all(self.world, mine, {n: first[n] for n in kinds}, shapes, kinds, "the gradient")

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over the parameters of all ranks (that function itself would see only
        this rank's). Returns the norm. Collective."""
        shards = [e.parameter.grad.to_local() for e in self.shards.of.values() if e.parameter.grad is not None]  # type: ignore[attr-defined]
        plain = {
            n: p.grad for n, p in self.holding.own.items() if p.grad is not None and n not in self.shards.of
        }  # fmt: skip
        counted = [
            e.parameter.grad.to_local()  # type: ignore[attr-defined]
            for n, e in self.shards.of.items()
            if e.parameter.grad is not None and self._speaks(n)
        ]
        own = [*counted, *(g for n, g in plain.items() if self._speaks(n) and self._first_of_set(n))]
        norms = [torch.linalg.vector_norm(g, norm_type).to(torch.float64) for g in own if g.numel()]
        local = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64, device=self.world.device)
        endless = norm_type == float("inf")
        total = local.max() if endless else (local**norm_type).sum()
        with self.world.watch.waiting("the gradients' norm"):
            dist.all_reduce(total, dist.ReduceOp.MAX if endless else dist.ReduceOp.SUM, group=self.world.whole)
        norm = total if endless else total ** (1.0 / norm_type)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for grad in (*shards, *plain.values()):
            grad.mul_(scale.to(grad.dtype))
        return norm.to(torch.float32)

    def _speaks(self, name: str) -> bool:
        """Whether what this rank holds counts: of a parameter that all members of a group have alike, the first set."""
        sets = self.holding.of[name].sets
        return name in self.holding.cuts or self.world.rank in sets[0]

    def _first_of_set(self, name: str) -> bool:
        return self.holding.of[name].of(self.world.rank)[0] == self.world.rank

    def held(self, optimizer: torch.optim.Optimizer | None = None) -> Held:
        """Bytes of this rank's parameters, gradients and optimizer state now."""
        return held(self, optimizer)

    def _peaks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> dict[str, int]:
        return measure_rank(self, args, kwargs, optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> RankModule:
        if self.shards.level:
            raise UsageError("a model sharded by ZeRO cannot be copied; copy the undivided model and divide the copy")
        return RankModule(
            copy.deepcopy(self.module, memo), self.plan, self.cluster, world=self.world, like=self.holding,
            loss_fn=self.loss_fn,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        raise UsageError("a module divided over processes cannot be pickled; save its state_dict()")


def _using(
    holding: Holding, plan: Plan, captured: Captured | None, size: int
) -> tuple[dict[str, Boxes], dict[str, Shard]]:
    """Qualified name -> which ranks use which part in the captured call, and how it is cut; every rank uses all
    where the model runs live."""
    if captured is None or captured.live:
        return dict.fromkeys(holding.parameters, Boxes((tuple(range(size)),))), {}
    graph = captured.graph
    found = layouts(graph, batch_norm=plan.batch_norm)
    division = divide(graph, found, plan, batch=graph.batch)
    program = lower(graph, found, plan, batch=graph.batch, division=division)
    path = {t.name: t.path for t in graph.of_role("parameter")}
    cuts = division.members[0].shards if division is not None else {}
    using = boxes(program, path, size, division)
    return {path[n]: b for n, b in using.items()}, {path[n]: c for n, c in cuts.items() if n in path}


def _engine(
    plan: Plan,
    cluster: Cluster,
    team: Team,
    world: World,
    holding: Holding,
    shards: Shards,
    sent: Sent,
    captured: Captured,
) -> Local:
    found = layouts(captured.graph, batch_norm=plan.batch_norm)
    return Distributed(captured, found, plan, cluster, team, world, holding, shards, sent)


def _role(plan: Plan, rank: int) -> str:
    """``stage 1: blocks.2 to head``"""
    words = []
    for index, stage in enumerate(plan.stages):
        if rank in {rank_of(d) for d in stage.devices}:
            names = (*stage.modules, *stage.ops)
            span = f": {names[0]} to {names[-1]}" if len(names) > 1 else f": {names[0]}" if names and names[0] else ""
            words.append(f"stage {index}{span}")
    return ", ".join(words)
