"""Messages between the devices of one process: an inbox each, and one way to stop everybody.

A message is ``(key, value)``; ``key`` = (tensor, microbatch, sending segment or -1, is gradient). Sends never wait;
``receive`` waits for its key and keeps what else arrives meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Hashable
from typing import Any


class Stopped(Exception):
    """Another device failed, or the caller gave up: end the step quietly."""


class Exchange:
    """One step's mailboxes. Thread-safe; ``stop`` wakes every receiver."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self._inbox: dict[str, queue.SimpleQueue[tuple[Hashable, Any]]] = {d: queue.SimpleQueue() for d in devices}
        self._early: dict[str, dict[Hashable, Any]] = {d: {} for d in devices}
        self._stopped = threading.Event()

    def send(self, device: str, key: Hashable, value: Any) -> None:
        self._inbox[device].put((key, value))

    def receive(self, device: str, key: Hashable) -> Any:
        """The value sent under ``key``; raises Stopped when the step was stopped."""
        early = self._early[device]
        inbox = self._inbox[device]
        while key not in early:
            if self._stopped.is_set():
                raise Stopped
            found, value = inbox.get()
            early[found] = value
        return early.pop(key)

    def stop(self) -> None:
        self._stopped.set()
        for inbox in self._inbox.values():
            inbox.put((("stop",), None))

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()
