"""Meter: bytes of tensors alive on one device, counted as they come and go.

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
from typing import Any

import torch

from partita.torch_compat import TorchDispatchMode, local_part, pytree


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

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch: compiled code runs under this mode too

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
        for tensor in local_tensors(values):
            self._add(tensor)

    def hold_bytes(self, nbytes: int) -> None:
        """Count so many bytes for good."""
        with self._lock:
            self._live += nbytes
            self._peak = max(self._peak, self._live)

    def ignore(self, values: Any) -> None:
        """Never count the tensors in ``values``: another device's. They are kept alive as long as the meter."""
        for tensor in local_tensors(values):
            storage = tensor.untyped_storage()
            self._ignored[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        other = getattr(_here, "counted_on", None)
        if other is not None and other is not self:
            return other._count(func, args, kwargs, adopt=False)
        return self._count(func, args, kwargs, adopt=self.adopt)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, adopt: bool) -> Any:
        inputs = local_tensors((args, kwargs))
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
        for tensor in local_tensors(result):
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


def note_made(tensor: torch.Tensor) -> None:
    """Count a tensor that this thread made by no op."""
    meter = getattr(_here, "counted_on", None) or getattr(_here, "mine", None)
    if meter is not None:
        meter.hold([tensor])


def host_of(device: str) -> str:
    """What the host's memory is counted as, beside a device that is apart from it."""
    return f"host of {device}"


def storage_bytes(values: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    storages = [t.untyped_storage() for t in local_tensors(list(values))]
    return sum({id(s): s.nbytes() for s in storages}.values())


def under(meters: Mapping[str, MemoryMeter], device: str, job: Callable[[], None]) -> Callable[[], None]:
    """The device's job, run under its meter."""

    def metered() -> None:
        if device not in meters:
            return job()
        _here.meters, _here.mine = meters, meters[device]
        try:
            with meters[device]:
                job()
        finally:
            _here.meters = _here.mine = None
        return None

    return metered


def local_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in any structure; of a DTensor, this rank's part."""
    return [local_part(t) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
