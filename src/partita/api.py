"""The public verbs: each a few lines over the floors below.

What only ranks or described clusters need is imported where they are met: ``torch.distributed.tensor`` alone takes as
long to import as all else here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from partita.automatic import best_plan
from partita.capture import Captured, capture
from partita.check import require
from partita.cluster import Cluster
from partita.compiling import unmet
from partita.cost.blocks import Block
from partita.cost.measured import Measured
from partita.errors import PlanError, UsageError
from partita.manual import plan_from_cuts, plan_live
from partita.measure import forget_timings, kept_timings, local_cluster, measure_call
from partita.plan import Plan
from partita.planners.constraints import Constraints
from partita.runtime.compare import Comparison, allow_rounding, compare, observe, observe64
from partita.runtime.distributed import launched
from partita.runtime.front import LazyParallel, device_names, dividing
from partita.runtime.live import children_bytes
from partita.runtime.module import ParallelModule
from partita.sharding.registry import sharding_rule

__all__ = [
    "ModelParallel", "ParallelModule", "autoparallel", "find_plan", "parallelize", "sharding_rule", "split", "verify",
]  # fmt: skip

Devices = str | int | Sequence[str] | Cluster
Memory = str | int | Mapping[str, str | int] | None
LARGE = 32


def parallelize(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: Devices = "auto",
    plan: Plan | str | os.PathLike[str] | None = None,
    memory: Memory = None,
    optimizer: str = "adamw",
    constraints: Constraints | Mapping[str, Any] | None = None,
    objective: str = "train",
    loss_fn: Callable[..., torch.Tensor] | None = None,
    profile: bool = True,
) -> ParallelModule:
    """The model divided over ``devices``: a drop-in ``nn.Module`` with the same parameters and the same numbers.

    ``example_args``, ``example_kwargs``: one typical call. ``plan``: a Plan or its file (manual); None: found here.
    ``memory``: per device, ``"2GiB"`` or ``{device: "2GiB"}``. ``optimizer``: whose state to leave room for.
    ``loss_fn(output, target)``: for ``train_step``. ``profile``: time the model's parts here before planning (seconds,
    kept on disk); False: plan from counts and device speeds alone. Raises PlanError (all problems at once),
    InfeasibleError (with the nearest remedy), CaptureError, ClusterError, UsageError.

    In processes started by ``torchrun`` the devices are the ranks, one each; every rank makes the same calls with the
    same whole batch. There the plan file that ``partita run --plan`` names is taken where ``plan`` is None.
    """

    def read() -> Captured:
        return _capture(model, example_args, example_kwargs)

    def choose(captured: Captured, cluster: Cluster) -> Plan:
        if plan is not None:
            chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
            if not captured.live:
                require(chosen, captured.graph, cluster)
                if unmet(chosen):
                    raise PlanError("the plan cannot be carried out:", unmet(chosen))
            return chosen
        return best(captured, cluster)[0]

    def best(captured: Captured, cluster: Cluster, *, again: bool = False) -> tuple[Plan, Measured | None]:
        """The planner's plan, and the timings it rests on."""
        level = Constraints.read(constraints).zero
        if level > 0 and not launched():
            raise PlanError(
                f"zero {level} divides what replicas hold of their own, and in one process they share it: start a "
                "process a device (torchrun, partita run), or leave zero out"
            )

        def timings(
            over: Cluster, sizes: Sequence[int], units: Sequence[Block] = (), compiled: bool = False
        ) -> Measured | None:
            if not (profile or again):
                return None
            return measure_call(
                captured, over, model, example_args, example_kwargs, sizes=sizes, train=objective == "train",
                again=again, units=units, compiled=compiled,
            )  # fmt: skip

        found, measured = best_plan(
            captured, cluster, model, timings, optimizer=optimizer, constraints=constraints, objective=objective,
            may_unite=not launched(),
        )  # fmt: skip
        return found, measured if objective == "train" else None

    if launched():
        from partita.ranks import divide as divide_over_ranks

        plan = plan if plan is not None else os.environ.get("PARTITA_PLAN")
        return divide_over_ranks(model, capture=read, choose=choose, devices=devices, memory=memory, loss_fn=loss_fn)
    cluster = local_cluster(devices, memory)
    captured = read()
    chosen, measured = best(captured, cluster) if plan is None else (choose(captured, cluster), None)
    parallel = ParallelModule(
        model, chosen, cluster, loss_fn=loss_fn, measured=measured, replan=lambda: best(read(), cluster, again=True)
    )
    if parallel.calibration is not None and measured is not None:
        parallel.calibration.disproved = partial(forget_timings, measured)
    return parallel


def find_plan(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: Devices = "auto",
    cluster: Cluster | None = None,
    memory: Memory = None,
    optimizer: str = "adamw",
    constraints: Constraints | Mapping[str, Any] | None = None,
    objective: str = "train",
) -> Plan:
    """The best plan for the model on these devices, or on a described ``cluster``. Nothing is run or allocated.

    Timings that ``parallelize`` measured on this machine before are used where they are kept. A described cluster of
    more than 32 devices is planned in closed form (``planners/large``).
    """
    where = cluster if cluster is not None else local_cluster(devices, memory)
    wanted = Constraints.read(constraints)
    if cluster is not None and (len(cluster.devices) > LARGE or wanted.for_clusters):
        return plan_for_cluster(
            model, example_args, example_kwargs, cluster, optimizer=optimizer, objective=objective, constraints=wanted
        )
    captured = _capture(model, example_args, example_kwargs)

    def timings(
        over: Cluster, sizes: Sequence[int], units: Sequence[Block] = (), compiled: bool = False
    ) -> Measured | None:
        return kept_timings(captured, over, sizes=sizes, train=objective == "train", units=units)

    return best_plan(
        captured, where, model, timings, optimizer=optimizer, constraints=constraints, objective=objective,
        may_unite=not launched(),
    )[0]  # fmt: skip


def plan_for_cluster(
    model: nn.Module,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
    cluster: Cluster,
    batch: int = 0,
    *,
    optimizer: str = "adamw",
    objective: str = "train",
    constraints: Constraints | Mapping[str, Any] | None = None,
) -> Plan:
    """The best degrees of parallelism for a large model (meta tensors do) on a described cluster, in closed form."""
    from partita.planners.large.result import plan_large

    captured = _capture(model, example_args, example_kwargs)
    if captured.live:
        raise PlanError(f"this model runs as it is, so there is nothing to plan: {captured.live}")
    return plan_large(
        captured.graph, cluster, batch=batch, optimizer=optimizer, objective=objective, constraints=constraints
    ).plan


def split(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    at: Sequence[str],
    devices: Devices,
    microbatches: int = 1,
    schedule: str = "1f1b",
    memory: Memory = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
) -> ParallelModule:
    """The model cut before each module (or op) named in ``at``: part k runs on device k."""

    def read() -> Captured:
        return _capture(model, example_args, example_kwargs)

    def choose(captured: Captured, cluster: Cluster) -> Plan:
        names = [d.name for d in cluster.devices]
        if captured.live:
            return plan_live(children_bytes(model), type(model).__name__, names, at=tuple(at), reason=captured.live)
        plan = plan_from_cuts(captured.graph, tuple(at), names, microbatches=microbatches, schedule=schedule)
        require(plan, captured.graph, cluster)
        return plan

    if launched():
        from partita.ranks import divide as divide_over_ranks

        return divide_over_ranks(model, capture=read, choose=choose, devices=devices, memory=memory, loss_fn=loss_fn)
    cluster = local_cluster(devices, memory)
    return ParallelModule(model, choose(read(), cluster), cluster, loss_fn=loss_fn)


def ModelParallel(
    module: nn.Module,
    device_ids: Sequence[int | str],
    *,
    split_at: Sequence[str] | None = None,
    **options: Any,
) -> LazyParallel:
    """In DistributedDataParallel's shape: divided at the first call, at ``split_at`` or where the planner says."""
    names = device_names(device_ids)

    def divide(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParallelModule:
        if split_at is None:
            return parallelize(model, args, kwargs, devices=names, **options)
        return split(model, args, kwargs, at=split_at, devices=names, **options)

    return LazyParallel(module, divide)


@contextlib.contextmanager
def autoparallel(devices: Devices = "auto", **options: Any) -> Iterator[None]:
    """Any model called inside the context, on this thread, is divided over the devices."""

    def divide(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParallelModule:
        return parallelize(model, args, kwargs, devices=devices, **options)

    with dividing(divide):
        yield


def verify(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    devices: Devices | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    seed: int = 1,
) -> Comparison:
    """Outputs, every named gradient and buffers of the divided model against the unsplit one, with one seed.

    ``devices`` None: those the plan names. Tensors beyond the tolerances are judged against the unsplit model in
    float64, whose own float32 rounding is allowed (and reported). The model, its gradients and the random state are
    left as they were. In processes started by ``torchrun`` copies of the model are compared; every rank must call it.
    """
    args, kwargs = tuple(example_args), dict(example_kwargs or {})
    chosen = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    if devices is None:
        devices = list(chosen.devices) if chosen is not None and chosen.devices else "auto"

    def divided(subject: nn.Module) -> ParallelModule:
        return parallelize(subject, args, kwargs, devices=devices, plan=chosen)

    if launched():
        from partita.ranks import verify as verify_over_ranks

        return verify_over_ranks(model, args, kwargs, divided, rtol=rtol, atol=atol, seed=seed)
    parallel = divided(model)
    try:
        expected = observe(model, model, args, kwargs, seed=seed)
        actual = observe(parallel, model, args, kwargs, seed=seed)
        found = compare(expected, actual, rtol=rtol, atol=atol)
        return found if found.ok else allow_rounding(found, expected, actual, observe64(model, args, kwargs, seed=seed))
    finally:
        parallel.close()


def _capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Captured:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model must be an nn.Module; got {type(model).__name__}. Give the model itself, not its class"
        )
    if isinstance(args, torch.Tensor):
        raise UsageError("example_args is a tensor; give a tuple of the call's arguments: example_args=(x,)")
    return capture(model, tuple(args), dict(kwargs or {}))
