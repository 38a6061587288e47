"""The worker: walks one device's instructions over an Exchange and decides nothing.

Every run of a segment is its own autograd graph: what comes in is detached, what goes out is kept until its
gradients have come back, then ``torch.autograd.backward`` runs on this thread and the gradients of what came in go
on to whoever made it. Parameters are seen through leaf aliases, one set a device, so that no two threads add to the
same ``.grad``.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from partita.errors import ExecutionError
from partita.graph import Graph
from partita.program import Fixed, Instruction, Layout, Once, Partial, Program, Split, Use, Whole
from partita.runtime.codegen import SegmentCode
from partita.runtime.transport import Exchange, Stopped
from partita.runtime.weight_grad import WeightQueue, mark, use_queue
from partita.trace import Event

Key = tuple[str, int]


@dataclass(eq=False)
class Run:
    """One forward of a segment that waits for its backward."""

    leaves: list[tuple[Use, torch.Tensor]]
    outputs: dict[str, torch.Tensor]


@dataclass(eq=False)
class DeviceState:
    """What one device holds during a step."""

    device: torch.device
    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    grads: dict[Key, torch.Tensor] = field(default_factory=dict)
    outgoing: dict[tuple[str, int, int], torch.Tensor | None] = field(default_factory=dict)
    runs: dict[tuple[int, int], Run] = field(default_factory=dict)
    aliases: dict[str, torch.Tensor] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    queue: WeightQueue = field(default_factory=WeightQueue)


@dataclass(eq=False)
class StepState:
    """One step: what the caller gave, what each device holds, what came out."""

    graph: Graph
    program: Program
    codes: tuple[SegmentCode, ...]
    given: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    devices: dict[str, DeviceState]
    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    once: dict[str, torch.Tensor] = field(default_factory=dict)
    results: dict[Key, torch.Tensor] = field(default_factory=dict)
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    origin: float = field(default_factory=perf_counter)
    record: bool = False

    @property
    def batch(self) -> int:
        return sum(self.program.sizes)

    def rows(self, layout: Split, microbatch: int) -> tuple[int, int, int]:
        """(dim, start, length) of a microbatch's rows."""
        sizes = self.program.sizes
        return layout.dim, sum(sizes[:microbatch]) * layout.factor, sizes[microbatch] * layout.factor


class Worker:
    """One device's part of one step."""

    def __init__(self, name: str, state: StepState, exchange: Exchange) -> None:
        self.name, self.state, self.exchange = name, state, exchange
        self.mine = state.devices[name]
        self.results = set(state.graph.outputs)
        self.owed: list[object] = []

    def walk(self, instructions: tuple[Instruction, ...]) -> None:
        state = self.state
        use_queue(self.mine.queue if len(state.program.sizes) > 1 else None)
        self.mine.queue.put_off = any(i.kind == "W" for i in instructions)
        for position, instruction in enumerate(instructions):
            if self.exchange.stopped:
                raise Stopped
            start = perf_counter()
            if instruction.kind == "W":
                self.owed.append((instruction.segment, instruction.microbatch))
                following = instructions[position + 1 : position + 2]
                if not following or following[0].kind != "W":  # a run of W steps is one product per weight
                    self.mine.queue.flush(self.owed)
                    self.owed = []
            else:
                getattr(self, _METHOD[instruction.kind])(instruction)
            if state.record:
                self.mine.events.append(
                    Event(
                        self.name, str(instruction), instruction.kind, instruction.segment, instruction.microbatch,
                        start - state.origin, perf_counter() - state.origin, instruction.nbytes,
                    )
                )  # fmt: skip

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, instruction: Instruction) -> None:
        state, index, microbatch = self.state, instruction.segment, instruction.microbatch
        segment, code = state.program.segments[index], state.codes[index]
        leaves: list[tuple[Use, torch.Tensor]] = []
        arguments = []
        for position, use in enumerate(segment.uses):
            value, leaf = self.take(use, microbatch)
            if leaf:
                leaves.append((use, value))
            if position in code.mutated and use.source > 0:
                value = value.clone()  # an in-place op must not change what others hold
            arguments.append(value)
        size = state.program.sizes[microbatch] if microbatch >= 0 else state.batch
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(state.grad))
                for kind, dtype in state.autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
                outputs = code.run(size, state.batch, self.mine.device, *arguments)
        except Stopped:
            raise
        except Exception as error:
            raise self.failure(index, error) from error
        del arguments
        kept: dict[str, torch.Tensor] = {}
        for name, value in zip(segment.outputs, outputs, strict=True):
            detached = value.detach()
            self.mine.values[name, microbatch] = detached
            if name in self.results:
                state.results[name, microbatch] = detached
            if state.grad and value.requires_grad:
                kept[name] = value
        if state.grad:
            self.mine.runs[index, microbatch] = Run(leaves, kept)

    def take(self, use: Use, microbatch: int) -> tuple[torch.Tensor, bool]:
        """The tensor as the segment wants it, and whether its gradient is wanted back."""
        state = self.state
        meta = state.graph.tensor(use.tensor)
        if use.source <= 0:
            if meta.role == "parameter" and use.source < 0:
                return self.alias(use.tensor), False
            value = state.once[use.tensor] if use.source == 0 else state.given[use.tensor]
            if value.device != self.mine.device:
                value = value.to(self.mine.device, non_blocking=True)
            if isinstance(use.take, Split) and len(state.program.sizes) > 1:
                value = value.narrow(*state.rows(use.take, microbatch))
            if meta.role == "input" and state.grad and value.requires_grad:
                return value.detach().requires_grad_(), True
            return value.detach() if value.requires_grad else value, False
        value = self.joined(use) if microbatch < 0 else self.mine.values[use.tensor, microbatch]
        value = value.detach()
        if state.grad and meta.needs_grad:
            return value.requires_grad_(), True
        return value, False

    def joined(self, use: Use) -> torch.Tensor:
        """All microbatches of a tensor as one."""
        values, name = self.mine.values, use.tensor
        count = len(self.state.program.sizes)
        if isinstance(use.layout, Split):
            return torch.cat([values[name, m] for m in range(count)], use.layout.dim)
        if isinstance(use.layout, Partial):
            return torch.stack([values[name, m] for m in range(count)]).sum(0)
        if isinstance(use.layout, Fixed):
            return values[name, 0]
        return values[name, -1]

    def alias(self, name: str) -> torch.Tensor:
        """This device's leaf over the parameter's memory."""
        found = self.mine.aliases.get(name)
        if found is None:
            parameter = self.state.parameters[name]
            found = parameter.detach()
            if found.device != self.mine.device:
                found = found.to(self.mine.device)
            found.requires_grad_(self.state.grad and parameter.requires_grad)
            mark(found)
            self.mine.aliases[name] = found
        return found

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(self, instruction: Instruction) -> None:
        index, microbatch = instruction.segment, instruction.microbatch
        run = self.mine.runs.pop((index, microbatch))
        roots, grads = [], []
        for name, value in run.outputs.items():
            grad = self.mine.grads.pop((name, microbatch), None)
            if grad is not None:
                roots.append(value)
                grads.append(grad)
        self.mine.queue.key = (index, microbatch)
        try:
            if roots:
                torch.autograd.backward(roots, grads)
        except Exception as error:
            raise self.failure(index, error) from error
        for use, leaf in run.leaves:
            self.hand_back(use, leaf.grad, microbatch, index)
            leaf.grad = None

    def hand_back(self, use: Use, grad: torch.Tensor | None, microbatch: int, consumer: int) -> None:
        """Give the gradient of something taken to the runs that made it."""
        if use.source < 0:
            if grad is not None:
                self.input_grad(use, grad, microbatch)
            return
        if microbatch >= 0:
            self.credit(use, microbatch, grad, consumer)
        elif isinstance(use.layout, Whole):
            self.credit(use, -1, grad, consumer)
        else:
            for m in range(1 if isinstance(use.layout, Fixed) else len(self.state.program.sizes)):
                part = grad
                if grad is not None and isinstance(use.layout, Split):
                    part = grad.narrow(*self.state.rows(use.layout, m))
                self.credit(use, m, part, consumer)

    def credit(self, use: Use, microbatch: int, grad: torch.Tensor | None, consumer: int) -> None:
        places = self.state.program.placement[use.source]
        if places[max(microbatch, 0)] == self.name:
            self.add_grad(use.tensor, microbatch, grad)
        else:
            self.mine.outgoing[use.tensor, microbatch, consumer] = grad

    def add_grad(self, name: str, microbatch: int, grad: torch.Tensor | None) -> None:
        if grad is None:
            return
        held = self.mine.grads.get((name, microbatch))
        self.mine.grads[name, microbatch] = grad if held is None else held + grad

    def input_grad(self, use: Use, grad: torch.Tensor, microbatch: int) -> None:
        """Collect the gradient of a model input: rows where they belong, sums where they overlap."""
        state = self.state
        with state.lock:
            total = state.input_grads.get(use.tensor)
            if total is None:
                total = state.input_grads[use.tensor] = torch.zeros_like(state.given[use.tensor])
            if isinstance(use.take, Split) and microbatch >= 0 and len(state.program.sizes) > 1:
                total = total.narrow(*state.rows(use.take, microbatch))
            total.add_(grad.to(total.device))

    # -- transfers -------------------------------------------------------------------------------------------------

    def send(self, instruction: Instruction) -> None:
        name, microbatch = instruction.tensor, instruction.microbatch
        if instruction.grad:
            value = self.mine.outgoing.pop((name, microbatch, instruction.segment), None)
            self.exchange.send(instruction.peer, (name, microbatch, instruction.segment, True), value)
        else:
            self.exchange.send(instruction.peer, (name, microbatch, -1, False), self.mine.values[name, microbatch])

    def receive(self, instruction: Instruction) -> None:
        name, microbatch = instruction.tensor, instruction.microbatch
        if instruction.grad:
            value = self.exchange.receive(self.name, (name, microbatch, instruction.segment, True))
            if value is not None:
                self.add_grad(name, microbatch, value.to(self.mine.device))
        else:
            value = self.exchange.receive(self.name, (name, microbatch, -1, False))
            self.mine.values[name, microbatch] = value.to(self.mine.device)

    # -- errors ----------------------------------------------------------------------------------------------------

    def failure(self, index: int, error: Exception) -> ExecutionError:
        segment, op = self.state.program.segments[index], self.state.codes[index].op_at(error)
        where = f"stage {segment.stage} on {self.name}"
        if op is not None:
            where += f", module '{op.module or '(the model itself)'}', {op.target}"
        line = f"\n  at {op.source}" if op is not None and op.source else ""
        return ExecutionError(f"{type(error).__name__} in {where}: {error}{line}")


_METHOD = {"F": "forward", "B": "backward", "SEND": "send", "RECV": "receive"}

Layouts = dict[str, Layout]
__all__ = ["DeviceState", "Once", "Run", "StepState", "Worker"]
