"""Ping: the latency of the link between two ranks, by plain TCP: half of what a byte takes there and back.

Process groups wake threads of their own for each message (Gloo: 0.03 to 0.1 ms), which is no property of the link; a
socket on which both sides wait reads within some 0.02 ms of the wire. A low quantile of many, since whatever
else runs can only delay.
"""

from __future__ import annotations

import os
import socket
from time import perf_counter

import numpy as np
import psutil
import torch
import torch.distributed as dist

from partita.runtime.distributed.world import Group

ROUNDS, WARM, LOW = 60, 5, 0.1
PATIENCE_SECONDS = 5.0
ADDRESS_BYTES = 128


def address() -> str:
    """This host's on the interface that Gloo is told to use, else on the one that leads to the first rank's host."""
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        for found in psutil.net_if_addrs().get(name, ()):
            if found.family == socket.AF_INET:
                return str(found.address)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
            towards.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
            return str(towards.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def ask(peer: int, group: Group) -> float | None:
    """Seconds one way to ``peer``, which answers; None where it cannot be reached so (a firewall)."""
    where = torch.zeros(ADDRESS_BYTES, dtype=torch.uint8)
    dist.recv(where, peer, group=group)
    host, _, port = bytes(where.tolist()).rstrip(b"\0").decode().rpartition(" ")
    times = []
    try:
        with socket.create_connection((host, int(port)), PATIENCE_SECONDS) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(WARM + ROUNDS):
                start = perf_counter()
                line.sendall(b"?")
                if not line.recv(1):
                    return None
                times.append((perf_counter() - start) / 2)
    except (OSError, ValueError):
        return None
    return float(np.quantile(times[WARM:], LOW))


def answer(peer: int, group: Group) -> None:
    """The other side of ``ask``."""
    try:
        server = socket.create_server(("", 0))
    except OSError:
        dist.send(torch.zeros(ADDRESS_BYTES, dtype=torch.uint8), peer, group=group)
        return
    with server:
        server.settimeout(PATIENCE_SECONDS)
        text = f"{address()} {server.getsockname()[1]}".encode().ljust(ADDRESS_BYTES, b"\0")
        dist.send(torch.tensor(list(text), dtype=torch.uint8), peer, group=group)
        try:
            line, _ = server.accept()
            with line:
                line.settimeout(PATIENCE_SECONDS)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while line.recv(1):
                    line.sendall(b"!")
        except OSError:
            return
