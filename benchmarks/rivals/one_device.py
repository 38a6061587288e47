"""Contestants for one device beside its host's memory: what fits a model into less memory than it needs.

    plain       everything on the device: as fast as it goes, and out of memory below its need
    compile     the same under torch.compile
    accelerate  cpu_offload: weights come for their layer's forward, one copy at a time
    FSDP2       fully_shard of each part with CPUOffloadPolicy: parameters, gradients and their optimizer on the host
    partita     the planner's choice of recomputing, offloading and microbatches

On a GPU all are held to the same limit by the allocator (``torch.cuda.set_per_process_memory_fraction``). On a CPU,
where host and device are one memory, only partita knows of the limit: a trial run of the programs, not a comparison.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.local_pipeline.contestants import Contestant, Ready, clear, describe
from benchmarks.models import Workload, as_args, cross_entropy

DEVICE = "cpu:0"
LIMIT = 0
"""Where and within how many bytes (0: what there is): set by the contestant's process."""


def limited(device: str, limit: int) -> None:
    """Hold this process to it."""
    global DEVICE, LIMIT
    DEVICE, LIMIT = device, limit
    if device.startswith("cuda") and limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), 0)


def place() -> torch.device:
    return torch.device(DEVICE if DEVICE.startswith("cuda") else "cpu")


def peak_bytes() -> int:
    """The most that was allocated on the GPU so far."""
    return torch.cuda.max_memory_allocated(0)


def _ready(call: Callable[..., torch.Tensor], model: nn.Module, x: Any, target: torch.Tensor, note: str) -> Ready:
    """Ready for what is called like a module; inputs come from the host in every step, as a loader gives them."""
    parameters = list(model.parameters())

    def step() -> float:
        clear(parameters)
        args = [t.to(place()) for t in as_args(x)]
        loss = cross_entropy(call(*args), target.to(place()))
        loss.backward()
        return loss.item()

    return Ready(step, model, note, lambda: call(*(t.to(place()) for t in as_args(x))))


def plain(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    model, x, target = work.build()
    model.to(place())
    return _ready(model, model, x, target, "all on the device")


def compiled(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    model, x, target = work.build()
    model.to(place())
    return _ready(torch.compile(model), model, x, target, "all on the device")


def accelerate(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from accelerate import cpu_offload

    model, x, target = work.build()
    cpu_offload(model, place())
    ready = _ready(model, model, x, target, "")
    try:
        ready.step()
        idle = sum(p.grad is None for p in model.parameters())
        ready.note = f"{idle} of {sum(1 for _ in model.parameters())} parameters get no gradient"
    except RuntimeError as error:
        ready.note = f"does not train: {str(error).splitlines()[0][:80]}"
    return ready


def fsdp2(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model, x, target = work.build()
    mesh = init_device_mesh(place().type, (1,))
    for group in work.names(model):
        for name in group:
            fully_shard(model.get_submodule(name), mesh=mesh, offload_policy=CPUOffloadPolicy())
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy())
    return _ready(model, model, x, target, "parameters on the host")


def partita_automatic(work: Workload, rank: int, sync: Callable[..., Any]) -> Ready:
    import partita

    model, x, target = work.build()
    args, where = as_args(x), {"devices": [DEVICE], "memory": LIMIT or None}
    pm = partita.parallelize(model, args, loss_fn=cross_entropy, optimizer="none", **where)
    parameters = list(model.parameters())
    forward: list[Any] = []  # a plan for inference, made at its first use

    def step() -> float:
        clear(parameters)
        return float(pm.train_step(*args, target))

    def infer() -> None:
        if not forward:
            forward.append(partita.parallelize(model, args, objective="inference", **where))
        forward[0](*args)

    return Ready(step, model, _words(pm.plan), infer)


def _words(plan: Any) -> str:
    stage = plan.stages[0]
    kinds = (("recomputed", stage.recompute), ("activations away", stage.offload.activations),
             ("parameters away", stage.offload.parameters))  # fmt: skip
    return "; ".join([describe(plan), *(f"{len(names)} {word}" for word, names in kinds if names)])


@contextlib.contextmanager
def group(rendezvous: str) -> Iterator[None]:
    """A process group of this process alone: what FSDP2 asks for."""
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if place().type == "cuda" else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


ONE_DEVICE: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("plain", "PyTorch", plain),
        Contestant("compile", "torch.compile", compiled, lines=1),
        Contestant("accelerate", "accelerate cpu_offload", accelerate, lines=2),
        Contestant("fsdp2-offload", "FSDP2, CPUOffloadPolicy", fsdp2, lines=9),
        Contestant("partita-one", "partita automatic, train_step", partita_automatic, lines=2),
    )
}
