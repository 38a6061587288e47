"""Engine: one captured model under one plan, this rank's part of it; the surface of ``runtime.local.Local``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from partita.capture import Captured, decode_symbol
from partita.cluster import Cluster
from partita.graph import Graph
from partita.plan import Plan
from partita.program import Instruction, Partial, Program, Split
from partita.runtime.codegen import SegmentCode, generate
from partita.runtime.distributed import results
from partita.runtime.distributed.collective import Members, spread
from partita.runtime.distributed.gathering import Gatherer, asking
from partita.runtime.distributed.holding import Holding
from partita.runtime.distributed.messages import Exchange, Sent, rank_of
from partita.runtime.distributed.reduce import Reducer
from partita.runtime.distributed.shards import Shards
from partita.runtime.distributed.sharing import Shares, Sharing
from partita.runtime.distributed.world import World
from partita.runtime.kernels import resolver
from partita.runtime.layout import as_parameter
from partita.runtime.local import Local, Lowered
from partita.runtime.progress import StepState
from partita.runtime.route import Step
from partita.runtime.spmd_seats import Seat
from partita.runtime.sync_norm import join
from partita.runtime.team import Team
from partita.runtime.weight_grad import mark
from partita.runtime.worker import Worker
from partita.sharding.batch import BatchLayouts
from partita.trace import Trace


class Distributed(Local):
    """One captured model under one plan on the ranks of a World."""

    shares_memory = False  # every rank has its own, and changes it itself
    repeats = False  # what other ranks' parts were gathered for is gone after a backward

    def __init__(
        self, captured: Captured, layouts: BatchLayouts, plan: Plan, cluster: Cluster, team: Team, world: World,
        holding: Holding, shards: Shards, sent: Sent,
    ) -> None:  # fmt: skip
        super().__init__(captured, layouts, plan, cluster, team)
        self.world, self.holding, self.shards, self.sent = world, holding, shards, sent
        self.gatherer: Gatherer | None = None
        self._members: dict[tuple[int, ...], Members] = {}
        self.torch_devices = dict.fromkeys(self.torch_devices, world.device)
        self.fqn = {t.name: t.path for t in captured.graph.of_role("parameter")}
        self.sharing = Sharing(world, cluster, captured, self.fqn, holding, shards, sent)
        self._shares: dict[int, Shares] = {}
        self._agreement: results.Agreement | None = None
        self._reduced: dict[str, torch.Tensor] = {}
        self._summed: frozenset[str] = frozenset()

    def lowered(self, batch: int, grad: bool) -> Lowered:
        """Programs and code for a batch size; the first time also what ranks exchange (collective)."""
        new = (batch, grad) not in self._lowered
        found = super().lowered(batch, grad)
        if new:
            for program in dict.fromkeys(p for p in (found.step, found.forward, found.backward) if p is not None):
                self._shares[id(program)] = self.sharing.of(program, found)
        return found

    def _codes(self, graph: Graph, used: BatchLayouts, program: Program) -> tuple[SegmentCode, ...]:
        """Under ZeRO 3 the ops ask for their parameters."""
        if self.shards.level < 3:
            return super()._codes(graph, used, program)
        found = self.sharing.units(program, graph)
        tensor = [self.plan.stages[s.stage].tensor if s.stage >= 0 else 1 for s in program.segments]
        return tuple(
            generate(
                graph, segment, used, index=i, symbols=decode_symbol,
                resolve=asking(
                    resolver(self.captured, program, segment, members=tensor[i]), found, lambda: self.gatherer
                ),
            )
            for i, segment in enumerate(program.segments)
        )  # fmt: skip

    def members(self, ranks: tuple[int, ...]) -> Members:
        if ranks not in self._members:
            self._members[ranks] = Members(self.world, ranks, self.sent, "sum")
        return self._members[ranks]

    # -- as Local ------------------------------------------------------------------------------------------------------

    def begin(
        self, program: Program, codes: tuple[SegmentCode, ...], given: Mapping[str, torch.Tensor],
        parameters: Mapping[str, torch.Tensor], *, grad: bool, record: bool = False,
    ) -> StepState:  # fmt: skip
        watch = self.world.watch
        watch.inside, watch.what = True, "the beginning of a call"
        shares = self._shares[id(program)]
        try:
            inputs = {n: given[n] for n in self.captured.inputs if n in given}
            changed = self.shards.changed
            self._agreement = results.Agreement(self.world, inputs, draws=shares.draws, changed=changed)
            if self.shards.level in (1, 2) and self._agreement.anything_changed():
                self.shards.refresh()
            held = {n: self.holding.own.get(self.fqn[n]) for n in parameters if n in shares.uses}
            mine = {n: p for n, p in held.items() if p is not None} | self._fetched(shares, parameters)
            state = super().begin(program, codes, given, mine, grad=grad, record=record)
        except BaseException as error:
            watch.failed(error)
            raise
        own = state.devices.get(self.world.name)
        state.devices = {} if own is None else {self.world.name: own}
        if own is not None and self.shards.level == 3:
            own.aliases.update(self._leaves(shares, parameters, grad))
        return state

    def _leaves(self, shares: Shares, parameters: Mapping[str, torch.Tensor], grad: bool) -> dict[str, torch.Tensor]:
        """Leaves over the sharded parameters: empty ones, or gathered for the whole step."""
        found: dict[str, torch.Tensor] = {}
        for name in (n for unit in shares.units.names for n in unit):
            entry = self.shards.of[self.fqn[name]]
            leaf = torch.empty(entry.whole.shape, dtype=entry.local.dtype, device=entry.local.device)
            if shares.streams:
                leaf.untyped_storage().resize_(0)
            found[name] = leaf
        if not shares.streams:
            entries = {n: self.shards.of[self.fqn[n]] for n in found}
            with torch.no_grad():
                self.shards.gather(entries.values(), {entries[n].name: t for n, t in found.items()})
        for name, leaf in found.items():
            leaf.requires_grad_(grad and parameters[name].requires_grad)
            mark(leaf, name)
        return found

    def _fetched(self, shares: Shares, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this rank uses in this program and does not hold; all ranks take part in fetching it."""
        found = {}
        for name, wanted in shares.borrowed:
            value = self.holding.broadcast(self.fqn[name])
            if wanted:
                found[name] = value.requires_grad_(parameters[name].requires_grad)
        return found

    def run(self, state: StepState, program: Program) -> None:
        """This rank walks its list of ``program``."""
        world, shares = self.world, self._shares[id(program)]
        exchange = Exchange(world, shares.traffic, self.sent)
        instructions = shares.instructions
        backward = any(i.kind == "B" for _, order in program.instructions for i in order)
        reducer = self._reducer(state, shares) if backward else None
        if reducer is not None and not any(i.kind == "W" for i in instructions):
            reducer.watch_leaves()
        forward = any(i.kind == "F" for _, order in program.instructions for i in order)
        if self.shards.level == 3 and shares.streams and instructions:
            if forward:
                aliases = state.devices[world.name].aliases
                entries = {n: self.shards.of[self.fqn[n]] for n in shares.units.of}
                self.gatherer = Gatherer(shares.units, aliases, entries)
            if reducer is not None and self.gatherer is not None:
                reducer.done = self.gatherer.done
        try:
            if instructions:
                self._walk(state, exchange, program, shares, instructions)
            exchange.finish()
            if self._agreement is not None:
                self._agreement.check()
                self._agreement = None
            if reducer is not None:
                self._reduced, self._summed = reducer.finish(), frozenset(reducer.state_of)
                results.input_gradients(world, state)
            if self.gatherer is not None and (backward or not state.grad):
                self.gatherer.free_all()
                self.gatherer = None
            if forward:
                results.share_buffers(world, state, shares.changed)
                self._same_generators(shares)
        except BaseException as error:
            world.watch.failed(error)
            raise
        finally:
            world.watch.inside, world.watch.what = False, "the script, between steps"

    def _walk(self, state: StepState, exchange: Exchange, program: Program, shares: Shares,
              instructions: tuple[Instruction, ...]) -> None:  # fmt: skip
        world = self.world
        worker = _Worker(world, state, exchange, shares.seat)
        position = next(
            (m for spread in program.placement if len(spread) > 1 for m, p in enumerate(spread) if p == shares.leader),
            0,
        )
        join(shares.norms, position)
        try:
            with self.gatherer.watching() if self.gatherer is not None else contextlib.nullcontext():
                worker.walk(instructions)
        finally:
            join(None, 0)

    def _reducer(self, state: StepState, shares: Shares) -> Reducer:
        """With this rank's leaves over the shared parameters it uses, so that their gradients are seen to arrive."""
        device = state.devices.get(self.world.name)
        aliases: dict[str, torch.Tensor] = {} if device is None else device.aliases
        for name in shares.sums.expected:
            parameter = state.parameters.get(name)
            if name not in aliases and parameter is not None and parameter.requires_grad:
                part = (
                    parameter.detach() if shares.seat is None else shares.seat.rows(name, parameter.detach()).detach()
                )
                alias = part.requires_grad_()
                mark(alias, name)
                aliases[name] = alias
        graph = self.captured.graph if shares.seat is None else shares.seat.graph
        return Reducer(graph, shares.sums, aliases, self.members, self._rows, self.world.device)

    def _rows(self, name: str) -> tuple[int, ...]:
        return self.shards.of[self.fqn[name]].rows

    def _same_generators(self, shares: Shares) -> None:
        """After draws that one rank made during the step, all ranks' generators are where its is."""
        if shares.drawer < 0:
            return
        state = torch.get_rng_state()
        own = state if shares.drawer == self.world.rank else None
        torch.set_rng_state(spread(self.world, own, shares.drawer, "the random generator's state").cpu())

    def gather(self, state: StepState, name: str, device: torch.device) -> torch.Tensor:
        return results.gather(self.world, state, name).to(device)

    def seed(self, state: StepState, name: str, grad: torch.Tensor) -> None:
        """Give the gradient of an output to the runs that made it, where this rank did."""
        program = state.program
        index = next((i for i, s in enumerate(program.segments) if name in s.outputs), None)
        mine = state.devices.get(self.world.name)
        if index is None or mine is None:
            return
        whole = program.segments[index].phase == "whole"
        layout = dict(program.layouts).get(name)
        for m, place in enumerate(program.placement[index]):
            part = grad
            if not whole and len(program.sizes) > 1:
                if isinstance(layout, Split):
                    part = grad.narrow(*state.rows(layout, m))
                elif m and not isinstance(layout, Partial):
                    break
            if place == self._shares[id(program)].leader:
                key = (name, -1 if whole else m)
                part = part.to(mine.device)
                held = mine.grads.get(key)
                mine.grads[key] = part if held is None else held + part

    def parameter_grads(self, state: StepState) -> dict[str, torch.Tensor]:
        """The gradients of the parameters this rank holds, summed over all ranks that used them."""
        total, self._reduced = self._reduced, {}
        for device in state.devices.values():
            for name, alias in device.aliases.items():
                if alias.grad is not None and name not in self._summed:
                    total[name] = alias.grad
                alias.grad = None
        shares, whole = self._shares[id(state.program)], {}
        for name in shares.converted:
            if name in total:
                total[name] = self._converted(shares, name, total[name])
        for name in list(total):
            fqn, grad = self.fqn[name], total.pop(name)  # whole gradients go as soon as their rows are out
            if fqn in self.shards.of:
                self.shards.deliver(fqn, grad)
            elif fqn in self.holding.cuts and self.holding.holds(fqn):
                self._add(self.holding.own[fqn], grad)
            elif self.holding.holds(fqn):
                whole[name] = grad
        return whole

    def _converted(self, shares: Shares, name: str, grad: torch.Tensor) -> torch.Tensor:
        """A gradient of the rows this program uses as one of what this rank holds."""
        fqn, seat = self.fqn[name], shares.seat
        cut = seat.shards.get(name) if seat is not None else None
        if cut is not None and seat is not None:
            group = tuple(rank_of(d) for d in shares.group)
            grad = self.holding.assembled(fqn, grad, cut, group)
        if fqn in self.holding.cuts:
            grad = self.holding.rows_of(fqn, grad)
        return self.shards.rows_of(fqn, grad) if fqn in self.shards.of else grad

    def _add(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = as_parameter(grad, parameter)
        else:
            parameter.grad.add_(grad)

    def trace(self, state: StepState) -> Trace:
        """Every rank's events on one clock (exact within a host). Collective."""
        own = [(e, state.origin) for d in state.devices.values() for e in d.events]
        every = [pair for found in self.world.gather(own, "the ranks' traces") for pair in found]
        first = min((origin for _, origin in every), default=0.0)
        shifted = (replace(e, start=e.start + o - first, end=e.end + o - first) for e, o in every)
        return Trace(tuple(shifted))


class _Worker(Worker):
    """A Worker that tells the watch where it is."""

    def __init__(self, world: World, state: StepState, exchange: Exchange, seat: Seat | None) -> None:
        super().__init__(world.name, state, exchange, seat)  # type: ignore[arg-type]
        self.watch = world.watch

    def forward(self, step: Step) -> None:
        stage = self.state.program.segments[step.instruction.segment].stage
        self.watch.reached("forward", stage, step.instruction.microbatch)
        super().forward(step)

    def backward(self, step: Step) -> None:
        stage = self.state.program.segments[step.instruction.segment].stage
        self.watch.reached("backward", stage, step.instruction.microbatch)
        super().backward(step)
