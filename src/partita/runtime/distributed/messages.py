"""Messages between ranks: what ``transport.Exchange`` is to threads, over a process group.

    one message   [ header: step, key, kind, dtype, shape, order | data ]      128 bytes and the tensor's own

Sends are asynchronous; receives are posted ahead, in the order in which the peer will send. Both sides know how large
a message was the last time (at first: what the graph says); a tensor of another size follows in a message of its own.
A sent buffer is let go when a later message of the receiver shows that it has arrived.
"""

from __future__ import annotations

import pickle
import random
import struct
import sys
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from partita.errors import ExecutionError
from partita.graph import Graph
from partita.program import Program
from partita.runtime.distributed.world import World
from partita.runtime.layout import memory_order, turned_back
from partita.runtime.route import random_turns
from partita.runtime.spmd_seats import receivers

HEADER = 128
AHEAD = 3
_HEAD = struct.Struct("<4sIIBBBx12q12B")
_MAGIC = b"prtt"
_SAME, _OTHER, _NOTHING = 0, 1, 2
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}

Key = tuple[Hashable, ...]


@dataclass(eq=False)
class Line:
    """What one pair of ranks sends one way in a Program: keys in order, and the bytes of each as last seen.

    ``arrived[k]``: how many messages the other way the sender of message ``k`` has received before it.
    """

    keys: tuple[Key, ...]
    nbytes: list[int]
    arrived: tuple[int, ...]


@dataclass(eq=False)
class Traffic:
    """One rank's messages in one Program, by peer; made once. ``steps``: how often it has run."""

    incoming: dict[int, Line]
    outgoing: dict[int, Line]
    steps: int = 0


def rank_of(device: str) -> int:
    return int(device.partition(":")[2])


def traffic(graph: Graph, program: Program, rank: int) -> Traffic:
    """Who sends what to whom, as the instruction lists say. Of a group whose members divide their ops, member i
    sends to the members i, i + size, ... of the other group, and takes from member i modulo the other's size."""
    turns = random_turns(graph, program)
    lines: dict[tuple[int, int], list[tuple[Key, int, int]]] = {}
    for leader, instructions in program.instructions:
        members = program.members(leader)
        for position, device in enumerate(members):
            here = rank_of(device)
            received: dict[int, int] = {}

            def note(there: int, key: Key, nbytes: int, here: int = here, received: dict[int, int] = received) -> None:
                lines.setdefault((here, there), []).append((key, nbytes, received.get(there, 0)))

            for step in instructions:
                if step.kind == "F" and step.segment in turns and position == 0:
                    after, then = turns[step.segment]
                    if after:
                        giver = rank_of(program.placement[after][0])
                        received[giver] = received.get(giver, 0) + 1
                    if then:
                        note(rank_of(then), ("drawn", step.segment), 1 << 15)
                if step.kind == "RECV":
                    givers = program.members(step.peer)
                    giver = rank_of(givers[position % len(givers)])
                    received[giver] = received.get(giver, 0) + 1
                elif step.kind == "SEND":
                    key = (step.tensor, step.microbatch, step.segment if step.grad else -1, step.grad)
                    for taker in receivers(program, len(members), position, step.peer):
                        note(rank_of(taker), key, step.nbytes)
    made = {
        pair: Line(tuple(k for k, _, _ in found), [n for _, n, _ in found], tuple(a for _, _, a in found))
        for pair, found in lines.items()
    }
    return Traffic(
        {source: line for (source, target), line in made.items() if target == rank},
        {target: line for (source, target), line in made.items() if source == rank},
    )


@dataclass(eq=False)
class _Posted:
    """A transfer under way. ``index``: of its message in the Line."""

    work: Any
    buffer: torch.Tensor
    index: int


@dataclass(eq=False)
class Sent:
    """Bytes handed to the network, by kind of message."""

    payload: int = 0
    headers: int = 0
    messages: int = 0


@dataclass(eq=False)
class _Peer:
    """One direction's state within a step."""

    line: Line
    next: int = 0
    posted: deque[_Posted] = field(default_factory=deque)
    done: int = 0


class Exchange:
    """One step's messages of this rank; ``send`` and ``receive`` as a Worker asks for them."""

    def __init__(self, world: World, traffic: Traffic, sent: Sent) -> None:
        self.world, self.sent, self.step = world, sent, traffic.steps
        traffic.steps += 1
        self._in = {peer: _Peer(line) for peer, line in traffic.incoming.items()}
        self._out = {peer: _Peer(line) for peer, line in traffic.outgoing.items()}
        self._from = {key: peer for peer, line in traffic.incoming.items() for key in line.keys}
        self._early: dict[Key, Any] = {}
        for peer in self._in:
            self._post(peer)

    # -- as transport.Exchange -----------------------------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        self.world.watch.check()
        return False

    def send(self, device: str, key: Key, value: torch.Tensor | None) -> None:
        """Hand over without waiting. The k-th message to a peer is the k-th of its Line, whatever happens."""
        peer = rank_of(device)
        state = self._out[peer]
        index = state.next
        if state.line.keys[index] != key:
            raise ExecutionError(f"rank {self.world.rank} would send {key} where {state.line.keys[index]} is next")
        state.next += 1
        if key[0] == "drawn":
            value = _generators()
        order = [] if value is None else memory_order(value)
        if value is not None and order:  # it lies there as it lies here
            value = value.permute(order)
        if value is not None and value.device.type == "cuda":
            self._send_apart(peer, key, index, value, order)
            return
        expected = state.line.nbytes[index]
        size = 0 if value is None else value.numel() * value.element_size()
        kind = _NOTHING if value is None else _SAME if size == expected else _OTHER
        buffer = torch.empty(HEADER + expected, dtype=torch.uint8)
        self._head(buffer, key, kind, value, order)
        if value is not None and kind == _SAME:
            _data(buffer, value.dtype, value.shape).copy_(value)
        self._isend(peer, buffer, index)
        if value is not None and kind == _OTHER:
            self._isend(peer, value.contiguous().reshape(-1).view(torch.uint8), index, len(state.line.keys))
        state.line.nbytes[index] = size
        self.sent.payload += size

    def receive(self, device: str, key: Key) -> torch.Tensor | None:
        """The value sent under ``key``."""
        peer = self._from[key]
        if key not in self._early:
            with self.world.watch.waiting(f"{_words(key)} of rank {peer}"):
                while key not in self._early:
                    found, value = self._next(peer)
                    self._early[found] = value
        result: torch.Tensor | None = self._early.pop(key)
        if key[0] == "drawn":
            _set_generators(result)
            return None
        return result

    def finish(self) -> None:
        """Wait until everything sent has been taken."""
        with self.world.watch.waiting("the last messages to be taken"):
            for peer, state in self._out.items():
                self._release(peer, len(state.line.keys))

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _isend(self, peer: int, buffer: torch.Tensor, index: int, shift: int = 0) -> None:
        work = dist.isend(buffer, group=self.world.control, group_dst=peer, tag=shift + index)
        self._out[peer].posted.append(_Posted(work, buffer, index))
        self.sent.messages += 1

    def _send_apart(self, peer: int, key: Key, index: int, value: torch.Tensor, order: Sequence[int]) -> None:
        """A tensor on a GPU: its header through the host, its data from device to device."""
        header = torch.empty(HEADER, dtype=torch.uint8)
        self._head(header, key, _SAME, value, order)
        self._isend(peer, header, index)
        lane = self.world.up if peer > self.world.rank else self.world.down
        data = value.contiguous()
        work = dist.isend(data, group=lane, group_dst=peer)
        self._out[peer].posted.append(_Posted(work, data, index))
        self.sent.payload += data.numel() * data.element_size()

    def _head(
        self, buffer: torch.Tensor, key: Key, kind: int, value: torch.Tensor | None, order: Sequence[int]
    ) -> None:
        shape = () if value is None else tuple(value.shape)
        if len(shape) > 12:
            raise ExecutionError(f"{key[0]} has {len(shape)} dims; tensors sent between ranks have at most 12")
        code = 0 if value is None else _CODE.get(value.dtype, 255)
        if code == 255:
            raise ExecutionError(f"{key[0]} is {value.dtype if value is not None else ''}, which is not sent")
        padded = (*shape, *(0,) * (12 - len(shape)), *(order or range(len(shape))), *(0,) * (12 - len(shape)))
        packed = _HEAD.pack(_MAGIC, self.step & 0xFFFFFFFF, _crc(key), kind, code, len(shape), *padded)
        buffer[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self.sent.headers += HEADER

    def _post(self, peer: int) -> None:
        """Keep a few receives of this peer's next messages open."""
        state = self._in[peer]
        while len(state.posted) < AHEAD and state.next < len(state.line.keys):
            size = HEADER if self.world.device.type == "cuda" else HEADER + state.line.nbytes[state.next]
            buffer = torch.empty(size, dtype=torch.uint8)
            work = dist.irecv(buffer, group=self.world.control, group_src=peer, tag=state.next)
            state.posted.append(_Posted(work, buffer, state.next))
            state.next += 1

    def _next(self, peer: int) -> tuple[Key, torch.Tensor | None]:
        """The peer's next message."""
        state = self._in[peer]
        self._post(peer)
        posted = state.posted.popleft()
        index = state.done
        key = state.line.keys[index]
        posted.work.wait()
        magic, step, crc, kind, code, dims, *rest = _HEAD.unpack(bytes(posted.buffer[: _HEAD.size].numpy()))
        if magic != _MAGIC or step != self.step & 0xFFFFFFFF or crc != _crc(key):
            raise ExecutionError(
                f"rank {self.world.rank} expects {_words(key)} in step {self.step} and rank {peer} sent something else "
                f"(its step {step}): the ranks do not run the same calls. Make every rank call the model with the same "
                "inputs, in the same order"
            )
        sizes, order, dtype = tuple(rest[:dims]), rest[12 : 12 + dims], DTYPES[code]
        value: torch.Tensor | None = None
        if kind != _NOTHING:
            value = self._data(peer, state, index, kind, dtype, sizes, posted.buffer)
            if order != sorted(order):
                value = turned_back(value, order)
            value = value.detach()  # no view of the buffer to autograd: a worker may make it a leaf as it is
        state.line.nbytes[index] = 0 if value is None else value.numel() * value.element_size()
        state.done += 1
        self._post(peer)
        if peer in self._out:
            self._release(peer, state.line.arrived[index])
        return key, value

    def _data(
        self, peer: int, state: _Peer, index: int, kind: int, dtype: torch.dtype, shape: tuple[int, ...],
        buffer: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        if self.world.device.type == "cuda" and state.line.keys[index][0] != "drawn":
            value = torch.empty(shape, dtype=dtype, device=self.world.device)
            lane = self.world.up if peer < self.world.rank else self.world.down
            dist.recv(value, group=lane, group_src=peer)
            return value
        if kind == _SAME:
            return _data(buffer, dtype, shape)
        value = torch.empty(shape, dtype=dtype)
        raw = value.reshape(-1).view(torch.uint8)
        work: Any = dist.irecv(raw, group=self.world.control, group_src=peer, tag=len(state.line.keys) + index)
        work.wait()
        return value

    def _release(self, peer: int, count: int) -> None:
        """Let go of the first ``count`` messages to a peer: it has them."""
        state = self._out[peer]
        while state.posted and state.posted[0].index < count:
            state.posted.popleft().work.wait()


def _data(buffer: torch.Tensor, dtype: torch.dtype, shape: Any) -> torch.Tensor:
    return buffer[HEADER:].view(dtype).view(shape)


def _crc(key: Key) -> int:
    return crc32(repr(key).encode())


def _words(key: Key) -> str:
    if key[0] == "drawn":
        return "its turn to draw random numbers"
    which = "the whole batch" if key[1] == -1 else f"microbatch {key[1]}"
    return f"{'the gradient of ' if key[-1] is True else ''}{key[0]} of {which}"


def _generators() -> torch.Tensor:
    """The states of the random generators on this host, as bytes."""
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    raw = pickle.dumps((torch.get_rng_state(), random.getstate(), numpy))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _set_generators(value: torch.Tensor | None) -> None:
    assert value is not None
    state, python, numpy = pickle.loads(value.numpy().tobytes())
    torch.set_rng_state(state)
    random.setstate(python)
    if numpy is not None and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(numpy)
