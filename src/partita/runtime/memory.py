"""Memory: the most bytes that each device of a divided model has alive in one step, measured (``meter``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from partita.cost.away import has_host
from partita.cost.memory import shares_memory
from partita.runtime.loss import WithLoss
from partita.runtime.meter import MemoryMeter, host_of, local_tensors, note_made, storage_bytes, under
from partita.torch_compat import compiled_allocations

if TYPE_CHECKING:
    from partita.runtime.module import ParallelModule


def measure_memory(
    parallel: ParallelModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """Peak bytes on each device in one ``train_step`` (a forward, where ``parallel`` is in eval mode); afterwards the
    gradients are as they were.

    Counts as the prediction does: parameters (a shared one with its first device; of one whose rows are dealt out, each
    device its own), gradients (of replicas that make them together, with the first), the state ``optimizer`` has now,
    and activations; where devices share a memory, what one sends another stays its own until nobody needs it.
    ``"caller"``: made outside the devices; ``"host of cuda:0"``: what a plan's ``offload`` keeps there, where the
    device has a memory apart from its host's (``Device.host_bandwidth``).
    """
    module = parallel.module
    kept = {p: p.grad for p in module.parameters()}
    for parameter in kept:
        parameter.grad = None

    def step() -> None:
        if parallel.training:
            parallel.train_step(*args, **dict(kwargs or {}))
        else:
            with torch.no_grad():
                parallel(*args, **dict(kwargs or {}))

    try:
        _compiled_first(parallel, step)
        owners = _owners(parallel, args, dict(kwargs or {}))
        meters = {device: MemoryMeter(adopt=True) for device in owners}
        apart = {host_of(d.name): MemoryMeter() for d in parallel._team.devices if has_host(d)}
        for device, meter in meters.items():
            meter.others = tuple(m for d, m in meters.items() if d != device and shares_memory(d))
            meter.others += tuple(apart.values())
        for device, held in owners.items():
            if shares_memory(device):
                meters[device].ignore([*held.others, *(p for p, _ in held.rows)])
                meters[device].hold(held.mine)
            for meter in [apart[host_of(device)]] if held.hosted else []:
                meter.hold(held.hosted)
                meter.hold([optimizer.state[p] for p in held.hosted if optimizer and p in optimizer.state])
                for other in meters.values():
                    other.ignore(held.hosted)
            if optimizer is not None:
                meters[device].hold([optimizer.state[p] for p in held.mine if p in optimizer.state])
            for whole, share in held.rows:
                state = optimizer.state.get(whole, {}) if optimizer is not None else {}
                meters[device].hold_bytes(round(share * (storage_bytes([whole]) + storage_bytes(local_tensors(state)))))
        outside = MemoryMeter()
        meters.update(apart)
        with _metered(parallel, meters), outside:
            step()
        unused = [name for name, meter in apart.items() if not meter.peak_bytes]
        found = {device: meter.peak_bytes for device, meter in meters.items() if device not in unused}
        return {**found, "caller": outside.peak_bytes}
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad


@dataclass(eq=False)
class _Held:
    """Parameters one device keeps, those it uses but another keeps, those of which it keeps a share, and those that its
    host keeps."""

    mine: list[torch.Tensor] = field(default_factory=list)
    others: list[torch.Tensor] = field(default_factory=list)
    rows: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    hosted: list[torch.Tensor] = field(default_factory=list)


def _owners(parallel: ParallelModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, _Held]:
    """What each device keeps of the parameters."""
    train = parallel.training
    forward = WithLoss(parallel.module, parallel.loss_fn) if train else parallel.module
    with torch.set_grad_enabled(train):
        bound = parallel._bind("step" if train else "call", forward, args, kwargs)
    if bound.engine is None:  # runs as its Python goes: every part is counted where its calls run
        return {d.name: _Held() for d in parallel._team.devices}
    lowered, parameters = bound.engine.lowered(bound.captured.graph.batch, train), bound.parameters
    program, division = lowered.step, lowered.division
    found = {member: _Held() for d in program.devices for member in program.members(d)}
    rank = {device: at for _, members in program.groups for at, device in enumerate(members)}
    users: dict[str, set[str]] = {}
    for segment, places in zip(program.segments, program.placement, strict=True):
        for use in segment.uses:
            if use.tensor in parameters:
                users.setdefault(use.tensor, set()).update(m for place in places for m in program.members(place))
    for name, devices in users.items():
        if not devices & set(found):  # the caller alone uses it
            continue
        keeper, *others = sorted(devices & set(found), key=list(found).index)
        if division is not None and name in division.members[0].shards:
            for device in (keeper, *others):
                part = division.members[rank.get(device, 0)].graph.tensor(name)
                whole = bound.captured.graph.tensor(name).nbytes(1)
                found[device].rows.append((parameters[name], part.nbytes(1) / max(whole, 1)))
            continue
        if name in program.lent and has_host(next(d for d in parallel._team.devices if d.name == keeper)):
            found[keeper].hosted.append(parameters[name])
            continue
        found[keeper].mine.append(parameters[name])
        for device in others:
            found[device].others.append(parameters[name])
    return found


@contextmanager
def _metered(parallel: ParallelModule, meters: Mapping[str, MemoryMeter]) -> Iterator[None]:
    """While open, each device's jobs run under its meter."""
    team = parallel._team
    ordinary = team.run

    def run(jobs: Mapping[str, Callable[[], None]], stop: Callable[[], None]) -> None:
        ordinary({device: under(meters, device, job) for device, job in jobs.items()}, stop)

    team.run = run  # type: ignore[method-assign]
    try:
        with compiled_allocations(note_made):
            yield
    finally:
        del team.run


def _compiled_first(parallel: ParallelModule, step: Callable[[], object]) -> None:
    """Run a step of which nothing stays, where the plan compiles: what a compilation takes is no step's."""
    if not any(stage.compile for stage in parallel.plan.stages):
        return
    buffers = [(b, b.clone()) for b in parallel.module.buffers()]
    with torch.random.fork_rng(devices=[]):
        step()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for parameter in parallel.module.parameters():
        parameter.grad = None
