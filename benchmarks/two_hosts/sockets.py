"""What plain TCP sockets find between two hosts: the figures that a link is held against.

python -m benchmarks.two_hosts.sockets serve | ask ADDRESS          prints {"bandwidth", "latency"} as JSON
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time

PORT = 29711
ROUNDS = 100
SIZES = (1 << 21, 1 << 22)


def _read(connection: socket.socket, count: int) -> None:
    left, room = count, bytearray(1 << 20)
    while left:
        left -= connection.recv_into(room, min(left, len(room))) or sys.exit("the other side went away")


def serve() -> None:
    with socket.create_server(("0.0.0.0", PORT)) as server:
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size, rounds in _plan():
            for _ in range(rounds):
                _read(connection, size)
                connection.sendall(bytes(1))
        _read(connection, 1)


def _plan() -> list[tuple[int, int]]:
    return [(1, ROUNDS), (SIZES[1], 1), *((s, 6) for s in SIZES)]


def ask(address: str) -> dict[str, float]:
    """Bytes per second and seconds one way: half a round trip of one byte, and the slope between two sizes."""
    for _ in range(100):
        try:
            connection = socket.create_connection((address, PORT))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found = []
    for size, rounds in _plan():
        data, times = bytes(size), []
        for _ in range(rounds):
            start = time.perf_counter()
            connection.sendall(data)
            _read(connection, 1)
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times))
    connection.sendall(b"x")
    return {"bandwidth": (SIZES[1] - SIZES[0]) / (found[3] - found[2]), "latency": found[0] / 2}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(ask(sys.argv[2])))
