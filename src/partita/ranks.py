"""``parallelize`` inside processes started together: rank 0 plans, all receive the plan, and what must agree is
compared."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from partita.capture import Captured
from partita.cluster import Cluster
from partita.errors import PlanError, UsageError
from partita.measure.ranks import rank_cluster
from partita.plan import Plan
from partita.plan_text import explain_later
from partita.runtime.compare import Comparison, allow_rounding, compare, observe, observe64
from partita.runtime.distributed import World, join_world
from partita.runtime.distributed.holding import same_everywhere
from partita.runtime.distributed.module import RankModule
from partita.runtime.distributed.world import elsewhere
from partita.united import is_united, members


def divide(
    model: nn.Module,
    *,
    capture: Callable[[], Captured],
    choose: Callable[[Captured, Cluster], Plan],
    devices: int | str | Sequence[str] | Cluster,
    memory: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
) -> RankModule:
    """The model divided over the ranks. ``choose`` runs on rank 0 only. Collective.

    Raises on every rank what any rank raises; UsageError where the ranks' models differ.
    """
    world = join_world()
    cluster = rank_cluster(world, devices, memory)
    captured: list[Captured] = []
    prints = world.together("reading the model", lambda: fingerprint(model, _kept(captured, capture())))
    disagree(prints, world.rank)
    same_random_state(world)
    note = same_everywhere(world, model)
    chosen = world.first("the plan", lambda: _of_ranks(choose(captured[0], cluster)))
    if world.rank:
        explain_later(
            chosen, lambda: ("what more memory, other links or devices would bring: rank 0's explain() says",)
        )
    if world.rank == 0:
        if note:
            print(f"partita: {note}", file=sys.stderr)
        if captured[0].live:
            print(
                f"partita: this model cannot be divided over processes, so every rank runs all of it: "
                f"{captured[0].live}",
                file=sys.stderr,
            )
    return RankModule(model, chosen, cluster, world=world, captured=captured[0], loss_fn=loss_fn)


def _of_ranks(plan: Plan) -> Plan:
    """Raises PlanError for what only one process can do."""
    united = [d for stage in plan.stages for d in stage.devices if is_united(d)]
    if united:
        raise PlanError(
            f"the plan uses {united[0]!r} as one device; ranks are processes and cannot be one. Give the stage "
            f"[{', '.join(members(united[0]))}] as replicas or with tensor: {len(members(united[0]))}"
        )
    return plan


def verify(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], divide: Callable[[nn.Module], nn.Module], *,
    rtol: float, atol: float, seed: int,
) -> Comparison:  # fmt: skip
    """What a copy of the model, divided over the ranks, computes beside the undivided one on every rank; where it
    differs on some rank, the first such rank's findings, on all. Collective."""
    parallel = divide(copy.deepcopy(model))
    assert isinstance(parallel, RankModule)
    try:
        plain = copy.deepcopy(model)
        plain.load_state_dict(parallel.state_dict())  # rank 0's, where the ranks' models differed
        expected = observe(plain, plain, args, kwargs, seed=seed)
        actual = observe(parallel, parallel.module, args, kwargs, seed=seed, whole_gradients=parallel.gradients)
        found = compare(expected, actual, rtol=rtol, atol=atol)
        if not found.ok:
            found = allow_rounding(found, expected, actual, observe64(plain, args, kwargs, seed=seed))
        every = parallel.world.gather(found, "what the ranks found")
        return next((other for other in every if not other.ok), found)
    finally:
        parallel.close()


def _kept(into: list[Captured], captured: Captured) -> Captured:
    into.append(captured)
    return captured


def fingerprint(model: nn.Module, captured: Captured) -> dict[str, Any]:
    """What must be alike on all ranks, by what it is called in an error."""
    tensors: dict[str, tuple[object, ...]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensors[name] = tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad
    return {
        "partita": sys.modules["partita"].__version__,
        "torch": torch.__version__,
        "parameters": tensors,
        "mode": "train" if model.training else "eval",
        "operations": captured.graph.fingerprint,
        "captured": captured.live or "as a graph",
    }


def disagree(prints: Sequence[dict[str, Any]], here: int) -> None:
    """Raise UsageError that names the first rank whose model is not rank 0's, and what differs."""
    first = prints[0]
    for rank, other in enumerate(prints):
        for what, value in first.items():
            if other[what] == value:
                continue
            if isinstance(value, dict):
                name = next(n for n in {**value, **other[what]} if value.get(n) != other[what].get(n))
                found = f"{name} is {other[what].get(name, 'not there')}, on rank 0 {value.get(name, 'not there')}"
            else:
                found = f"{what} is {other[what]}, on rank 0 {value}"
            error = UsageError(
                f"rank {rank}'s model is not rank 0's: {found}. Build the same model on every rank, with the same "
                "versions installed"
            )
            raise elsewhere(error) if here else error


def same_random_state(world: World) -> None:
    """All ranks continue with rank 0's random numbers, as one process would."""
    state: torch.Tensor = world.from_first(torch.get_rng_state() if world.rank == 0 else None, "the random state")
    torch.set_rng_state(state)
