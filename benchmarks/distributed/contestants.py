"""Who runs a training step on two ranks: each contestant builds its model from the same weights and steps when told.

A step is zero_grad, forward, loss, backward; gradients stay where an optimizer of that contestant would find them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import partita
from benchmarks.distributed.megatron import divided
from benchmarks.models import GPT, Block, ViT, Workload, cross_entropy
from partita.plan import Batch, Plan, Stage


@dataclass
class Ready:
    """``step`` returns the loss where this rank knows it, else None. ``note``: settings; ``chosen``: those that were
    the best of several. ``sent``: partita's counter."""

    step: Callable[[], float | None]
    note: str = ""
    sent: Any = None
    close: Callable[[], None] = lambda: None
    chosen: str = ""


def devices() -> tuple[str, ...]:
    return tuple(f"cpu:{r}" for r in range(dist.get_world_size()))


def _partita(work: Workload, plan: Plan, note: str) -> Ready:
    model, x, target = work.build()
    pm = partita.parallelize(model, (x,), plan=plan, loss_fn=cross_entropy, profile=False)

    def step() -> float:
        pm.zero_grad(set_to_none=True)
        return pm.train_step(x, target).item()

    return Ready(step, note, pm.sent, pm.close)


def partita_dp(work: Workload) -> Ready:
    size = len(devices())
    return _partita(work, Plan((Stage(devices(), ("",)),), batch=Batch(work.batch, size)), "one microbatch a rank")


def partita_zero3(work: Workload) -> Ready:
    size = len(devices())
    return _partita(work, Plan((Stage(devices(), ("",)),), batch=Batch(work.batch, size), zero=3), "zero: 3")


def partita_tp(work: Workload) -> Ready:
    size = len(devices())
    return _partita(work, Plan((Stage(devices(), ("",), tensor=size),), batch=Batch(work.batch, 1)), f"tensor: {size}")


def _half(work: Workload, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return x.chunk(size)[rank], target.chunk(size)[rank]


def ddp(work: Workload) -> Ready:
    from torch.nn.parallel import DistributedDataParallel

    model, x, target = work.build()
    x, target = _half(work, x, target)
    divided = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> float:
        divided.zero_grad(set_to_none=True)
        loss = cross_entropy(divided(x), target)
        loss.backward()
        return loss.item()

    return Ready(step, "gradients as bucket views")


def fsdp(work: Workload) -> Ready:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x, target = work.build()
    x, target = _half(work, x, target)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in blocks(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = cross_entropy(model(x), target)
        loss.backward()
        return loss.item()

    return Ready(step, "fully_shard on each block and the whole")


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the model's lists: what a user wraps one by one."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child


class Apart(nn.Module):
    """A block whose fused projection is taken apart, so that heads can be divided by ``parallelize_module``."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.width, self.causal = block.project.in_features // block.heads, block.causal
        self.norm1, self.norm2, self.project, self.up, self.down = (
            block.norm1, block.norm2, block.project, block.up, block.down,
        )  # fmt: skip
        inside = block.project.in_features
        for name, weight, bias in zip("qkv", block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True):
            part = nn.Linear(inside, inside)
            with torch.no_grad():
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        own = self.norm1(x)
        q, k, v = (part(own).view(n, t, -1, self.width).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(y.transpose(1, 2).reshape(n, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def tensor_parallel(work: Workload, *, attention: bool) -> Ready:
    """By hand, in Megatron's way: the first linear of a pair by columns, the second by rows; heads where asked, and
    then the scores too, with the loss taken from their parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

    model, x, target = work.build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows, parted = ColwiseParallel(), RowwiseParallel(), False
    if isinstance(model, GPT | ViT):
        plan: dict[str, Any] = {"up": columns, "down": rows}
        if attention:
            model.blocks = nn.ModuleList(Apart(block) for block in model.blocks)  # type: ignore[arg-type]
            plan |= {"q": columns, "k": columns, "v": columns, "project": rows}
        for part in model.blocks:
            parallelize_module(part, mesh, plan)
        if attention and isinstance(model, GPT):
            parallelize_module(model, mesh, {"head": ColwiseParallel(use_local_output=False)})
            parted = True
    else:
        layers = [part for part in blocks(model) if isinstance(part, nn.Linear)]
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            parallelize_module(first, mesh, ColwiseParallel())
            parallelize_module(second, mesh, RowwiseParallel())

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with loss_parallel() if parted else contextlib.nullcontext():
            loss = cross_entropy(model(x), target)
            loss.backward()
        return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)

    return Ready(step, "heads, MLPs, scores" if attention else "MLPs")


def best_tensor_parallel(work: Workload) -> Ready:
    which = (True, False) if hasattr(work.make(), "blocks") else (False,)
    return best({f"Colwise, Rowwise ({a}):": (lambda a=a: tensor_parallel(work, attention=a)) for a in which})


def megatron(work: Workload) -> Ready:
    model, x, target = work.build()
    model, loss_of = divided(model)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model(x), target)
        loss.backward()
        return float(loss)

    return Ready(step, "heads, MLPs, scores")


# -- pipelines -----------------------------------------------------------------------------------------------------


_known = [""]


@contextlib.contextmanager
def knowing(chosen: str) -> Iterator[None]:
    """While open, ``best`` takes this of its settings without trying them all (where it is one of them)."""
    _known.append(chosen)
    try:
        yield
    finally:
        _known.pop()


def best(tries: dict[str, Callable[[], Ready]]) -> Ready:
    """The fastest of several settings, by the slower rank's least time of two steps."""
    times, made = {}, {}
    tries = {key: build for key, build in tries.items() if key == _known[-1]} or tries
    if len(tries) == 1:
        (winner,) = tries
        return _noted(tries[winner](), winner)
    for key, build in tries.items():
        ready = made[key] = build()
        least = []
        for _ in range(3):
            dist.barrier()
            start = perf_counter()
            ready.step()
            dist.barrier()
            least.append(perf_counter() - start)
        longest = torch.tensor([min(least[1:])])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        times[key] = longest.item()
    winner = min(times, key=lambda k: times[k])
    for key, ready in made.items():
        if key != winner:
            ready.close()
    return _noted(made[winner], winner)


def _noted(ready: Ready, winner: str) -> Ready:
    ready.note, ready.chosen = f"{winner} {ready.note}".strip(), winner
    return ready


def cuts_of(work: Workload) -> list[int]:
    """Where a person would cut a chain in two: its middle, and the places beside it."""
    length = len(work.names(work.make()))
    return [c for c in range(length // 2 - 1, length // 2 + 2) if 0 < c < length]


def bounds_of_v(cut: int, length: int) -> list[int]:
    """Bounds of four parts, two a rank: each side of a cut in half."""
    return [0, (cut + 1) // 2, cut, (cut + length) // 2, length]


def partita_pipeline(work: Workload, schedule: str, *, v: bool = False) -> Ready:
    """One stage a rank, or two that lie in a ``v`` (the last comes back to the first rank)."""
    names = work.names(work.make())

    def build(cut: int, microbatches: int) -> Ready:
        bounds = bounds_of_v(cut, len(names)) if v else [0, cut, len(names)]
        devices = ("cpu:0", "cpu:1", "cpu:1", "cpu:0") if v else ("cpu:0", "cpu:1")
        stages = tuple(
            Stage((device,), tuple(n for part in names[a:b] for n in part))
            for device, (a, b) in zip(devices, pairwise(bounds), strict=True)
        )
        return _partita(work, Plan(stages, batch=Batch(work.batch, microbatches), schedule=schedule), "")

    tries = {f"cut {c}, {m} microbatches,": (c, m) for c in cuts_of(work) for m in (4, 8)}
    return best({key: (lambda s=settings: build(*s)) for key, settings in tries.items()})


class Contiguous(nn.Module):
    """What Gloo sends must be contiguous; a transformer over patches makes strided activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


def torch_pipeline(work: Workload, schedule: str) -> Ready:
    from torch.distributed import pipelining

    rank = dist.get_rank()
    kind = getattr(pipelining, schedule)

    def build(cut: int, microbatches: int) -> Ready:
        model, x, target = work.build()
        chain = work.chain(model)
        length = len(chain)
        if schedule == "Schedule1F1B":
            spans = {0: (0, cut), 1: (cut, length)}
            mine = [rank]
        else:  # two virtual stages a rank; in a V the last comes back to the first rank
            bounds = bounds_of_v(cut, length)
            spans = {i: (bounds[i], bounds[i + 1]) for i in range(4)}
            mine = [0, 3] if rank == 0 else [1, 2]
            mine = mine if schedule == "ScheduleZBVZeroBubble" else [rank, rank + 2]
        parts = []
        for index in mine:
            a, b = spans[index]
            part = nn.Sequential(*chain[a:b], *([Contiguous()] if b < length else []))
            parts.append(pipelining.PipelineStage(part, index, len(spans), torch.device("cpu")))
        stages: Any = parts[0] if schedule == "Schedule1F1B" else parts
        runner = kind(stages, microbatches, loss_fn=cross_entropy)
        last = len(spans) - 1 in mine
        held = [p for part in parts for p in part.submod.parameters()]

        def step() -> float | None:
            for parameter in held:
                parameter.grad = None
            losses: list[torch.Tensor] = []
            given = (x,) if 0 in mine else ()
            if last:
                runner.step(*given, target=target, losses=losses)
                return torch.stack(losses).mean().item()
            runner.step(*given)
            return None

        return Ready(step)

    tries = {f"cut {c}, {m} microbatches": (c, m) for c in cuts_of(work) for m in (4, 8)}
    return best({key: (lambda s=settings: build(*s)) for key, settings in tries.items()})


CONTESTS: dict[str, dict[str, Callable[[Workload], Ready]]] = {
    "data": {"partita": partita_dp, "DistributedDataParallel": ddp},
    "zero3": {"partita": partita_zero3, "fully_shard": fsdp},
    "tensor": {"partita": partita_tp, "parallelize_module": best_tensor_parallel, "Megatron by hand": megatron},
    "pipeline": {
        "partita 1f1b": lambda w: partita_pipeline(w, "1f1b"),
        "partita zero_bubble": lambda w: partita_pipeline(w, "zero_bubble"),
        "partita zero_bubble in a V": lambda w: partita_pipeline(w, "zero_bubble", v=True),
        "Schedule1F1B": lambda w: torch_pipeline(w, "Schedule1F1B"),
        "ScheduleInterleavedZeroBubble": lambda w: torch_pipeline(w, "ScheduleInterleavedZeroBubble"),
        "ScheduleZBVZeroBubble": lambda w: torch_pipeline(w, "ScheduleZBVZeroBubble"),
    },
}
