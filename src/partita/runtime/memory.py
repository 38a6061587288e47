"""Memory: bytes of tensors alive on one device, counted as they come and go.

One ``MemoryMeter`` a worker thread: a dispatch mode that sees every op of its thread (forward and backward) and adds
the storages the ops make; a storage counts once however many tensors view it, and stops counting when its last tensor
is gone, on whatever thread that happens. Exact for tensors; scratch space inside one kernel is not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from partita.cost.away import has_host
from partita.cost.memory import shares_memory
from partita.runtime.loss import WithLoss
from partita.torch_compat import TorchDispatchMode, local_part, pytree

if TYPE_CHECKING:
    from partita.runtime.module import ParallelModule


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages made while it is active on this thread. ``live_bytes`` now, ``peak_bytes`` at the most.

    ``hold`` adds storages made elsewhere. ``adopt``: whatever an op reads is held from then on too (inputs, buffers),
    except what ``ignore`` named or one of ``others`` made. ``resized``: storages change their size behind the ops' back
    (ZeRO 3), so every op looks at all. A meter may be entered many times; what was alive stays counted.
    """

    def __init__(self, *, adopt: bool = False, resized: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.adopt, self.resized = adopt, resized
        self.others: tuple[MemoryMeter, ...] = ()
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._made: dict[int, weakref.ref[Any]] = {}
        self._gone: deque[tuple[int, weakref.ref[Any]]] = deque()  # appended to by whoever drops the last tensor
        self._ignored: dict[int, Any] = {}
        self._lock = threading.RLock()
        self._live = 0
        self._peak = 0

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""
        with self._lock:
            self._settle()
            return self._live

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at one time since the beginning or ``reset_peak``."""
        return self._peak

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        with self._lock:
            self._settle()
            self._peak = self._live

    def made(self, tensor: torch.Tensor) -> bool:
        """Whether an op under this meter made the tensor's memory."""
        storage = tensor.untyped_storage()
        found = self._made.get(id(storage))
        return found is not None and found() is storage

    def hold(self, values: Any) -> None:
        """Count the tensors in ``values`` (any structure) until they are gone, as if made here."""
        for tensor in _tensors(values):
            self._add(tensor)

    def hold_bytes(self, nbytes: int) -> None:
        """Count so many bytes for good."""
        with self._lock:
            self._live += nbytes
            self._peak = max(self._peak, self._live)

    def ignore(self, values: Any) -> None:
        """Never count the tensors in ``values``: another device's. They are kept alive as long as the meter."""
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            self._ignored[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        other = getattr(_here, "counted_on", None)
        if other is not None and other is not self:
            return other._count(func, args, kwargs, adopt=False)
        return self._count(func, args, kwargs, adopt=self.adopt)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, adopt: bool) -> Any:
        inputs = _tensors((args, kwargs))
        given = {id(t.untyped_storage()) for t in inputs}
        if adopt:
            for tensor in inputs:
                if not any(other.made(tensor) for other in self.others):
                    self._add(tensor)
        result = func(*args, **kwargs)
        with self._lock:
            self._settle()  # the identity of a storage that is gone may be taken by another
            if self.resized:
                self._look_again()
        for tensor in _tensors(result):
            key = id(tensor.untyped_storage())
            if key in self._known or key not in given:  # a view or an in-place result makes nothing
                self._add(tensor)
            if key not in given and key in self._known:
                self._made[key] = self._known[key][0]
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._ignored:
            return
        with self._lock:
            self._settle()
            known = self._known.get(key)
            if known is not None:
                self._live += size - known[1]  # resized in place
                self._known[key] = (known[0], size)
            else:
                gone = self._gone
                self._known[key] = (weakref.ref(storage, lambda ref: gone.append((key, ref))), size)
                self._live += size
            self._peak = max(self._peak, self._live)

    def _look_again(self) -> None:
        for key, (ref, before) in self._known.items():
            storage = ref()
            if storage is not None and storage.nbytes() != before:
                self._known[key] = ref, storage.nbytes()
                self._live += storage.nbytes() - before
        self._peak = max(self._peak, self._live)

    def _settle(self) -> None:
        """Take off what has gone. A finalizer may run at any allocation, so it only leaves a note; no lock there."""
        while self._gone:
            key, ref = self._gone.popleft()
            known = self._known.get(key)
            if known is not None and known[0] is ref:
                del self._known[key]
                self._made.pop(key, None)
                self._live -= known[1]


_here = threading.local()


@contextmanager
def counted_on(device: str) -> Iterator[None]:
    """What this thread makes meanwhile counts as that device's, where memory is being measured and it has a meter."""
    meters = getattr(_here, "meters", None)
    if meters is None or device not in meters:
        yield
        return
    _here.counted_on = meters[device]
    try:
        yield
    finally:
        _here.counted_on = None


def host_of(device: str) -> str:
    """What the host's memory is counted as, beside a device that is apart from it."""
    return f"host of {device}"


def storage_bytes(values: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    storages = [t.untyped_storage() for t in _tensors(list(values))]
    return sum({id(s): s.nbytes() for s in storages}.values())


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
    try:
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
                meters[device].hold_bytes(round(share * (storage_bytes([whole]) + storage_bytes(_tensors(state)))))
        outside = MemoryMeter()
        meters.update(apart)
        with _metered(parallel, meters), outside:
            if parallel.training:
                parallel.train_step(*args, **dict(kwargs or {}))
            else:
                with torch.no_grad():
                    parallel(*args, **dict(kwargs or {}))
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
        ordinary({device: _under(meters, device, job) for device, job in jobs.items()}, stop)

    team.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del team.run


def _under(meters: Mapping[str, MemoryMeter], device: str, job: Callable[[], None]) -> Callable[[], None]:
    def metered() -> None:
        if device not in meters:
            return job()
        _here.meters = meters
        try:
            with meters[device]:
                job()
        finally:
            _here.meters = None
        return None

    return metered


def _tensors(value: Any) -> list[torch.Tensor]:
    return [local_part(t) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
