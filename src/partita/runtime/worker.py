"""The worker: walks one device's instructions over an Exchange and decides nothing.

Every run of a segment is its own autograd graph: what comes in is detached, what goes out is kept until its
gradients have come back, then ``torch.autograd.backward`` runs on this thread and the gradients of what came in go
on to whoever made it. Parameters are seen through leaf aliases, one set a device, so that no two threads add to the
same ``.grad``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from time import perf_counter

import torch

from partita.errors import ExecutionError
from partita.program import Fixed, Instruction, Partial, Split, Use, Whole
from partita.runtime.away import Traffic, use_traffic
from partita.runtime.layout import cat
from partita.runtime.own_gradients import set_apart
from partita.runtime.progress import Edge, Run, StepState
from partita.runtime.route import Inlet, Key, Route, Step, parts, route
from partita.runtime.spmd_seats import Seat, receivers
from partita.runtime.transport import Exchange
from partita.runtime.waits import Deadlock, Stopped
from partita.runtime.weight_grad import mark, use_queue
from partita.torch_compat import run_backward
from partita.trace import Event


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
        self.lent: frozenset[str] = frozenset()
        self.parts: dict[tuple[str, int, int], tuple[torch.Tensor, ...]] = {}
        self.at: Instruction | None = None
        self.apart: set[str] = set()
        self.adds, self.settled = False, True

    def doing(self) -> str:
        """Where it is, in words."""
        if self.at is None:
            return "at its beginning"
        segment = self.state.program.segments[self.at.segment]
        kind = {"F": "forward", "B": "backward", "W": "weight gradients"}.get(self.at.kind, str(self.at))
        what = f"{kind} of {'stage ' + str(segment.stage) if segment.stage >= 0 else 'the first part'}"
        return what if self.at.microbatch < 0 else f"{what}, microbatch {self.at.microbatch}"

    def walk(self, instructions: tuple[Instruction, ...]) -> None:
        state, exchange, values = self.state, self.exchange, self.mine.values
        route = self.route(instructions)
        do = {"F": self.forward, "B": self.backward, "W": self.weights, "SEND": self.send, "RECV": self.receive}
        use_queue(self.mine.queue if len(state.program.sizes) > 1 else None)
        self.mine.queue.put_off = route.puts_off
        self.adds, self.settled = route.adds, not route.adds
        self.lent = route.lent
        if route.hosted:
            self.mine.traffic = self.mine.traffic or Traffic(self.mine.device, self.name)
            use_traffic(self.mine.traffic)
        start = 0.0
        try:
            with torch.inference_mode(state.inference), torch.set_grad_enabled(state.grad):
                for step in route.steps:
                    if exchange.stopped:
                        raise Stopped
                    self.at = step.instruction
                    if state.record:
                        start = perf_counter()
                    do[step.instruction.kind](step)
                    for key in step.drops:
                        del values[key]
                    if state.record:
                        self.record(step.instruction, start)
        finally:
            use_queue(None)
            if route.hosted:
                use_traffic(None)

    def route(self, instructions: tuple[Instruction, ...]) -> Route:
        """Made once for an instruction list, and kept with the code that it is for."""
        state = self.state
        routes = self.codes[0].routes
        found: Route | None = routes.get(id(instructions))
        if found is None:
            mutated = tuple(code.mutated for code in self.codes)
            graph = self.seat.graph if self.seat is not None else state.graph
            found = routes[id(instructions)] = route(graph, state.program, instructions, mutated)
        return found

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
        state, mine, index = self.state, self.mine, step.instruction.segment
        if step.after and self.leads:
            self.exchange.receive(self.name, ("drawn", step.after))
        leaves: list[tuple[Inlet, torch.Tensor]] = []
        arguments = []
        for inlet in step.inlets:
            value = WAYS[inlet.way](self, step, inlet)
            if inlet.leaf and value.requires_grad:
                leaves.append((inlet, value))
            if inlet.copy:
                value = value.clone()  # an in-place op must not change what others hold
            arguments.append(value)
        try:
            outputs = self.codes[index].run(step.samples, state.batch, mine.device, *arguments, group=self.group)
        except (Stopped, Deadlock):
            raise
        except Exception as error:
            raise self.failure(index, error) from error
        if step.then and self.leads:
            self.exchange.send(step.then, ("drawn", index), None)
        kept: dict[Key, Edge] = {}
        for outlet, value in zip(step.outlets, outputs, strict=True):
            if outlet.result or outlet.held:
                detached = value.detach() if outlet.result or state.grad else value
                if outlet.held:
                    mine.values[outlet.key] = detached
                if outlet.result and self.leads:
                    state.results[outlet.key] = detached
            differentiable = state.grad and value.requires_grad
            if differentiable and (value.grad_fn is not None or any(value is taken for taken in arguments)):
                kept[outlet.key] = torch.autograd.graph.get_gradient_edge(value)
        if state.grad:
            mine.runs[index, step.instruction.microbatch] = Run(leaves, kept)

    # Each gives a tensor as the segment wants it; where its gradient is wanted back (``inlet.leaf``), a leaf.

    def alias_of(self, step: Step, inlet: Inlet) -> torch.Tensor:
        found = self.mine.aliases.get(inlet.use.tensor)
        return self.alias(inlet.use.tensor) if found is None else found

    def value_of(self, step: Step, inlet: Inlet) -> torch.Tensor:
        """What a run made. Where no other run takes it, it becomes a leaf itself: each call of torch hands the
        interpreter to another device's thread and takes it back."""
        value = self.mine.values[inlet.key]
        if not self.state.grad:
            return value
        if not inlet.sole:
            value = value.detach()
        return value.requires_grad_() if inlet.leaf else value

    def from_caller(self, step: Step, inlet: Inlet) -> torch.Tensor:
        """An input, a buffer, or what was made of them for the whole step."""
        state, use = self.state, inlet.use
        value = state.once[use.tensor] if inlet.way == "once" else self.given(use.tensor)
        if inlet.rows is not None:
            value = self.part(use.tensor, inlet.rows, inlet.changed, value, step.instruction.microbatch)
        if value.device != self.mine.device:
            value = value.to(self.mine.device, non_blocking=True)
        if not value.requires_grad:
            return value
        value = value.detach()
        return value.requires_grad_() if inlet.leaf and state.grad else value

    def part(self, name: str, rows: Split, changed: bool, value: torch.Tensor, microbatch: int) -> torch.Tensor:
        """A microbatch's rows of what the caller made. All are cut off at once where nobody changes them."""
        if changed:
            return value.narrow(*self.state.rows(rows, microbatch))
        key = name, rows.dim, rows.factor
        found = self.parts.get(key)
        if found is None:
            lengths = [n * rows.factor for n in self.state.program.sizes]
            found = self.parts[key] = torch.split_with_sizes(value, lengths, rows.dim)
        return found[microbatch]

    def given(self, name: str) -> torch.Tensor:
        """An input or buffer. Of buffers that every member changes alike, all but the leader have a copy."""
        found = self.mine.clones.get(name)
        return self.state.given[name] if found is None else found

    def joined(self, step: Step, inlet: Inlet) -> torch.Tensor:
        """All microbatches of a tensor as one, a leaf of its own."""
        use = inlet.use
        values = [self.mine.values[key] for key in parts(self.state.program, use)]
        if isinstance(use.layout, Split):
            value = cat(values, use.layout.dim).detach()
        elif isinstance(use.layout, Partial):
            value = torch.stack(values).sum(0).detach()
        else:
            value = values[0].detach()
        return value.requires_grad_() if inlet.leaf and self.state.grad else value

    def alias(self, name: str) -> torch.Tensor:
        """This device's leaf over the parameter's memory, made."""
        parameter = self.state.parameters[name]
        found = self.mine.clones.get(name, parameter).detach()
        if self.seat is not None:
            found = self.seat.rows(name, found).detach()
        lent = name in self.lent
        if found.device != self.mine.device and not lent:
            found = found.to(self.mine.device)
        found.requires_grad_(self.state.grad and parameter.requires_grad)
        if not lent:  # a copy's gradient goes home at once
            mark(found, name)
        self.mine.aliases[name] = found
        self.settled = not self.adds
        return found

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(self, step: Step) -> None:
        mine, index, microbatch = self.mine, step.instruction.segment, step.instruction.microbatch
        keeps, key = self.state.keeps, (index, microbatch)
        run = mine.runs[key] if keeps else mine.runs.pop(key)
        roots, grads = [], []
        for output, edge in run.outputs.items():
            grad = mine.grads.pop(output, None)
            if grad is not None:
                roots.append(edge)
                grads.append(grad)
        mine.queue.key = key
        if not keeps:
            run.outputs = {}
        try:
            if roots:
                run_backward(roots, grads, keeps)
        except (Stopped, Deadlock):
            raise
        except Exception as error:
            raise self.failure(index, error, "backward of ") from error
        if not self.settled:
            self.settled = set_apart(self.mine.aliases, self.apart)
        for inlet, leaf in run.leaves:
            if inlet.way != "value":
                self.hand_back(inlet.use, leaf.grad, microbatch, index)
            elif inlet.away:
                self.owe(inlet.use.tensor, microbatch, leaf.grad, index)
            elif leaf.grad is not None:
                self.add_grad(inlet.key, leaf.grad)
            leaf.grad = None

    def weights(self, step: Step) -> None:
        """A run of W steps is one product per weight."""
        self.owed.append((step.instruction.segment, step.instruction.microbatch))
        if step.last_of_run:
            owed, self.owed = self.owed, []
            try:
                self.mine.queue.flush(owed)
            except (Stopped, Deadlock):
                raise
            except Exception as error:
                raise self.failure(step.instruction.segment, error, "weight gradients of ") from error

    def hand_back(self, use: Use, grad: torch.Tensor | None, microbatch: int, consumer: int) -> None:
        """Give the gradient of an input to the caller, of something joined to the runs that made its parts."""
        if use.source < 0:
            if grad is not None and self.leads:
                self.input_grad(use, grad, microbatch)
        elif isinstance(use.layout, Whole):
            self.credit(use, -1, grad, consumer)
        else:
            for m in range(1 if isinstance(use.layout, Fixed) else len(self.state.program.sizes)):
                part = grad
                if grad is not None and isinstance(use.layout, Split):
                    part = grad.narrow(*self.state.rows(use.layout, m))
                self.credit(use, m, part, consumer)

    def credit(self, use: Use, microbatch: int, grad: torch.Tensor | None, consumer: int) -> None:
        if self.state.program.placement[use.source][max(microbatch, 0)] != self.place:
            self.owe(use.tensor, microbatch, grad, consumer)
        elif grad is not None:
            self.add_grad((use.tensor, microbatch), grad)

    def owe(self, name: str, microbatch: int, grad: torch.Tensor | None, consumer: int) -> None:
        """Keep a gradient to be sent."""
        key = (name, microbatch, consumer)
        held = self.mine.outgoing.get(key)  # a segment may take one tensor in two ways
        self.mine.outgoing[key] = grad if held is None else held if grad is None else held + grad

    def add_grad(self, key: Key, grad: torch.Tensor) -> None:
        held = self.mine.grads.get(key)
        self.mine.grads[key] = grad if held is None else held + grad

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
        instruction, message = step.instruction, step.message
        value = self.mine.outgoing.pop(message[:3], None) if instruction.grad else self.mine.values[step.value]
        if not self.state.program.groups:
            self.exchange.send(instruction.peer, message, value)
            return
        size, rank = (1, 0) if self.seat is None else (self.seat.size, self.seat.rank)
        for there in receivers(self.state.program, size, rank, instruction.peer):
            self.exchange.send(there, message, value)

    def receive(self, step: Step) -> None:
        value = self.exchange.receive(self.name, step.message)
        if value is None:
            return
        if value.device != self.mine.device:
            value = value.to(self.mine.device)
        if step.instruction.grad:
            self.add_grad(step.value, value)
        else:
            self.mine.values[step.value] = value

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


WAYS = {
    "alias": Worker.alias_of, "given": Worker.from_caller, "once": Worker.from_caller, "value": Worker.value_of,
    "joined": Worker.joined,
}  # fmt: skip
