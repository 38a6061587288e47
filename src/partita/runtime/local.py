"""Local: runs Programs over the devices of this process, one worker thread each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from partita.capture import Captured, decode_symbol
from partita.cluster import Cluster
from partita.divide import Division, divide
from partita.graph import Graph
from partita.lockstep import effective
from partita.lower import lower
from partita.plan import Plan
from partita.program import Instruction, Partial, Program, Split
from partita.runtime import weight_share
from partita.runtime.allocator import keep_freed_memory
from partita.runtime.codegen import SegmentCode, generate
from partita.runtime.collectives import LocalGroup
from partita.runtime.compiled import compiler_of
from partita.runtime.kernels import resolver
from partita.runtime.layout import as_parameter, cat
from partita.runtime.progress import DeviceState, StepState
from partita.runtime.spmd_seats import Seat, whole_gradients
from partita.runtime.spmd_seats import places as seats
from partita.runtime.sync_norm import Gathering, join
from partita.runtime.team import Team
from partita.runtime.transport import Exchange
from partita.runtime.waits import Waits
from partita.runtime.worker import Worker
from partita.sharding.batch import BatchLayouts
from partita.torch_compat import has_grad_hooks
from partita.trace import Trace


@dataclass(frozen=True)
class Lowered:
    """The Programs of one captured graph under one plan and batch size, and the code of their segments.

    ``codes``: of the leaders, where the plan divides single ops; ``members``: of each rank of a group, then.
    """

    step: Program
    forward: Program
    backward: Program | None
    codes: tuple[SegmentCode, ...]
    division: Division | None = None
    members: tuple[tuple[SegmentCode, ...], ...] = ()


class Local:
    """One captured model under one plan on the devices of this process. ``repeats``: whether backward can run more
    than once after one forward. ``shares_memory``: whether the members of a group see one memory of a parameter."""

    repeats = shares_memory = True

    def __init__(self, captured: Captured, layouts: BatchLayouts, plan: Plan, cluster: Cluster, team: Team) -> None:
        self.captured, self.layouts, self.plan, self.team = captured, layouts, plan, team
        self.torch_devices = {d.name: torch_device(d.name) for d in cluster.devices}
        if any(d.type == "cpu" for d in self.torch_devices.values()):
            keep_freed_memory()
        self.compiler = compiler_of(team)
        self._lowered: dict[tuple[int, bool], Lowered] = {}
        self._sharing: dict[int, weight_share.Sharing | None] = {}
        self._divisions: dict[int, Lowered] = {}

    def lowered(self, batch: int, grad: bool) -> Lowered:
        """Programs and code for a batch size, made once."""
        found = self._lowered.get((batch, grad))
        if found is None:
            graph = self.captured.graph
            division = divide(graph, self.layouts, self.plan, batch=batch)
            programs = {
                part: lower(graph, self.layouts, self.plan, batch=batch, train=grad, part=part, division=division)
                for part in (("step", "forward", "backward") if grad else ("forward",))
            }
            first = programs["forward"]
            if division is None:
                used, _ = effective(graph, self.layouts, self.plan, batch)
                members: tuple[tuple[SegmentCode, ...], ...] = (self._codes(graph, used, first),)
            else:
                members = tuple(self._codes(m.graph, m.layouts, first) for m in division.members)
            found = Lowered(
                programs.get("step", first), first, programs.get("backward"), members[0], division,
                members if division is not None else (),
            )  # fmt: skip
            self._lowered[batch, grad] = found
            self._divisions.update({id(p): found for p in programs.values()} if division is not None else {})
        return found

    def _codes(self, graph: Graph, used: BatchLayouts, program: Program) -> tuple[SegmentCode, ...]:
        """The code of every segment over one graph: the captured one, or a member's."""
        tensor = [self.plan.stages[s.stage].tensor if s.stage >= 0 else 1 for s in program.segments]
        return tuple(
            generate(
                graph, segment, used, index=i, symbols=decode_symbol,
                resolve=resolver(self.captured, program, segment, members=tensor[i]), compiler=self.compiler,
            )
            for i, segment in enumerate(program.segments)
        )  # fmt: skip

    def begin(
        self,
        program: Program,
        codes: tuple[SegmentCode, ...],
        given: Mapping[str, torch.Tensor],
        parameters: Mapping[str, torch.Tensor],
        *,
        grad: bool,
        record: bool = False,
    ) -> StepState:
        """A fresh step: the batch-independent part is computed here, on the caller's thread."""
        settle(program, parameters, self.torch_devices)
        state = StepState(
            graph=self.captured.graph,
            program=program,
            codes=codes,
            given={**self.captured.constants, **given},
            parameters=dict(parameters),
            devices={d: DeviceState(self.torch_devices[d]) for d in seats(program)},
            grad=grad,
            record=record,
        )
        segment, code = program.segments[0], codes[0]
        if segment.ops:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the graph holds its casts
                uses = [state.given.get(u.tensor, state.parameters.get(u.tensor)) for u in segment.uses]
                outputs = code.run(state.batch, state.batch, torch.device("cpu"), *uses)
            state.once.update(zip(segment.outputs, outputs, strict=True))
            state.results.update({(n, -1): t for n, t in state.once.items() if n in state.graph.outputs})
        lowered = self._divisions.get(id(program))  # copies are taken now: the segment above may have changed buffers
        for where, (_, rank, _) in seats(program).items() if lowered is not None else ():
            if rank and lowered is not None and lowered.division is not None:
                clones = {n: given[n].clone() for n in lowered.division.clones if n in given}
                if self.shares_memory:
                    clones |= {n: parameters[n].detach().clone() for n in lowered.division.rewritten if n in parameters}
                state.devices[where].clones = clones
        return state

    def run(self, state: StepState, program: Program) -> None:
        """Every device walks its list of ``program``; returns when all have."""
        if program.groups:
            return self._run_groups(state, program)
        exchange = Exchange(program.devices, [device for device, instructions in program.instructions if instructions])
        meeting = Gathering(len(program.sizes), exchange.waits) if program.synchronised else None
        shared = self._shared(state, program, exchange.waits)
        ranks = {place: m for places in program.placement if len(places) > 1 for m, place in enumerate(places)}
        self.team.run(
            {
                device: _walk(Worker(device, state, exchange), instructions, meeting, ranks.get(device, 0), shared)
                for device, instructions in program.instructions
                if instructions
            },
            exchange.stop,
        )
        if shared is not None:
            shared.finish()

    def _run_groups(self, state: StepState, program: Program) -> None:
        """As ``run``, where members of groups walk their leader's list, each in its own seat."""
        lowered = self._divisions[id(program)]
        division = lowered.division
        assert division is not None
        where = seats(program)
        lists = dict(program.instructions)
        exchange = Exchange(tuple(where), [device for device, (leader, _, _) in where.items() if lists.get(leader)])
        for leader, (_, rank, size) in where.items():
            if leader in state.groups:  # autograd holds the sides that the forward used
                LocalGroup.begin(state.groups[leader], exchange.waits)
            elif rank == 0 and size > 1:
                state.groups[leader] = LocalGroup.make(size, exchange.waits)
        most = max(size for _, _, size in where.values())
        meetings = [
            Gathering(len(program.sizes), exchange.waits) if program.synchronised else None for _ in range(most)
        ]
        ranks = {place: m for spread in program.placement if len(spread) > 1 for m, place in enumerate(spread)}
        jobs = {}
        for device, (leader, rank, size) in where.items():
            instructions = lists.get(leader, ())
            if not instructions:
                continue
            local = division.members[rank]
            group = state.groups[leader][rank] if size > 1 else None
            seat = Seat(leader, rank, size, group, local.graph, lowered.members[rank], local.shards if size > 1 else {})
            worker = Worker(device, state, exchange, seat)
            jobs[device] = _walk(worker, instructions, meetings[rank], ranks.get(leader, 0), None)
        self.team.run(jobs, exchange.stop)

    def _shared(self, state: StepState, program: Program, waits: Waits) -> weight_share.Meeting | None:
        """Where this program's replicas make their weight gradients together; None where there are none to make."""
        if id(program) not in self._sharing:
            backward = any(i.kind == "B" for _, order in program.instructions for i in order)
            local = all(self.torch_devices[d].type == "cpu" for d in program.devices)
            self._sharing[id(program)] = weight_share.sharing(state.graph, program) if backward and local else None
        found = self._sharing[id(program)]
        return weight_share.Meeting(found, waits) if found is not None else None

    def gather(self, state: StepState, name: str, device: torch.device) -> torch.Tensor:
        """One output of the model, of all microbatches."""
        parts = [state.results[key] for key in sorted(k for k in state.results if k[0] == name)]
        if len(parts) == 1:
            return parts[0].to(device)
        layout = dict(state.program.layouts).get(name)
        parts = [p.to(device) for p in parts]
        if isinstance(layout, Split):
            return cat(parts, layout.dim)
        if isinstance(layout, Partial):
            return torch.stack(parts).sum(0)
        return parts[0]

    def seed(self, state: StepState, name: str, grad: torch.Tensor) -> None:
        """Give the gradient of an output to the runs that made it."""
        program = state.program
        index = next((i for i, s in enumerate(program.segments) if name in s.outputs), None)
        if index is None:
            return
        places = program.placement[index]
        whole = program.segments[index].phase == "whole"
        layout = dict(program.layouts).get(name)
        for m, place in enumerate(places):
            part = grad
            if not whole and len(program.sizes) > 1:
                if isinstance(layout, Split):
                    part = grad.narrow(*state.rows(layout, m))
                elif not isinstance(layout, Partial) and m:
                    break
            key = (name, -1 if whole else m)
            for member in program.members(place):
                device = state.devices[member]
                mine = part.to(device.device)
                held = device.grads.get(key)
                device.grads[key] = mine if held is None else held + mine

    def parameter_grads(self, state: StepState) -> dict[str, torch.Tensor]:
        """Each parameter's gradient: the sum over the devices that used it, large ones summed in parallel."""
        by_device: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for where, device in state.devices.items():
            for name, alias in device.aliases.items():
                if alias.grad is not None:
                    by_device.setdefault(name, []).append((where, alias.grad))
                    alias.grad = None
        lowered = self._divisions.get(id(state.program))
        if lowered is not None and lowered.division is not None:
            found = whole_gradients(lowered.division, state.program, by_device, state.parameters)
        else:
            found = {name: [grad for _, grad in grads] for name, grads in by_device.items()}
        by_device.clear()  # a gradient goes as soon as it has been added
        shared = {n: g for n, g in found.items() if len(g) > 1}
        if len(shared) > 1 and all(g.device.type == "cpu" for gs in shared.values() for g in gs):
            self._sum_in_parallel(state, shared)
        total: dict[str, torch.Tensor] = {}
        for name, grads in found.items():
            home = state.parameters[name].device
            result = grads[0].to(home)
            for grad in grads[1:]:
                result = result.add_(grad.to(home))
            total[name] = result
        return total

    def _sum_in_parallel(self, state: StepState, shared: dict[str, list[torch.Tensor]]) -> None:
        loads = dict.fromkeys(state.devices, 0)
        share: dict[str, list[list[torch.Tensor]]] = {device: [] for device in state.devices}
        for grads in sorted(shared.values(), key=lambda g: -g[0].numel()):
            device = min(loads, key=lambda d: loads[d])
            loads[device] += grads[0].numel()
            share[device].append(grads)
        self.team.run({device: _adder(work) for device, work in share.items() if work}, lambda: None)

    def trace(self, state: StepState) -> Trace:
        return Trace(tuple(e for d in state.devices.values() for e in d.events))


def settle(program: Program, parameters: Mapping[str, torch.Tensor], devices: Mapping[str, torch.device]) -> None:
    """Move each parameter to the first device that uses it, and those that live in host memory there. Where all devices
    are CPU cores there is nothing to do."""
    if all(device.type == "cpu" for device in devices.values()):
        return
    moved, lent = set[str](), program.lent
    for name in lent:
        parameter = parameters.get(name)
        if parameter is not None and not (parameter.device.type == "cpu" and parameter.is_pinned()):
            parameter.data = parameter.data.cpu().pin_memory()
    moved |= lent
    for segment, places in zip(program.segments, program.placement, strict=True):
        for use in segment.uses:
            parameter = parameters.get(use.tensor)
            if parameter is None or use.tensor in moved or places[0] not in devices:
                continue
            moved.add(use.tensor)
            if parameter.device != devices[places[0]]:
                parameter.data = parameter.data.to(devices[places[0]])


def deliver(parameters: Mapping[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
    """Add each gradient to its parameter's ``.grad``, without a copy where it can become the ``.grad`` itself.

    A parameter with hooks gets it through autograd, so that they run.
    """
    hooked = {name: grads.pop(name) for name in list(grads) if has_grad_hooks(parameters[name])}
    with torch.no_grad():
        for name, grad in grads.items():
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = as_parameter(grad, parameter)
            else:
                parameter.grad.add_(grad)
    if hooked:
        torch.autograd.backward([parameters[name] for name in hooked], list(hooked.values()))


def torch_device(name: str) -> torch.device:
    """``cpu:0`` is a group of cores, all of them torch's one cpu."""
    kind = name.split(":")[0]
    return torch.device("cpu") if kind == "cpu" else torch.device(name)


def _walk(
    worker: Worker,
    instructions: tuple[Instruction, ...],
    meeting: Gathering | None,
    rank: int,
    weights: weight_share.Meeting | None,
) -> Callable[[], None]:
    def walk() -> None:
        join(meeting, rank)
        share = weight_share.Shared(weights, worker.name) if weights is not None else None
        worker.mine.queue.share = share
        try:
            with worker.exchange.waits.walking(worker.name, worker.doing):
                worker.walk(instructions)
                if share is not None:
                    share.end(worker.noted)
        finally:
            worker.mine.queue.share = None
            join(None, 0)

    return walk


def _adder(work: list[list[torch.Tensor]]) -> Callable[[], None]:
    def add() -> None:
        with torch.no_grad():
            for grads in work:
                while len(grads) > 1:
                    grads[0].add_(grads.pop())

    return add
