"""The contestants: each builds the workload in a process of its own and then runs one training step when told.

A step is zero_grad, forward, loss, backward; the optimizer's step only where asked for. Settings a contestant may
choose (microbatches, split point, threads) are tried at the start and the fastest kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.models import WORKLOADS, Workload, cross_entropy

Step = Callable[[], torch.Tensor | float]


@dataclass
class Ready:
    """A contestant that can run: ``step`` returns its loss and leaves gradients in ``model``. ``note``: settings."""

    step: Step
    model: nn.Module
    note: str


@dataclass(frozen=True)
class Contestant:
    """``ranks``: processes it needs. ``cores``: of the two, those it may use, per rank. ``threads``: of OpenMP."""

    name: str
    title: str
    build: Callable[[Workload, int, Callable[..., Any]], Ready]
    ranks: int = 1
    cores: tuple[tuple[int, ...], ...] = ((0, 1),)
    threads: int | None = None
    pinned: bool = False


def clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def fastest(steps: Mapping[str, Step], *, repeats: int = 2) -> str:
    """The key of the step with the smallest time, after one warm-up each."""
    times = {}
    for key, step in steps.items():
        step()
        begun = []
        for _ in range(repeats):
            start = perf_counter()
            step()
            begun.append(perf_counter() - start)
        times[key] = min(begun)
    return min(times, key=lambda k: times[k])


# -- plain PyTorch -------------------------------------------------------------------------------------------------


def plain(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    model, x, target = work.build()
    parameters = list(model.parameters())

    def step() -> torch.Tensor:
        clear(parameters)
        loss = cross_entropy(model(x), target)
        loss.backward()
        return loss.detach()

    threads = torch.get_num_threads()
    return Ready(step, model, f"{threads} thread{'s' if threads > 1 else ''}")


# -- torchgpipe ----------------------------------------------------------------------------------------------------


def torchgpipe(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torchgpipe import GPipe

    model, x, target = work.build()
    chain = nn.Sequential(*work.chain(model))
    parameters = list(model.parameters())

    def make(cut: int, chunks: int) -> Step:
        divided = GPipe(
            chain, balance=[cut, len(chain) - cut], devices=["cpu", "cpu"], chunks=chunks, checkpoint="never"
        )

        def step() -> torch.Tensor:
            clear(parameters)
            loss = cross_entropy(divided(x), target)
            loss.backward()
            return loss.detach()

        return step

    middle = len(chain) // 2
    tries = {f"split before part {middle}, {chunks} microbatches": (middle, chunks) for chunks in (2, 4, 8)}
    steps = {key: make(*settings) for key, settings in tries.items()}
    best = fastest(steps)
    return Ready(steps[best], model, best)


# -- torch.distributed.pipelining ----------------------------------------------------------------------------------


class Contiguous(nn.Module):
    """What Gloo sends must be contiguous; a transformer over patches makes strided activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


def torch_pipeline(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model, x, target = work.build()
    chain = work.chain(model)
    device = torch.device("cpu")
    parameters = list(model.parameters())

    def make(cut: int, microbatches: int) -> Step:
        part = nn.Sequential(*([*chain[:cut], Contiguous()] if rank == 0 else chain[cut:]))
        stage = PipelineStage(part, rank, 2, device)
        schedule = Schedule1F1B(stage, microbatches, loss_fn=cross_entropy)

        def step() -> float:
            clear(parameters)
            if rank == 0:
                schedule.step(x)
                return float("nan")
            losses: list[torch.Tensor] = []
            schedule.step(target=target, losses=losses)
            return torch.stack(losses).mean().item()

        return step

    def best_of(tries: list[tuple[int, int]]) -> tuple[int, int]:
        """Both ranks time each try; the slower rank's time counts."""
        times = []
        for settings in tries:
            step = make(*settings)
            step()
            least = float("inf")
            for _ in range(2):
                sync()
                start = perf_counter()
                step()
                least = min(least, perf_counter() - start)
            times.append(least)
        longest = sync(times)
        return tries[longest.index(min(longest))]

    middle = len(chain) // 2
    cuts = [c for c in range(middle - 1, middle + 3) if 0 < c < len(chain)]
    cut, _ = best_of([(c, 4) for c in cuts])
    cut, microbatches = best_of([(cut, m) for m in (2, 4, 8)])
    return Ready(make(cut, microbatches), model, f"split before part {cut}, {microbatches} microbatches")  # fmt: skip


# -- data parallel -------------------------------------------------------------------------------------------------


def ddp(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torch.nn.parallel import DistributedDataParallel

    model, x, target = work.build()
    half = work.batch // 2
    mine = slice(0, half) if rank == 0 else slice(half, None)
    x, target = x[mine], target[mine]
    divided = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> float:
        divided.zero_grad(set_to_none=True)
        loss = cross_entropy(divided(x), target)
        loss.backward()
        return loss.item()

    return Ready(step, model, "half the batch on each rank")


# -- accelerate ----------------------------------------------------------------------------------------------------


def accelerate(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from accelerate import dispatch_model

    model, x, target = work.build()
    names = work.names(model)
    parameters = list(model.parameters())
    device_map = {name: "cpu" for part in names for name in part}
    model = dispatch_model(model, device_map, main_device="cpu", force_hooks=True)

    def step() -> torch.Tensor:
        clear(parameters)
        loss = cross_entropy(model(x), target)
        loss.backward()
        return loss.detach()

    return Ready(step, model, "one device at a time; 2 threads")


# -- partita -------------------------------------------------------------------------------------------------------


def describe(plan: Any) -> str:
    stages = " | ".join(f"{len(s.modules) + len(s.ops)} parts on {'+'.join(s.devices)}" for s in plan.stages)
    return f"{stages}; {plan.batch.microbatches} microbatches, {plan.schedule}"


def partita_automatic(work: Workload, rank: int, sync: Callable[..., Any], *, call: bool = False) -> Ready:
    import partita

    model, x, target = work.build()
    pm = partita.parallelize(model, example_args=(x,), devices=["cpu", "cpu"], loss_fn=cross_entropy)
    return _partita(pm, model, x, target, call, describe(pm.plan))


def partita_call(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    return partita_automatic(work, rank, sync, call=True)


def _partita(pm: Any, model: nn.Module, x: torch.Tensor, target: torch.Tensor, call: bool, note: str) -> Ready:
    parameters = list(model.parameters())

    def train_step() -> torch.Tensor:
        clear(parameters)
        return pm.train_step(x, target)

    def call_and_backward() -> torch.Tensor:
        clear(parameters)
        loss = cross_entropy(pm(x), target)
        loss.backward()
        return loss.detach()

    return Ready(call_and_backward if call else train_step, model, note)


def _partita_pipeline(schedule: str) -> Callable[..., Ready]:
    """The best plan without replicas under this schedule: cut and microbatches are the planner's."""

    def build(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
        import partita

        model, x, target = work.build()
        pm = partita.parallelize(
            model, example_args=(x,), devices=["cpu", "cpu"], loss_fn=cross_entropy,
            constraints={"replicas": False, "schedule": schedule},
        )  # fmt: skip
        stages, parts = len(pm.plan.stages), pm.plan.batch.microbatches
        return _partita(pm, model, x, target, False, f"{stages} stages, {parts} microbatches")

    return build


APART = ((0,), (1,))

CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("plain2", "PyTorch, 2 threads, pinned", plain, threads=2, pinned=True),
        Contestant("plain2-free", "PyTorch, 2 threads, not pinned", plain, threads=2),
        Contestant("plain1", "PyTorch, 1 thread", plain, cores=((0,),), threads=1),
        Contestant("torchgpipe", "torchgpipe", torchgpipe, threads=2),
        Contestant("pipelining", "torch pipelining 1F1B, 2 ranks", torch_pipeline, 2, APART, 1),
        Contestant("ddp", "DDP, 2 ranks", ddp, 2, APART, 1),
        Contestant("accelerate", "accelerate dispatch_model", accelerate, threads=2, pinned=True),
        Contestant("partita", "partita automatic, train_step", partita_automatic),
        Contestant("partita-call", "partita automatic, pm(x) + backward", partita_call),
        Contestant("partita-1f1b", "partita pipeline plan, 1f1b", _partita_pipeline("1f1b")),
        Contestant("partita-zb", "partita pipeline plan, zero_bubble", _partita_pipeline("zero_bubble")),
    )
}


# -- the process of a contestant ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _group(contestant: Contestant, rank: int, rendezvous: str) -> Iterator[Callable[..., Any]]:
    if contestant.ranks == 1:
        yield lambda values=None: values
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=contestant.ranks)

    def sync(values: list[float] | None = None) -> list[float] | None:
        """A barrier; with values, the largest over the ranks."""
        if values is None:
            dist.barrier()
            return None
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()  # type: ignore[no-any-return]

    try:
        yield sync
    finally:
        dist.destroy_process_group()


def serve(connection: Any, name: str, workload: str, rank: int, rendezvous: str, optimizer: bool) -> None:
    """Answers ('step', n) with n losses, ('gradients', path) after saving them, ('end',). Errors go back as text."""
    contestant, work = CONTESTANTS[name], WORKLOADS[workload]
    if contestant.threads is not None:
        torch.set_num_threads(contestant.threads)
    try:
        with _group(contestant, rank, rendezvous) as sync:
            ready = contestant.build(work, rank, sync)
            update = torch.optim.AdamW(ready.model.parameters(), lr=1e-5, fused=True).step if optimizer else None
            connection.send(("ready", ready.note))
            while True:
                word, argument = connection.recv()
                if word == "end":
                    return
                if word == "gradients":
                    grads = {n: p.grad for n, p in ready.model.named_parameters() if p.grad is not None}
                    torch.save(grads, argument)
                    connection.send(("done", None))
                    continue
                loss = float("nan")
                for _ in range(argument):
                    loss = float(ready.step())
                    if update is not None:
                        update()
                connection.send(("done", loss))
    except Exception as error:
        import traceback

        with contextlib.suppress(OSError):
            connection.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))
