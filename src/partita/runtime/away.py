"""Away: saved activations that wait in host memory between forward and backward, copied beside the computing.

    with away:                    saved tensors become handles (``torch.autograd.graph.saved_tensors_hooks``)
        v3 = gelu(v2)
        away.send(v2)             the memory behind v2 begins to go
                                  at the range's end: the range before has gone, or is waited for

In backward the first handle of a range that is opened brings the range, if it has gone, and begins to fetch the one
before it. A storage goes once, however many tensors view it. On a GPU copies run on a stream of their own, to pinned
memory; the device's copy is dropped only after the computing stream has waited for it, so that its memory can be used
again at once and in order, however far Python is ahead. On CPU cores the same happens with copies in place.
``cost.away`` counts what this does.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from partita.runtime.meter import counted_on, host_of


class Held:
    """A storage that autograd saved, with the ``views`` of it. Once sent: its bytes ``here``, on the device, or
    ``there``, on the host, or both, and what the views were. ``lent``: a copy of what lives on the host."""

    __slots__ = ("__weakref__", "forms", "here", "lent", "range", "there", "views")

    def __init__(self) -> None:
        self.lent = False
        self.views: list[torch.Tensor] = []
        self.forms: list[tuple[torch.dtype, Any, torch.Size, tuple[int, ...]]] = []
        self.here: torch.Tensor | None = None
        self.there: torch.Tensor | None = None
        self.range: Range | None = None

    def leave(self, range_: Range) -> torch.Tensor:
        """Its bytes, which are all that is left of it."""
        if self.here is None:
            storage = self.views[0].untyped_storage()
            self.here = torch.empty(0, dtype=torch.uint8, device=self.views[0].device).set_(storage)
        self.forms = [(v.dtype, v.storage_offset(), v.shape, v.stride()) for v in self.views]
        self.range, self.views = range_, []
        return self.here

    def view(self, number: int) -> torch.Tensor:
        if self.range is None:
            return self.views[number]
        self.range.bring()
        assert self.here is not None
        dtype, offset, shape, stride = self.forms[number]
        return torch.empty(0, dtype=dtype, device=self.here.device).set_(
            self.here.untyped_storage(), offset, shape, stride
        )


@dataclass(frozen=True, slots=True)
class Handle:
    """What autograd keeps in place of a tensor: which view of a held storage."""

    held: Held
    number: int


class Range:
    """What went of one range of ops in one forward. ``before``: the range whose backward comes next."""

    def __init__(self, traffic: Traffic, before: Range | None) -> None:
        self.traffic, self.before = traffic, before
        self.held: list[weakref.ref[Held]] = []
        self.fetching = self.brought = False
        self.ready: torch.cuda.Event | None = None

    def bring(self) -> None:
        """Have it here; begin to fetch the range before."""
        if self.brought:
            return
        self.fetch()
        self.brought = True
        self.traffic.wait(self.ready)
        if self.before is not None:
            self.before.fetch()

    def fetch(self) -> None:
        """Begin to, once; what has not left stays."""
        if not self.fetching:
            self.fetching = True
            if not self.traffic.stays(self):
                self.ready = self.traffic.bring([held for ref in self.held if (held := ref()) is not None])

    def __del__(self) -> None:
        if self.fetching and not self.brought:  # a backward that stopped half-way: its memory is not free before
            self.traffic.wait(self.ready)


class Traffic:
    """One device's copies to and from its host, in their order. ``name``: the device's."""

    def __init__(self, device: torch.device, name: str = "") -> None:
        self.device, self.host = device, host_of(name)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.leaving: deque[tuple[Range, list[Held], torch.cuda.Event | None]] = deque()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """After what the device has been told so far."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def note(self) -> torch.cuda.Event | None:
        """When all copies so far are done."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What the device is told from now on begins after it."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def send(self, held: Held, here: torch.Tensor) -> None:
        with counted_on(self.host):
            held.there = torch.empty(len(here), dtype=torch.uint8, pin_memory=self.stream is not None)
        self.copy(held.there, here)

    def left(self, gone: Range, held: list[Held]) -> None:
        """The range has ended; the one before it leaves the device."""
        self.leaving.append((gone, held, self.note()))
        while len(self.leaving) > 1:
            _, earlier, event = self.leaving.popleft()
            self.wait(event)
            for one in earlier:
                one.here = None

    def stays(self, range_: Range) -> bool:
        """Whether the range is here yet, and will not leave."""
        for item in self.leaving:
            if item[0] is range_:
                self.leaving.remove(item)
                for held in item[1]:
                    held.there = held.there if held.lent else None
                return True
        return False

    def bring(self, held: list[Held]) -> torch.cuda.Event | None:
        for one in held:
            assert one.there is not None
            one.here = torch.empty_like(one.there, device=self.device)
            self.copy(one.here, one.there)
            one.there = one.there if one.lent else None
        return self.note()


class Away:
    """One run of a segment's ranges: entered around each of them."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.last: Range | None = None
        self._now: Range | None = None
        self._held: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
        self._gone: list[Held] = []
        self._lent: list[Held] = []
        self._coming: dict[int, tuple[torch.Tensor, torch.cuda.Event | None]] = {}
        self._hooks: Any = None

    def __enter__(self) -> Away:
        self._now = Range(self.traffic, self.last)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._hooks = None  # which know this object
        now, self._now = self._now, None
        assert now is not None
        for held in self._lent:
            self._held.pop(held.leave(now).untyped_storage().data_ptr(), None)
            now.held.append(weakref.ref(held))
            self._gone.append(held)
        self._lent = []
        if self._gone:
            self.traffic.left(now, self._gone)
            self.last, self._gone = now, []

    def _pack(self, tensor: torch.Tensor) -> Any:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_conj():
            return tensor
        if tensor.is_neg() or not tensor.untyped_storage().nbytes() or tensor.device != self.traffic.device:
            return tensor
        key = tensor.untyped_storage().data_ptr()
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = Held()
        held.views.append(tensor)
        return Handle(held, len(held.views) - 1)

    def send(self, tensor: torch.Tensor) -> None:
        """The memory behind ``tensor``, if autograd saved it, goes to the host."""
        held = self._held.pop(tensor.untyped_storage().data_ptr(), None)
        if held is None:
            return
        assert self._now is not None
        self._now.held.append(weakref.ref(held))
        self.traffic.send(held, held.leave(self._now))
        self._gone.append(held)

    def ahead(self, leaves: list[torch.Tensor]) -> None:
        """Begin to copy these parameters to the device."""
        for leaf in leaves:
            if id(leaf) not in self._coming:
                here = torch.empty_like(leaf, device=self.traffic.device, requires_grad=False)
                self.traffic.copy(here, leaf.detach())
                self._coming[id(leaf)] = here, self.traffic.note()

    def lend(self, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        """The copies, for this range: gone at its end, and fetched again for its backward."""
        found = []
        for leaf in leaves:
            here, event = self._coming.pop(id(leaf))
            self.traffic.wait(event)
            held = self._held[here.untyped_storage().data_ptr()] = Held()
            held.here, held.there, held.lent = here, leaf.detach(), True
            self._lent.append(held)
            lent: torch.Tensor = _Lent.apply(leaf, here, self.traffic)  # type: ignore[no-untyped-call]
            found.append(lent)
        return found


class _Lent(torch.autograd.Function):
    """A parameter's copy on the device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, here: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        ctx.traffic, ctx.home = traffic, leaf.device
        return here

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with counted_on(ctx.traffic.host):
            home = torch.empty_like(grads[0], device=ctx.home)
        return home.copy_(grads[0]), None, None


def _unpack(kept: Any) -> torch.Tensor:
    found: torch.Tensor = kept.held.view(kept.number) if isinstance(kept, Handle) else kept
    return found


_current = threading.local()


def use_traffic(traffic: Traffic | None) -> None:
    """Of the calling thread's forwards."""
    _current.traffic = traffic


def away(device: torch.device) -> Away:
    """For one run of a segment on this thread's device."""
    traffic = getattr(_current, "traffic", None)
    return Away(traffic if traffic is not None else Traffic(device))
