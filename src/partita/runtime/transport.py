"""Messages between the devices of one process: an inbox each, and one way to stop everybody.

A message is ``(key, value)``; ``key`` = (tensor, microbatch, sending segment or -1, is gradient). Sends never wait;
``receive`` waits for its key and keeps what else arrives meanwhile.
"""

from __future__ import annotations

import queue
from collections.abc import Hashable, Iterable
from typing import Any

from partita.runtime.waits import Stopped, Waits

SOON_SECONDS = 0.02
"""A message that comes within this is not asked after: a wait is noted, and what it may mean thought about, later."""


class Exchange:
    """One step's mailboxes. Thread-safe; ``stop`` wakes every receiver. ``stopped``: whether it was called.

    ``walking``: the devices that take part (all of them, unless said).
    """

    def __init__(self, devices: tuple[str, ...], walking: Iterable[str] | None = None) -> None:
        self._inbox: dict[str, queue.SimpleQueue[tuple[Hashable, Any]]] = {d: queue.SimpleQueue() for d in devices}
        self._early: dict[str, dict[Hashable, Any]] = {d: {} for d in devices}
        self._sent: dict[str, list[Hashable]] = {d: [] for d in devices}  # all keys, each before its value
        self._taken = dict.fromkeys(devices, 0)
        self.waits = Waits(devices if walking is None else walking)
        self.stopped = False

    def send(self, device: str, key: Hashable, value: Any) -> None:
        self._sent[device].append(key)
        self._inbox[device].put((key, value))

    def receive(self, device: str, key: Hashable) -> Any:
        """The value sent under ``key``. Raises Stopped when the step was stopped, Deadlock where it cannot come."""
        early, inbox = self._early[device], self._inbox[device]
        if key in early:
            return early.pop(key)
        while not self.stopped:
            try:
                found, value = inbox.get(timeout=SOON_SECONDS)
            except queue.Empty:
                with self.waits.waiting(_said(key), lambda: len(self._sent[device]) > self._taken[device]):
                    found, value = inbox.get()
            self._taken[device] += 1  # after the wait: what is on its way in is seen to be there
            if found == key:
                return value
            early[found] = value
        raise Stopped

    def stop(self) -> None:
        self.stopped = self.waits.stopped = True
        for inbox in self._inbox.values():
            inbox.put((("stop",), None))


def _said(key: Hashable) -> str:
    """A message's key in words."""
    if isinstance(key, tuple) and len(key) == 4:
        tensor, microbatch, _, grad = key
        return f"{'the gradient of ' if grad else ''}{tensor}, microbatch {microbatch}"
    return str(key)


__all__ = ["Exchange", "Stopped"]
