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
from typing import Any, TypeAlias

import torch

from partita.cluster import Device
from partita.runtime.waits import Stopped

Job = Callable[[], None]


Inbox: TypeAlias = "queue.SimpleQueue[Job | None]"


def _serve(jobs: Inbox, device: Device, ready: threading.Event) -> None:
    try:
        if device.cores:
            with contextlib.suppress(OSError, AttributeError):
                os.sched_setaffinity(0, device.cores)
            torch.get_num_threads()  # a thread takes the default when it first asks; what it sets before that is lost
            torch.set_num_threads(len(device.cores))
    finally:
        ready.set()
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job


def _close(inboxes: list[Inbox], threads: list[threading.Thread], pid: int) -> None:
    """Ask every thread to end, and wait a moment for those that are idle (all, unless a step was given up)."""
    if os.getpid() != pid:  # a forked child has the objects, but not the threads
        return
    for inbox in inboxes:
        inbox.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=1.0)


def _guarded(
    job: Job, stop: Callable[[], None], finished: list[BaseException | None], bell: queue.SimpleQueue[None]
) -> Job:
    """The job, which once only enters in ``finished`` how it ended, and rings."""
    left = [job]

    def run() -> None:
        if not left:
            return
        error: BaseException | None = None
        try:
            left.pop()()
        except BaseException as caught:  # handed to the caller
            stop()
            error = caught
        finished.append(error)
        bell.put(None)

    return run


class Team:
    """Runs one job per device at the same time and waits for all of them."""

    def __init__(self, devices: tuple[Device, ...]) -> None:
        self.devices = devices
        self._jobs: dict[str, Inbox] = {}
        self._pid = 0
        self._lock = threading.Lock()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def _start(self) -> None:
        if self._jobs and self._pid == os.getpid():
            return
        default = torch.get_num_threads()
        jobs: dict[str, Inbox] = {device.name: queue.SimpleQueue() for device in self.devices}
        threads: list[threading.Thread] = []
        finalizer = weakref.finalize(self, _close, list(jobs.values()), threads, os.getpid())
        try:
            for device in self.devices:
                ready = threading.Event()
                work = jobs[device.name], device, ready
                threads.append(threading.Thread(target=_serve, args=work, name=f"partita {device.name}", daemon=True))
                threads[-1].start()
                ready.wait()
        except BaseException:  # Ctrl-C half way: those that run end again
            threads[:] = [t for t in threads if t.ident is not None]
            finalizer()
            raise
        finally:
            torch.set_num_threads(default)  # the default for threads that have not asked yet
        self._jobs, self._pid, self._finalizer = jobs, os.getpid(), finalizer

    def run(self, jobs: Mapping[str, Callable[[], None]], stop: Callable[[], None]) -> None:
        """Run ``jobs[device]`` on each device's thread. The first real failure is raised here, after all ended.

        ``stop`` must make the others end soon; it is called on the first failure and on Ctrl-C.
        """
        finished: list[BaseException | None] = []
        with self._lock:
            self._start()
            interrupt = self._carry_out(jobs, stop, finished)
        if interrupt is not None:
            raise interrupt
        failed = [error for error in finished if error is not None]
        if failed:
            first = next((error for error in failed if not isinstance(error, Stopped)), failed[0])
            finished.clear()
            failed.clear()
            try:
                raise first
            finally:
                del first  # an error that holds its own frame would keep the step alive

    def _carry_out(
        self, jobs: Mapping[str, Callable[[], None]], stop: Callable[[], None], finished: list[BaseException | None]
    ) -> BaseException | None:
        """Hand out the jobs and wait until each has ended, come what may. Returns the Ctrl-C that came meanwhile."""
        bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        waiting = [(device, _guarded(job, stop, finished, bell)) for device, job in jobs.items()]
        interrupt: BaseException | None = None
        while len(finished) < len(jobs):
            try:
                while waiting:  # after a Ctrl-C too: a stopped step ends at once on every device
                    device, job = waiting[-1]
                    self._jobs[device].put(job)
                    waiting.pop()
                with contextlib.suppress(queue.Empty):
                    bell.get(timeout=0.5)
            except KeyboardInterrupt as pressed:  # the jobs are waited for: they hold the model's buffers
                interrupt = pressed
                stop()
        return interrupt

    def close(self) -> None:
        """End the threads; the next step starts new ones."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
                self._finalizer = None
            self._jobs = {}
