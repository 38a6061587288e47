"""A model divided by hand over imaginary core groups, and the unsplit model's numbers beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from partita.capture import capture
from partita.cluster import Cluster, Device
from partita.manual import plan_from_cuts
from partita.runtime.compare import Comparison, compare, observe
from partita.runtime.module import ParallelModule

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


def cluster(count: int) -> Cluster:
    """Devices that share this process's cores: no pinning, so that tests run anywhere."""
    return Cluster(tuple(Device(f"cpu:{i}", "cpu", 1 << 30, 1e10, 1e10, ()) for i in range(count)))


def divided(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    at: Sequence[str] = (),
    microbatches: int = 1,
    schedule: str = "1f1b",
    loss_fn: Callable[..., torch.Tensor] | None = None,
    recompute: Sequence[str] = (),
    batch_norm: str = "exact",
) -> ParallelModule:
    """Cut before each of ``at``, stage k on device k."""
    where = cluster(len(at) + 1)
    graph = capture(model, args, dict(kwargs or {})).graph
    names = [d.name for d in where.devices]
    plan = plan_from_cuts(graph, tuple(at), names, microbatches=microbatches, schedule=schedule)
    stages = tuple(replace(stage, recompute=tuple(recompute)) for stage in plan.stages)
    return ParallelModule(model, replace(plan, stages=stages, batch_norm=batch_norm), where, loss_fn=loss_fn)


@dataclass(frozen=True)
class Case:
    """One way to divide: stages, microbatches, schedule."""

    stages: int
    microbatches: int
    schedule: str


def cases(most_stages: int = 3) -> Iterator[Case]:
    """Stages {1, 2, 3} x microbatches {1, 4} x every schedule."""
    for stages in range(1, most_stages + 1):
        for microbatches in (1, 4):
            for name in SCHEDULES:
                yield Case(stages, microbatches, name)


def differences(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, at: Sequence[str],
    fresh: tuple[Any, ...] | None = None, only: Callable[[Case], bool] = lambda case: True, **options: Any,
) -> dict[Case, Comparison]:  # fmt: skip
    """Each case's comparison with the unsplit model, on ``fresh`` inputs (default: the example)."""
    given = args if fresh is None else fresh
    expected = observe(model, model, given, dict(kwargs or {}))
    found = {}
    for case in cases(len(at) + 1):
        if only(case):
            parallel = divided(
                model, args, kwargs, at=at[: case.stages - 1], microbatches=case.microbatches,
                schedule=case.schedule, **options,
            )  # fmt: skip
            found[case] = compare(expected, observe(parallel, model, given, dict(kwargs or {})))
            parallel.close()
    return found


def assert_same(*args: Any, bitwise: bool = True, **kwargs: Any) -> None:
    """Equal numbers in every case; bitwise where there is one microbatch (unless three or more gradients are summed in
    another order)."""
    for case, found in differences(*args, **kwargs).items():
        assert found.ok, f"{case}: {found}"
        if bitwise and case.microbatches == 1:
            assert all(d.absolute == 0 for d in found.differences), f"{case}: {found.worst}"


def divided_hard(case: Case) -> bool:
    """The case in which a missing care shows: several stages, several microbatches."""
    return case == Case(2, 4, "1f1b")


def training_step(
    model: nn.Module, args: tuple[Any, ...], loss_fn: Callable[..., torch.Tensor], *, seed: int = 3
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The unsplit model's loss and gradients of one step, on a copy."""
    own = copy.deepcopy(model)
    torch.manual_seed(seed)
    loss = loss_fn(own(*args[:-1]), args[-1])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
