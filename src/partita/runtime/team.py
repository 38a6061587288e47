"""A worker thread per device, pinned to the device's cores, and the caller's side of a step.

Threads start at first use and end when their Team is collected, closed, or the process exits.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from partita.cluster import Device

Job = Callable[[], None]


def _serve(jobs: queue.SimpleQueue[Job | None], device: Device, ready: threading.Event) -> None:
    if device.cores:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, device.cores)
        threads = torch.get_num_threads()
        torch.set_num_threads(len(device.cores))
        del threads
    ready.set()
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job


def _close(jobs: list[queue.SimpleQueue[Job | None]]) -> None:
    for inbox in jobs:
        inbox.put(None)


class Team:
    """Runs one job per device at the same time and waits for all of them."""

    def __init__(self, devices: tuple[Device, ...]) -> None:
        self.devices = devices
        self._jobs: dict[str, queue.SimpleQueue[Job | None]] = {}
        self._lock = threading.Lock()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def _start(self) -> None:
        if self._jobs:
            return
        threads = torch.get_num_threads()
        for device in self.devices:
            jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
            ready = threading.Event()
            threading.Thread(
                target=_serve, args=(jobs, device, ready), name=f"partita {device.name}", daemon=True
            ).start()
            ready.wait()
            self._jobs[device.name] = jobs
        torch.set_num_threads(threads)  # the default for threads that have not asked yet
        self._finalizer = weakref.finalize(self, _close, list(self._jobs.values()))

    def run(self, jobs: Mapping[str, Callable[[], None]], stop: Callable[[], None]) -> None:
        """Run ``jobs[device]`` on each device's thread. The first real failure is raised here, after all ended.

        ``stop`` must make the others end soon; it is called on the first failure and on Ctrl-C.
        """
        with self._lock:
            self._start()
            done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

            def wrap(job: Callable[[], None]) -> Job:
                def guarded() -> None:
                    try:
                        job()
                    except BaseException as error:  # handed to the caller
                        stop()
                        done.put(error)
                    else:
                        done.put(None)

                return guarded

            for device, job in jobs.items():
                self._jobs[device].put(wrap(job))
            errors: list[BaseException] = []
            interrupt: BaseException | None = None
            waiting = len(jobs)
            while waiting:
                try:
                    error = done.get(timeout=0.5)
                except queue.Empty:
                    continue
                except KeyboardInterrupt as pressed:
                    interrupt = pressed
                    stop()
                    continue
                waiting -= 1
                if error is not None:
                    errors.append(error)
        if interrupt is not None:
            raise interrupt
        from partita.runtime.transport import Stopped

        real = [e for e in errors if not isinstance(e, Stopped)]
        if real:
            raise real[0]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads; the next step starts new ones."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
                self._finalizer = None
            self._jobs = {}
