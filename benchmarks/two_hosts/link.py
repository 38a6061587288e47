"""A shaped link for as long as a ``with`` lasts, and what plain sockets find it to be."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.two_hosts.relay import ADDRESSES

ROOT = Path(__file__).resolve().parents[2]


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it has ended, however that was."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class NoNamespaces(Exception):
    """Why network namespaces, or devices in them, cannot be made here."""


@dataclass(frozen=True)
class Hosts:
    """``namespaces``: paths. ``addresses``: of each host on the link. ``control``: where the link is shaped anew."""

    namespaces: tuple[str, str]
    control: str
    addresses: tuple[str, str] = ADDRESSES

    def inside(self, host: int, command: Sequence[str]) -> list[str]:
        """The command as one that runs on that host, which has one core."""
        cores = sorted(os.sched_getaffinity(0))
        core = str(cores[host % len(cores)])
        return ["nsenter", f"--net={self.namespaces[host]}", "--", "taskset", "-c", core, *command]

    def rank(self, host: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of the one rank on that host, as torchrun would set it but for the rendezvous."""
        return {
            **self.environment(host), "RANK": str(host), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29500", **(extra or {}),
        }  # fmt: skip

    def environment(self, host: int) -> dict[str, str]:
        """What a process there must know: its host, its device, where its modules are. Nothing measured before."""
        return {
            **os.environ, "PARTITA_HOST": f"host{host}", "GLOO_SOCKET_IFNAME": f"host{host}",
            "TP_SOCKET_IFNAME": f"host{host}", "OMP_NUM_THREADS": "1",
            "PARTITA_CACHE": str(Path(self.control).parent / f"cache{host}"),
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        }  # fmt: skip


@contextlib.contextmanager
def link(bits_per_second: float, latency_seconds: float = 0.0) -> Iterator[Hosts]:
    """Two hosts and nothing but this link between them. ``latency_seconds``: one way, from socket to socket; 0: as
    short as it gets, some 0.05 ms.

    Raises NoNamespaces with the reason. The hosts are gone when the block ends, or this process does.
    """
    with tempfile.TemporaryDirectory() as folder:
        control = str(Path(folder) / "control")
        shape = (str(bits_per_second), str(latency_seconds))
        relay = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.two_hosts.relay", *shape, control], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            assert relay.stdout is not None and relay.stderr is not None
            words = relay.stdout.readline().split()
            if len(words) != 3:
                raise NoNamespaces(relay.stderr.read().strip().splitlines()[-1])
            yield Hosts((f"/proc/{words[0]}/fd/{words[1]}", f"/proc/{words[0]}/fd/{words[2]}"), control)
        finally:
            relay.kill()
            relay.communicate()


def shape(control: str, bits_per_second: float, latency_seconds: float) -> None:
    """Shape a link anew, from whatever process; one without latency keeps none."""
    here = f"{control}.{os.getpid()}"  # in the file system: names without a path belong to a network namespace
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        asking.bind(here)
        asking.sendto(f"{bits_per_second} {latency_seconds}".encode(), control)
        asking.recv(16)
    os.unlink(here)


def why_not() -> str:
    """Why there can be no such hosts here; empty where there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with link(1e9, 1e-3):
            return ""
    except (NoNamespaces, OSError) as error:
        return f"network namespaces cannot be made here: {error}"
