"""The worker: walks one device's instructions over an Exchange and decides nothing.

Every run of a segment is its own autograd graph: what comes in is detached, what goes out is kept until its
gradients have come back, then ``torch.autograd.backward`` runs on this thread and the gradients of what came in go
on to whoever made it. Parameters are seen through leaf aliases, one set a device, so that no two threads add to the
same ``.grad``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

import torch

from partita.errors import ExecutionError
from partita.graph import Graph
from partita.program import Fixed, Instruction, Partial, Program, Split, Use, Whole
from partita.runtime.codegen import SegmentCode
from partita.runtime.layout import cat
from partita.runtime.route import Inlet, Step, parts, route
from partita.runtime.spmd_seats import Seat, receivers
from partita.runtime.transport import Exchange, Stopped
from partita.runtime.weight_grad import WeightQueue, mark, use_queue
from partita.trace import Event

Key = tuple[str, int]


Edge = torch.autograd.graph.GradientEdge


@dataclass(eq=False)
class Run:
    """One forward of a segment that waits for its backward: leaves that want a gradient, and where gradients enter.

    ``outputs`` are edges of the autograd graph, not tensors: a result nobody reads any more does not stay for them.
    """

    leaves: list[tuple[Use, torch.Tensor]]
    outputs: dict[str, Edge]


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
    clones: dict[str, torch.Tensor] = field(default_factory=dict)


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
    once: dict[str, torch.Tensor] = field(default_factory=dict)
    results: dict[Key, torch.Tensor] = field(default_factory=dict)
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    origin: float = field(default_factory=perf_counter)
    record: bool = False
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    batch: int = field(init=False)

    def __post_init__(self) -> None:
        self.batch = sum(self.program.sizes)

    def rows(self, layout: Split, microbatch: int) -> tuple[int, int, int]:
        """(dim, start, length) of a microbatch's rows."""
        sizes = self.program.sizes
        return layout.dim, sum(sizes[:microbatch]) * layout.factor, sizes[microbatch] * layout.factor


class Worker:
    """One device's part of one step. ``seat``: its place in a group that divides single ops; None: it is alone."""

    def __init__(self, name: str, state: StepState, exchange: Exchange, seat: Seat | None = None) -> None:
        self.name, self.state, self.exchange, self.seat = name, state, exchange, seat
        self.place = seat.leader if seat is not None else name
        self.leads = seat is None or seat.rank == 0
        self.codes = seat.codes if seat is not None else state.codes
        self.group = seat.group if seat is not None else None
        self.mine = state.devices[name]
        self.owed: list[object] = []
        self.parts: dict[tuple[str, Split | None], tuple[torch.Tensor, ...]] = {}

    def walk(self, instructions: tuple[Instruction, ...]) -> None:
        state, exchange = self.state, self.exchange
        steps = self.route(instructions)
        do = {"F": self.forward, "B": self.backward, "W": self.weights, "SEND": self.send, "RECV": self.receive}
        use_queue(self.mine.queue if len(state.program.sizes) > 1 else None)
        self.mine.queue.put_off = any(i.kind == "W" for i in instructions)
        try:
            with torch.inference_mode(state.inference), torch.set_grad_enabled(state.grad):
                for step in steps:
                    if exchange.stopped:
                        raise Stopped
                    start = perf_counter()
                    do[step.instruction.kind](step)
                    for key in step.drops:
                        del self.mine.values[key]
                    if state.record:
                        self.record(step.instruction, start)
        finally:
            use_queue(None)

    def route(self, instructions: tuple[Instruction, ...]) -> tuple[Step, ...]:
        """Made once for an instruction list, and kept with the code that it is for."""
        state = self.state
        routes = self.codes[0].routes
        found = routes.get(id(instructions))
        if found is None:
            mutated = tuple(code.mutated for code in self.codes)
            graph = self.seat.graph if self.seat is not None else state.graph
            found = instructions, route(graph, state.program, instructions, mutated)
            routes[id(instructions)] = found
        return found[1]

    def record(self, instruction: Instruction, start: float) -> None:
        origin = self.state.origin
        self.mine.events.append(
            Event(
                self.name, str(instruction), instruction.kind, instruction.segment, instruction.microbatch,
                start - origin, perf_counter() - origin, instruction.nbytes,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Around weight gradients made for all replicas after this one's last instruction."""
        start = perf_counter()
        yield
        if self.state.record:
            index = max(s for s, places in enumerate(self.state.program.placement) if self.name in places)
            self.record(Instruction("W", index, -1), start)

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, step: Step) -> None:
        state, index, microbatch = self.state, step.instruction.segment, step.instruction.microbatch
        code = self.codes[index]
        if step.after and self.leads:
            self.exchange.receive(self.name, ("drawn", step.after))
        leaves: list[tuple[Use, torch.Tensor]] = []
        arguments = []
        for inlet in step.inlets:
            value, leaf = self.take(inlet, microbatch)
            if leaf:
                leaves.append((inlet.use, value))
            if inlet.copy:
                value = value.clone()  # an in-place op must not change what others hold
            arguments.append(value)
        size = state.program.sizes[microbatch] if microbatch >= 0 else state.batch
        try:
            outputs = code.run(size, state.batch, self.mine.device, *arguments, group=self.group)
        except Stopped:
            raise
        except Exception as error:
            raise self.failure(index, error) from error
        if step.then and self.leads:
            self.exchange.send(step.then, ("drawn", index), None)
        own = [value for value in arguments if value.requires_grad and value.is_leaf]
        del arguments
        kept: dict[str, Edge] = {}
        for outlet, value in zip(step.outlets, outputs, strict=True):
            if outlet.held or outlet.result:
                detached = value.detach()
                if outlet.held:
                    self.mine.values[outlet.name, microbatch] = detached
                if outlet.result and self.leads:
                    state.results[outlet.name, microbatch] = detached
            if state.grad and value.requires_grad and (value.grad_fn is not None or any(value is t for t in own)):
                kept[outlet.name] = torch.autograd.graph.get_gradient_edge(value)
        if state.grad:
            self.mine.runs[index, microbatch] = Run(leaves, kept)

    def take(self, inlet: Inlet, microbatch: int) -> tuple[torch.Tensor, bool]:
        """The tensor as the segment wants it, and whether its gradient is wanted back."""
        state, use = self.state, inlet.use
        if inlet.way == "alias":
            return self.alias(use.tensor), False
        if inlet.way in ("given", "once"):
            value = state.once[use.tensor] if inlet.way == "once" else self.given(use.tensor)
            if inlet.rows is not None:
                value = self.part(inlet, value, microbatch)
            if value.device != self.mine.device:
                value = value.to(self.mine.device, non_blocking=True)
            if inlet.leaf and state.grad and value.requires_grad:
                return value.detach().requires_grad_(), True
            return value.detach() if value.requires_grad else value, False
        value = self.joined(use) if inlet.way == "joined" else self.mine.values[use.tensor, microbatch].detach()
        if inlet.leaf and state.grad:
            return value.requires_grad_(), True
        return value, False

    def part(self, inlet: Inlet, value: torch.Tensor, microbatch: int) -> torch.Tensor:
        """A microbatch's rows of what the caller made. All are cut off at once where nobody changes them: each call of
        torch hands the interpreter to another device's thread and takes it back."""
        assert inlet.rows is not None
        if inlet.changed:
            return value.narrow(*self.state.rows(inlet.rows, microbatch))
        key = inlet.use.tensor, inlet.rows
        if key not in self.parts:
            lengths = [n * inlet.rows.factor for n in self.state.program.sizes]
            self.parts[key] = torch.split_with_sizes(value, lengths, inlet.rows.dim)
        return self.parts[key][microbatch]

    def given(self, name: str) -> torch.Tensor:
        """An input or buffer. Of buffers that every member changes alike, all but the leader have a copy."""
        found = self.mine.clones.get(name)
        return self.state.given[name] if found is None else found

    def joined(self, use: Use) -> torch.Tensor:
        """All microbatches of a tensor as one, a leaf of its own."""
        values = [self.mine.values[key] for key in parts(self.state.program, use)]
        if isinstance(use.layout, Split):
            return cat(values, use.layout.dim).detach()
        if isinstance(use.layout, Partial):
            return torch.stack(values).sum(0).detach()
        return values[0].detach()

    def alias(self, name: str) -> torch.Tensor:
        """This device's leaf over the parameter's memory."""
        found = self.mine.aliases.get(name)
        if found is None:
            parameter = self.state.parameters[name]
            found = parameter.detach()
            if self.seat is not None:
                found = self.seat.rows(name, found).detach()
            if found.device != self.mine.device:
                found = found.to(self.mine.device)
            found.requires_grad_(self.state.grad and parameter.requires_grad)
            mark(found, name)
            self.mine.aliases[name] = found
        return found

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(self, step: Step) -> None:
        index, microbatch = step.instruction.segment, step.instruction.microbatch
        run = self.mine.runs.pop((index, microbatch))
        roots, grads = [], []
        for name, edge in run.outputs.items():
            grad = self.mine.grads.pop((name, microbatch), None)
            if grad is not None:
                roots.append(edge)
                grads.append(grad)
        self.mine.queue.key = (index, microbatch)
        run.outputs = {}
        try:
            if roots:
                torch.autograd.backward(roots, grads)
        except Exception as error:
            raise self.failure(index, error, "backward of ") from error
        for use, leaf in run.leaves:
            self.hand_back(use, leaf.grad, microbatch, index)
            leaf.grad = None

    def weights(self, step: Step) -> None:
        """A run of W steps is one product per weight."""
        self.owed.append((step.instruction.segment, step.instruction.microbatch))
        if step.last_of_run:
            owed, self.owed = self.owed, []
            try:
                self.mine.queue.flush(owed)
            except Exception as error:
                raise self.failure(step.instruction.segment, error, "weight gradients of ") from error

    def hand_back(self, use: Use, grad: torch.Tensor | None, microbatch: int, consumer: int) -> None:
        """Give the gradient of something taken to the runs that made it."""
        if use.source < 0:
            if grad is not None and self.leads:
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
        if places[max(microbatch, 0)] == self.place:
            self.add_grad(use.tensor, microbatch, grad)
        else:
            key = (use.tensor, microbatch, consumer)
            held = self.mine.outgoing.get(key)  # a segment may take one tensor in two ways
            self.mine.outgoing[key] = grad if held is None else held if grad is None else held + grad

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

    def send(self, step: Step) -> None:
        instruction = step.instruction
        name, microbatch = instruction.tensor, instruction.microbatch
        if instruction.grad:
            value = self.mine.outgoing.pop((name, microbatch, instruction.segment), None)
            key = name, microbatch, instruction.segment, True
        else:
            value, key = self.mine.values[name, microbatch], (name, microbatch, -1, False)
        peer = instruction.peer
        for there in (peer,) if self.seat is None else receivers(self.state.program, self.seat, peer):
            self.exchange.send(there, key, value)

    def receive(self, step: Step) -> None:
        instruction = step.instruction
        name, microbatch = instruction.tensor, instruction.microbatch
        if instruction.grad:
            value = self.exchange.receive(self.name, (name, microbatch, instruction.segment, True))
            if value is not None:
                self.add_grad(name, microbatch, value.to(self.mine.device))
        else:
            value = self.exchange.receive(self.name, (name, microbatch, -1, False))
            value = value if value.device == self.mine.device else value.to(self.mine.device)
            self.mine.values[name, microbatch] = value

    # -- errors ----------------------------------------------------------------------------------------------------

    def failure(self, index: int, error: Exception, what: str = "") -> ExecutionError:
        """The error with the stage, the module and the user's line."""
        segment, op = self.state.program.segments[index], self.codes[index].op_at(error)
        where = f"{what}stage {segment.stage} on {self.name}"
        if op is not None:
            where += f", module '{op.module or '(the model itself)'}', {op.target}"
        elif segment.ops:
            graph = self.seat.graph if self.seat is not None else self.state.graph
            by_name = {op.name: op.module for op in graph.ops}
            modules = list(dict.fromkeys(by_name.get(name) or "(the model itself)" for name in segment.ops))
            where += f", modules '{modules[0]}' to '{modules[-1]}'" if len(modules) > 1 else f", module '{modules[0]}'"
        line = f"\n  at {op.source}" if op is not None and op.source else ""
        return ExecutionError(f"{type(error).__name__} in {where}: {error}{line}")


__all__ = ["DeviceState", "Run", "StepState", "Worker"]
