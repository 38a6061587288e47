"""Bytes a rank holds: of its parameters, gradients and optimizer state, and at the most during a training step.

ZeRO (Rajbhandari et al. 2020, section 5 and figure 1) with parameters of 4 bytes and AdamW's two moments of 4, over n
replicas of P elements of which the fullest rank has R rows' elements (P/n where the rows divide):

    zero 0    4 P + 4 P + 8 P
    zero 1    4 P + 4 P + 8 R
    zero 2    4 P + 4 R + 8 R
    zero 3    4 R + 4 R + 8 R

That is what is there when backward is over. What the paper leaves out, and a peak has: the gradients of the unit
(a block of the model) that backward is in, whole until their sum is on its way (zero 2 and 3), and the gathered
parameters of that unit and of the one that is fetched ahead (zero 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from partita.runtime.meter import MemoryMeter, storage_bytes
from partita.torch_compat import pytree

if TYPE_CHECKING:
    from partita.runtime.distributed.module import RankModule


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one rank's tensors between steps."""

    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.state


def held(parallel: RankModule, optimizer: torch.optim.Optimizer | None = None) -> Held:
    """What this rank holds now."""
    mine = list(parallel.parameters())
    grads = [p.grad for p in mine if p.grad is not None]
    state = [optimizer.state[p] for p in mine if p in optimizer.state] if optimizer is not None else []
    return Held(*(storage_bytes(pytree.tree_leaves(values)) for values in (_values(parallel), grads, state)))


def measure_rank(
    parallel: RankModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], optimizer: torch.optim.Optimizer | None
) -> dict[str, int]:
    """Rank's device -> peak bytes of its tensors in one ``train_step`` (a forward in eval mode), of every rank.
    Collective. Memory that ranks of one host share to hand each other sums is not counted."""
    kept = {p: p.grad for p in parallel.parameters()}
    for parameter in kept:
        parameter.grad = None
    try:
        meter = MemoryMeter(resized=True)
        meter.hold(_values(parallel))
        if optimizer is not None:
            meter.hold([optimizer.state[p] for p in kept if p in optimizer.state])
        with meter:
            if parallel.training:
                parallel.train_step(*args, **kwargs)
            else:
                with torch.no_grad():
                    parallel(*args, **kwargs)
        return dict(parallel.world.gather((parallel.world.name, meter.peak_bytes), "the ranks' peaks"))
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad


def _values(parallel: RankModule) -> list[torch.Tensor]:
    """Every tensor behind this rank's parameters: what it holds whole, its rows, and buffers."""
    shards = [entry.local for entry in parallel.shards.of.values()]
    whole = [p.detach() for p in (*parallel.holding.own.values(), *parallel.module.buffers())]
    return [*shards, *whole]
