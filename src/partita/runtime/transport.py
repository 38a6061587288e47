"""Messages between the devices of one process: an inbox each, and one way to stop everybody.

A message is ``(key, value)``; ``key`` = (tensor, microbatch, sending segment or -1, is gradient). Sends never wait;
``receive`` waits for its key and keeps what else arrives meanwhile.
"""

from __future__ import annotations

import queue
from collections.abc import Hashable
from typing import Any


class Stopped(Exception):
    """Another device failed, or the caller gave up: end the step quietly."""


class Exchange:
    """One step's mailboxes. Thread-safe; ``stop`` wakes every receiver. ``stopped``: whether it was called."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self._inbox: dict[str, queue.SimpleQueue[tuple[Hashable, Any]]] = {d: queue.SimpleQueue() for d in devices}
        self._early: dict[str, dict[Hashable, Any]] = {d: {} for d in devices}
        self.stopped = False

    def send(self, device: str, key: Hashable, value: Any) -> None:
        self._inbox[device].put((key, value))

    def receive(self, device: str, key: Hashable) -> Any:
        """The value sent under ``key``; raises Stopped when the step was stopped."""
        early, inbox = self._early[device], self._inbox[device]
        if key in early:
            return early.pop(key)
        while not self.stopped:
            found, value = inbox.get()
            if found == key:
                return value
            early[found] = value
        raise Stopped

    def stop(self) -> None:
        self.stopped = True
        for inbox in self._inbox.values():
            inbox.put((("stop",), None))
