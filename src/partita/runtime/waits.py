"""Waits: what the devices of one process wait for in a step, so that nobody waits for what cannot come.

    cpu:0   waits: all_gather of op a      cpu:1   waits: all_gather of op a     both are there: it goes on
    cpu:0   waits: all_gather of op a      cpu:1   has ended                     nobody can bring it: Deadlock

What a blocked device waits for comes from a device that runs. So where all that have not ended are blocked, and what
none of them waits for is there, they would wait for ever (Holt 1972, without his resources). This is found by the
last to block or to end, at once: no clock says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from partita.errors import ExecutionError


class Stopped(Exception):
    """Another device failed, or the caller gave up: end the step quietly."""


class Deadlock(ExecutionError):
    """The devices of a step wait for one another, or the members of a group do different things together."""


class Waits:
    """One step's. ``devices``: those that walk; ``stopped``: whether the step is over for all."""

    def __init__(self, devices: Iterable[str] = ()) -> None:
        self.stopped = False
        self._walking = dict.fromkeys(devices)
        self._ended: list[str] = []
        self._blocked: dict[str, tuple[str, Callable[[], bool]]] = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    @contextmanager
    def walking(self, device: str, doing: Callable[[], str]) -> Iterator[None]:
        """While open, this thread is the device's. ``doing``: what it does, in words. Where it ends and leaves the
        others waiting for it, Deadlock is raised here; where it fails, whoever calls stops the step."""
        self._here.device, self._here.doing = device, doing
        try:
            yield
        finally:
            self._here.device = None
        with self._lock:
            self._walking.pop(device, None)
            self._ended.append(device)
            self._look()

    @contextmanager
    def waiting(self, what: str, ready: Callable[[], bool]) -> Iterator[None]:
        """While open, this thread is blocked until ``ready()``, which others make true and nobody false again before
        this thread goes on. Raises Deadlock where that cannot come."""
        device = getattr(self._here, "device", None)
        if device is None:
            yield
            return
        with self._lock:
            self._blocked[device] = f"{self._here.doing()}: waits for {what}", ready
            self._look()
        try:
            yield
        finally:
            with self._lock:
                self._blocked.pop(device, None)

    def _look(self) -> None:
        """Under the lock, after a device has blocked or ended."""
        if self.stopped or not self._walking or len(self._blocked) < len(self._walking):
            return
        if any(ready() for _, ready in self._blocked.values()):
            return
        lines = [f"{device}, {what}" for device, (what, _) in sorted(self._blocked.items())]
        lines += [f"{device} has ended its part" for device in sorted(self._ended)]
        raise Deadlock(differ("the devices wait for one another, and none can go on", lines))


def differ(what: str, lines: list[str]) -> str:
    """What is said where the devices of a step do not do the same."""
    return (
        f"{what}:" + "".join(f"\n  - {line}" for line in lines) + "\nAll of them must run the same operations in the "
        "same order. A hook or an autograd function that acts by device, thread or values of its own rows breaks that; "
        "without one, please report this."
    )
