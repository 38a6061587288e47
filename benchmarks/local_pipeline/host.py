"""Keeps each contestant in processes of its own and has it run steps when it is its turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

SETUP_SECONDS = 300.0


class Failed(Exception):
    """A contestant that could not go on; ``details`` is its own traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Guest:
    """One contestant: its processes (idle, blocked on a pipe, while others run) and what it said of itself."""

    def __init__(
        self, name: str, workload: str, *, folder: Path, optimizer: bool, quick: bool = False, device: str = "",
        limit: int = 0,
    ) -> None:  # fmt: skip
        from benchmarks.local_pipeline.guest import EVERYONE

        self.name = name
        self.about = EVERYONE[name]
        self.note = ""
        self._folder = folder
        self._links: list[Any] = []
        self._processes: list[Any] = []
        cores = sorted(os.sched_getaffinity(0))[:2]
        spawn = multiprocessing.get_context("spawn")
        rendezvous = tempfile.mktemp(dir=folder)
        for rank in range(self.about.ranks):
            here, there = spawn.Pipe()
            mine = {cores[c % len(cores)] for c in self.about.cores[rank]}
            words = (there, name, workload, rank, rendezvous, optimizer, mine, quick, device, limit)
            with _environment(self.about.threads, sorted(mine) if self.about.pinned else []):
                process = spawn.Process(target=_enter, args=words, daemon=True)
                process.start()
            there.close()
            self._links.append(here)
            self._processes.append(process)

    def wait_ready(self) -> None:
        """Until it has chosen its settings. Raises Failed."""
        self.note = self._answers(SETUP_SECONDS)[-1]

    def step(self, count: int = 1) -> tuple[float, float]:
        """(seconds a step, loss) of ``count`` steps in a row, the ranks' pipes included. Raises Failed."""
        start = perf_counter()
        for link in self._links:
            link.send(("step", count))
        losses = [x for x in self._answers(120.0) if not isnan(x)]
        return (perf_counter() - start) / count, sum(losses) / len(losses)

    def infer(self, count: int = 1) -> float:
        """Seconds an inference of ``count`` in a row. Raises Failed."""
        start = perf_counter()
        for link in self._links:
            link.send(("infer", count))
        self._answers(120.0)
        return (perf_counter() - start) / count

    def peak_bytes(self) -> int:
        """The most memory its processes have had, added up."""
        for link in self._links:
            link.send(("peak", None))
        return int(sum(self._answers(60.0)))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every named gradient of the last step, from whichever rank holds it."""
        found: dict[str, torch.Tensor] = {}
        paths = [self._folder / f"{self.name}-{rank}.pt" for rank in range(len(self._links))]
        for link, path in zip(self._links, paths, strict=True):
            link.send(("gradients", str(path)))
        self._answers(60.0)
        for path in paths:
            found.update(torch.load(path))
            path.unlink()
        return found

    def end(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(("end", None))
        for process in self._processes:
            process.join(3.0)
            if process.is_alive():
                process.kill()

    def _answers(self, seconds: float) -> list[Any]:
        found = []
        limit = perf_counter() + seconds
        for rank, link in enumerate(self._links):
            while not link.poll(0.5):
                if not self._processes[rank].is_alive():
                    raise Failed(f"its process ended with code {self._processes[rank].exitcode}")
                if perf_counter() > limit:
                    raise Failed(f"no answer within {seconds:.0f} s (rank {rank})")
            try:
                word, *rest = link.recv()
            except EOFError:
                raise Failed(f"its process ended with code {self._processes[rank].exitcode}") from None
            if word == "error":
                raise Failed(*rest)
            found.append(rest[0])
        return found


@contextlib.contextmanager
def _environment(threads: int | None, pinned: list[int]) -> Iterator[None]:
    """What a new process must find set before torch is loaded."""
    wanted = {"GLOO_SOCKET_IFNAME": "lo"}
    if threads is not None:
        wanted["OMP_NUM_THREADS"] = str(threads)
    if pinned:
        wanted["GOMP_CPU_AFFINITY"] = " ".join(map(str, pinned))
    kept = {name: os.environ.pop(name, None) for name in (*wanted, "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY")}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _enter(
    connection: Any, name: str, workload: str, rank: int, rendezvous: str, optimizer: bool, cores: set[int],
    quick: bool, device: str, limit: int,
) -> None:  # fmt: skip
    os.sched_setaffinity(0, cores)
    from benchmarks.local_pipeline.guest import serve

    serve(connection, name, workload, rank, rendezvous, optimizer, quick, device, limit)
