"""Ranks as processes of this machine, as torchrun starts them: for tests that look at what each rank says and
returns."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Ended:
    """One rank's end: its exit code (negative: the signal), what it wrote, seconds after the start. ``wrong``: when it
    said ``goes wrong at`` (0: never)."""

    code: int
    out: str
    err: str
    seconds: float
    wrong: float = 0.0


GOES_WRONG = "goes wrong at "


def say_when() -> None:
    """The culprit's last word."""
    print(f"{GOES_WRONG}{time.monotonic()}", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def environment(size: int, rank: int, port: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), **(extra or {}),
    }  # fmt: skip


def run_ranks(
    size: int, command: Sequence[str], *, timeout: float = 120.0, env: Mapping[str, str] | None = None, hosts: int = 1
) -> list[Ended]:
    """Run ``python *command`` on each rank, and wait for all; those that outlive ``timeout`` seconds, or a minute after
    the others (a stopped one does), are killed. ``hosts``: as if they were on so many, in turn: what two share on one
    host goes over the network."""
    port, start = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        ranks = []
        for rank in range(size):
            out = files.enter_context(open(Path(folder) / f"{rank}.out", "w+"))
            err = files.enter_context(open(Path(folder) / f"{rank}.err", "w+"))
            its = {**(env or {}), **({"PARTITA_HOST": f"host{rank % hosts}"} if hosts > 1 else {})}
            process = subprocess.Popen(
                [sys.executable, *command], env=environment(size, rank, port, its), stdout=out, stderr=err, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            ranks.append((process, out, err))
        ended: dict[int, float] = {}
        while len(ended) < size and time.monotonic() - start < timeout:
            if len(ended) == size - 1 and time.monotonic() - start > max(ended.values(), default=start) + 60:
                break
            for rank, (process, _, _) in enumerate(ranks):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic() - start
            time.sleep(0.05)
        found = []
        for rank, (process, out, err) in enumerate(ranks):
            if rank not in ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
            when = [float(line.removeprefix(GOES_WRONG)) for line in texts[1].splitlines() if GOES_WRONG in line]
            wrong = when[0] - start if when else 0.0
            found.append(Ended(process.returncode, *texts, ended.get(rank, float("inf")), wrong))
        return found
