"""The link itself: a process that owns two network namespaces and carries packets between them.

    namespace 0  host0 --------------------------------------- host1  namespace 1
                       latency 0:  a veth pair, ``tc tbf`` both ways
                       latency L:  tun devices; every packet leaves after those before it, at the bandwidth, and
                                   arrives L later (``tc netem`` does the same; not every kernel has it)

    python -m benchmarks.two_hosts.relay BITS_PER_SECOND LATENCY_SECONDS CONTROL

Prints its process id and the descriptors of the two namespaces, and goes on until standard input ends. CONTROL is the
path of a datagram socket to be made; a line "BITS LATENCY" sent there shapes the link anew and is answered. The
namespaces have no names: they are gone when this process and all those inside have ended, however they end.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
HEADER = 10  # of virtio: how a large packet is to be cut, which happens at its end
BACKLOG_SECONDS = 0.0005  # what may wait for its turn; the rest waits with its sender
BURST_SECONDS = 0.001
OWN_SECONDS = 1e-4  # what this process, the kernel and the sockets add to a packet's way; measured
libc = ctypes.CDLL(None, use_errno=True)


def unshare() -> int:
    """This process in a network namespace of its own; a descriptor that keeps it."""
    if libc.unshare(CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"no network namespace can be made: {os.strerror(number)}")
    found = os.open("/proc/self/ns/net", os.O_RDONLY)
    run("ip", "link", "set", "lo", "up")
    return found


def enter(namespace: int) -> None:
    if libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def tun(name: str) -> int:
    """A device in this namespace whose packets this process reads and writes, large ones whole."""
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(handle, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return handle


def settle(name: str, address: str) -> None:
    """The device up; TCP with room for what is under way on a fast link with a long delay."""
    run("ip", "addr", "add", f"{address}/24", "dev", name)
    run("ip", "link", "set", name, "up")
    for end in ("rmem", "wmem"):
        with open(f"/proc/sys/net/ipv4/tcp_{end}", "w") as file:
            file.write("4096 1048576 67108864")


class Way:
    """One direction: packets read from ``source`` come out of ``target`` as a link would let them."""

    def __init__(self, source: int, target: int, bits_per_second: float, latency: float) -> None:
        self.source, self.target = source, target
        self.shape(bits_per_second, latency)
        self.free = 0.0
        self.under_way: deque[tuple[float, memoryview]] = deque()
        self.spare: list[memoryview] = []  # used again: fresh memory for each packet is a seventh of its cost

    def shape(self, bits_per_second: float, latency: float) -> None:
        self.per_byte, self.latency = 8.0 / bits_per_second, max(0.0, latency - OWN_SECONDS)

    def take(self, now: float) -> bool:
        """Read what may stand in line; whether more may."""
        while self.free - now < BACKLOG_SECONDS:
            room = self.spare.pop() if self.spare else memoryview(bytearray(HEADER + (1 << 16)))
            try:
                size = os.readv(self.source, [room])
            except BlockingIOError:
                self.spare.append(room)
                return True
            self.free = max(self.free, now) + (size - HEADER) * self.per_byte
            self.under_way.append((self.free + self.latency, room[:size]))
        return False

    def give(self, now: float) -> None:
        while self.under_way and self.under_way[0][0] <= now:
            _, packet = self.under_way.popleft()
            with contextlib.suppress(BlockingIOError, OSError):  # a full device drops, as a full switch does
                os.write(self.target, packet)
            self.spare.append(memoryview(packet.obj))

    def wakes(self, open_: bool) -> float:
        """When there is something to do, but for packets that come."""
        due = self.under_way[0][0] if self.under_way else float("inf")
        return due if open_ else min(due, self.free - BACKLOG_SECONDS)


def carry(ways: Sequence[Way], control: socket.socket, shape: Callable[[float, float], None]) -> None:
    """Until standard input ends."""
    while True:
        now = time.perf_counter()
        for way in ways:
            way.give(now)
        opened = [way.take(now) for way in ways]
        due = min((way.wakes(o) for way, o in zip(ways, opened, strict=True)), default=float("inf"))
        wait = None if due == float("inf") else max(0.0, due - time.perf_counter())
        sources = [w.source for w, o in zip(ways, opened, strict=True) if o]
        ready, _, _ = select.select([0, control, *sources], [], [], wait)
        if control in ready:
            words, sender = control.recvfrom(256)
            shape(*map(float, words.split()))
            control.sendto(b"done", sender)
        if 0 in ready and not os.read(0, 1):
            return


def tbf(verb: str, side: int, bits_per_second: float) -> None:
    burst = max(16384, min(250_000, int(bits_per_second / 8 * BURST_SECONDS)))
    run("tc", "qdisc", verb, "dev", f"host{side}", "root", "tbf", "rate", f"{bits_per_second:.0f}bit", "burst",
        f"{burst}b", "limit", "16mb")  # fmt: skip


def main(bits_per_second: float, latency: float, path: str) -> None:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    control.bind(path)
    first = unshare()
    handles = [tun("host0")] if latency else []
    second = unshare()
    handles += [tun("host1")] if latency else []
    if not latency:
        here = f"/proc/{os.getpid()}/fd"
        run("ip", "link", "add", "host1", "type", "veth", "peer", "name", "host0", "netns", f"{here}/{first}")
    for side, namespace in enumerate((first, second)):
        enter(namespace)
        settle(f"host{side}", ADDRESSES[side])
        if not latency:
            tbf("add", side, bits_per_second)
    ways = [Way(a, b, bits_per_second, latency) for a, b in zip(handles, reversed(handles), strict=True)]

    def shape(bits_per_second: float, latency: float) -> None:
        for way in ways:
            way.shape(bits_per_second, latency)
        for side, namespace in enumerate((first, second) if not ways else ()):
            enter(namespace)
            tbf("replace", side, bits_per_second)

    libc.prctl(29, 1)  # PR_SET_TIMERSLACK: wake when asked, not 50 us later
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))  # a link does not wait for a core
    for handle in (first, second):
        os.set_inheritable(handle, True)
    print(os.getpid(), first, second, flush=True)
    carry(ways, control, shape)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
