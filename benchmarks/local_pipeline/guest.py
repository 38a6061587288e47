"""The process of a contestant: builds it, then answers what it is told over a pipe."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.local_pipeline import contestants
from benchmarks.local_pipeline.contestants import CONTESTANTS, Contestant
from benchmarks.models import WORKLOADS
from benchmarks.rivals import one_device

EVERYONE = {**CONTESTANTS, **one_device.ONE_DEVICE}


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


def _whole(grad: torch.Tensor) -> torch.Tensor:
    """A gradient that ranks hold in parts (a DTensor), put together; every rank must ask at the same time."""
    put_together = getattr(grad, "full_tensor", None)
    return put_together() if put_together is not None else grad


def peak_bytes() -> int:
    """The most memory this process has had so far (Linux: resident)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(
    connection: Any, name: str, workload: str, rank: int, rendezvous: str, optimizer: bool, quick: bool = False,
    device: str = "", limit: int = 0,
) -> None:  # fmt: skip
    """Answers ('step', n) with the last of n losses, ('infer', n) after n forwards, ('gradients', path) after saving
    them, ('peak', None) with bytes, ('end', None). Errors go back as text. ``device``, within ``limit`` bytes: of
    contestants for one device (``benchmarks.rivals.one_device``)."""
    contestants.QUICK = quick
    contestant, work = EVERYONE[name], WORKLOADS[workload]
    if contestant.threads is not None:
        torch.set_num_threads(contestant.threads)
    try:
        with contextlib.ExitStack() as stack:
            if device:
                one_device.limited(device, limit)
                stack.enter_context(one_device.group(rendezvous))
            sync = stack.enter_context(_group(contestant, rank, rendezvous))
            ready = contestant.build(work, rank, sync)
            update = torch.optim.AdamW(ready.model.parameters(), lr=1e-5, fused=True).step if optimizer else None
            connection.send(("ready", ready.note))
            while True:
                word, argument = connection.recv()
                if word == "end":
                    return
                if word == "gradients":
                    grads = {n: _whole(p.grad) for n, p in ready.model.named_parameters() if p.grad is not None}
                    torch.save(grads, argument)
                    connection.send(("done", None))
                    continue
                if word == "peak":
                    connection.send(("done", one_device.peak_bytes() if device.startswith("cuda") else peak_bytes()))
                    continue
                if word == "infer":
                    for _ in range(argument):
                        ready.infer()
                    connection.send(("done", float("nan")))
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
