"""The contestants: each builds the workload in a process of its own and then runs one training step when told.

A step is zero_grad, forward, loss, backward; the optimizer's step only where asked for; an inference is a forward in
eval mode under ``no_grad``. Settings a contestant may choose (microbatches, split point) are tried at the start and the
fastest kept (``quick``: the middle one taken untried).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.models import Workload, as_args, cross_entropy

Step = Callable[[], torch.Tensor | float]
QUICK = False  # in a contestant's process: settings are taken untried


@dataclass
class Ready:
    """A contestant that can run: ``step`` returns its loss and leaves gradients in ``model``. ``note``: settings.

    ``forward``: what an inference calls (every rank its part); None where it has no way to.
    """

    step: Step
    model: nn.Module
    note: str
    forward: Callable[[], object] | None = None

    def infer(self) -> None:
        """One forward in eval mode."""
        if self.forward is None:
            raise NotImplementedError("no way to run inference")
        self.model.eval()
        try:
            with torch.no_grad():
                self.forward()
        finally:
            self.model.train()


@dataclass(frozen=True)
class Contestant:
    """``ranks``: processes it needs. ``cores``: of the two, those it may use, per rank. ``threads``: of OpenMP.

    ``lines``: that a user adds to a plain training script or changes in it, launch and hand-written parts included.
    """

    name: str
    title: str
    build: Callable[[Workload, int, Callable[..., Any]], Ready]
    ranks: int = 1
    cores: tuple[tuple[int, ...], ...] = ((0, 1),)
    threads: int | None = None
    pinned: bool = False
    lines: int = 0


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


def _ordinary(call: Callable[..., torch.Tensor], model: nn.Module, x: Any, target: torch.Tensor, note: str) -> Ready:
    """Ready for what is called like a module on the whole batch."""
    parameters = list(model.parameters())

    def step() -> torch.Tensor:
        clear(parameters)
        loss = cross_entropy(call(*as_args(x)), target)
        loss.backward()
        return loss.detach()

    return Ready(step, model, note, lambda: call(*as_args(x)))


def plain(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    model, x, target = work.build()
    threads = torch.get_num_threads()
    return _ordinary(model, model, x, target, f"{threads} thread{'s' if threads > 1 else ''}")


def compiled(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    model, x, target = work.build()
    return _ordinary(torch.compile(model), model, x, target, f"{torch.get_num_threads()} threads")


def chain_of(work: Workload, model: nn.Module) -> list[nn.Module]:
    """Its parts in order. Raises ValueError for a model that is no chain."""
    if work.chain is None:
        raise ValueError("this model is no chain of modules; it would have to be rewritten as one")
    return work.chain(model)


# -- torchgpipe ----------------------------------------------------------------------------------------------------


def torchgpipe(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torchgpipe import GPipe

    model, x, target = work.build()
    chain = nn.Sequential(*chain_of(work, model))

    def make(cut: int, chunks: int) -> Ready:
        divided = GPipe(
            chain, balance=[cut, len(chain) - cut], devices=["cpu", "cpu"], chunks=chunks, checkpoint="never"
        )
        return _ordinary(divided, model, x, target, f"split before part {cut}, {chunks} microbatches")

    middle = len(chain) // 2
    tries = {str(chunks): make(middle, chunks) for chunks in (2, 4, 8)}
    best = "4" if QUICK else fastest({key: ready.step for key, ready in tries.items()})
    return tries[best]


# -- torch.distributed.pipelining ----------------------------------------------------------------------------------


class Contiguous(nn.Module):
    """What Gloo sends must be contiguous; a transformer over patches makes strided activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


def torch_pipeline(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model, x, target = work.build()
    chain = chain_of(work, model)
    device = torch.device("cpu")
    parameters = list(model.parameters())

    def make(cut: int, microbatches: int, *, train: bool = True) -> Step:
        part = nn.Sequential(*([*chain[:cut], Contiguous()] if rank == 0 else chain[cut:]))
        stage = PipelineStage(part, rank, 2, device)
        schedule = Schedule1F1B(stage, microbatches, loss_fn=cross_entropy if train else None)
        if not train:

            def evaluate() -> float:
                schedule.eval(*((x,) if rank == 0 else ()))
                return float("nan")

            return evaluate

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
    cut, microbatches = middle, 4
    if not QUICK:
        cut, _ = best_of([(c, 4) for c in cuts])
        cut, microbatches = best_of([(cut, m) for m in (2, 4, 8)])
    forward: list[Step] = []

    def infer() -> None:
        if not forward:
            forward.append(make(cut, microbatches, train=False))
        forward[0]()

    return Ready(make(cut, microbatches), model, f"split before part {cut}, {microbatches} microbatches", infer)


# -- data parallel -------------------------------------------------------------------------------------------------


def ddp(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torch.nn.parallel import DistributedDataParallel

    model, x, target = work.build()
    divided = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _half(divided, model, x, target, rank, work.batch)


def _half(divided: nn.Module, model: nn.Module, x: Any, target: torch.Tensor, rank: int, batch: int) -> Ready:
    """Ready for ranks that each train on half the batch."""
    mine = slice(0, batch // 2) if rank == 0 else slice(batch // 2, None)
    args, target = tuple(t[mine] for t in as_args(x)), target[mine]

    def step() -> float:
        divided.zero_grad(set_to_none=True)
        loss = cross_entropy(divided(*args), target)
        loss.backward()
        return loss.item()

    return Ready(step, model, "half the batch on each rank", lambda: divided(*args))


def fsdp2(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x, target = work.build()
    mesh = init_device_mesh("cpu", (2,))
    for group in work.names(model):
        for name in group:
            fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _half(model, model, x, target, rank, work.batch)


def tensor_parallel(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    """``parallelize_module`` as its tutorial has it: the two halves of each MLP by columns and by rows; what the plain
    modules' own reshaping of attention heads allows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, x, target = work.build()
    mesh = init_device_mesh("cpu", (2,))
    known = {name for name, _ in model.named_modules()}
    plan: dict[str, Any] = {}
    for name in known:
        if name.endswith(".up"):
            plan |= {name: ColwiseParallel(), name.removesuffix("up") + "down": RowwiseParallel()}
    layers = sorted(n for n in known if n.startswith("layers.") and n.count(".") == 1)
    for first, second in zip(layers[::2], layers[1::2], strict=False):
        plan |= {first: ColwiseParallel(), second: RowwiseParallel()}
    if not plan:
        raise ValueError("parallelize_module has no style for this model's layers")
    divided = parallelize_module(model, mesh, plan)
    return _ordinary(divided, model, x, target, f"{len(plan)} linear layers divided")


# -- accelerate ----------------------------------------------------------------------------------------------------


def accelerate(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from accelerate import dispatch_model

    model, x, target = work.build()
    device_map = {name: "cpu" for part in work.names(model) for name in part} if work.chain else {"": "cpu"}
    model = dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    return _ordinary(model, model, x, target, "one device at a time; 2 threads")


# -- partita -------------------------------------------------------------------------------------------------------


def describe(plan: Any) -> str:
    stages = " | ".join(f"{len(s.modules) + len(s.ops)} parts on {'+'.join(s.devices)}" for s in plan.stages)
    return f"{stages}; {plan.batch.microbatches} microbatches, {plan.schedule}"


def partita_automatic(work: Workload, rank: int, sync: Callable[..., Any], *, call: bool = False) -> Ready:
    import partita

    model, x, target = work.build()
    pm = partita.parallelize(model, example_args=as_args(x), devices=["cpu", "cpu"], loss_fn=cross_entropy)
    return _partita(pm, model, x, target, call, describe(pm.plan))


def partita_compiled(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    import partita

    model, x, target = work.build()
    asked = {"compile": "auto"}
    pm = partita.parallelize(
        model, example_args=as_args(x), devices=["cpu", "cpu"], loss_fn=cross_entropy, constraints=asked
    )
    what = sum(bool(s.compile) for s in pm.plan.stages)
    note = f"{describe(pm.plan)}; {what} of {len(pm.plan.stages)} stages compiled"
    return _partita(pm, model, x, target, False, note, asked)


def partita_call(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    return partita_automatic(work, rank, sync, call=True)


def _partita(
    pm: Any, model: nn.Module, x: Any, target: torch.Tensor, call: bool, note: str, constraints: Any = None
) -> Ready:
    import partita

    parameters = list(model.parameters())
    forward: list[Any] = []  # a plan for inference, made at its first use

    def train_step() -> torch.Tensor:
        clear(parameters)
        return pm.train_step(*as_args(x), target)

    def infer() -> None:
        if not forward:
            forward.append(
                partita.parallelize(
                    model, as_args(x), devices=["cpu", "cpu"], objective="inference", constraints=constraints
                )
            )
        forward[0](*as_args(x))

    ready = _ordinary(pm, model, x, target, note)
    return Ready(ready.step if call else train_step, model, note, infer)


def _partita_pipeline(schedule: str) -> Callable[..., Ready]:
    """The best plan without replicas under this schedule: cut and microbatches are the planner's."""

    def build(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
        import partita

        model, x, target = work.build()
        pm = partita.parallelize(
            model, example_args=as_args(x), devices=["cpu", "cpu"], loss_fn=cross_entropy,
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
        Contestant("compile2", "torch.compile, 2 threads, pinned", compiled, threads=2, pinned=True, lines=1),
        Contestant("compile1", "torch.compile, 1 thread", compiled, cores=((0,),), threads=1, lines=1),
        Contestant("torchgpipe", "torchgpipe", torchgpipe, threads=2, lines=4),
        Contestant("pipelining", "torch pipelining 1F1B, 2 ranks", torch_pipeline, 2, APART, 1, lines=14),
        Contestant("ddp", "DDP, 2 ranks", ddp, 2, APART, 1, lines=6),
        Contestant("fsdp2", "FSDP2, 2 ranks", fsdp2, 2, APART, 1, lines=9),
        Contestant("tensor", "parallelize_module, 2 ranks", tensor_parallel, 2, APART, 1, lines=10),
        Contestant("accelerate", "accelerate dispatch_model", accelerate, threads=2, pinned=True, lines=2),
        Contestant("partita", "partita automatic, train_step", partita_automatic, lines=2),
        Contestant("partita-call", "partita automatic, pm(x) + backward", partita_call, lines=1),
        Contestant("partita-compiled", "partita automatic, compile: auto, train_step", partita_compiled, lines=3),
        Contestant("partita-1f1b", "partita pipeline plan, 1f1b", _partita_pipeline("1f1b"), lines=2),
        Contestant("partita-zb", "partita pipeline plan, zero_bubble", _partita_pipeline("zero_bubble"), lines=2),
    )
}
