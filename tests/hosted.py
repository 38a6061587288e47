"""Plans that keep something in host memory, run beside the same plan that keeps all on its devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from partita.cluster import Cluster
from partita.plan import Offload, Plan
from partita.runtime.module import ParallelModule


def fits_as_planned(
    model: nn.Module,
    x: torch.Tensor,
    target: torch.Tensor,
    plan: Plan,
    cluster: Cluster,
    room: int,
    loss_fn: Callable[..., torch.Tensor],
) -> dict[str, int]:
    """The plan keeps ``cpu:0`` within ``room`` and without its offload it does not, to the same bits; its peaks."""
    grads, peaks = [], []
    for wanted in (plan, replace(plan, stages=tuple(replace(s, offload=Offload()) for s in plan.stages))):
        parallel = ParallelModule(model, replace(wanted, predicted=None), cluster, loss_fn=loss_fn)
        model.zero_grad()
        parallel.train_step(x, target)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        peaks.append(parallel.measure_memory(x, target))
        assert (peaks[-1]["cpu:0"] <= room) == (wanted is plan), peaks[-1]
        parallel.close()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    return peaks[0]
