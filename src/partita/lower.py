"""Lower: (Graph, BatchLayouts, Plan) -> Program: segments per stage and phase, per device the order of instructions.

    stage 0 on cpu:0   F0.0 >x F0.1 >x <dx B0.0 <dx B0.1        one microbatch after the other, as the schedule says
    stage 1 on cpu:1   <x F1.0 B1.0 >dx <x F1.1 B1.1 >dx

Three phases: *once* (batch-independent, no gradient: masks, random draws), *split* (per microbatch), *whole* (after an
op that couples the batch; all forwards come before it, all backwards after it). With a single microbatch split and
whole are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from partita.assign import listing_of, stages_of
from partita.compilable import ranges as compiled_ranges
from partita.cost.away import leaving
from partita.cost.kept import given_bytes
from partita.divide import Division, divide, leaders
from partita.graph import Graph, Op
from partita.lockstep import effective
from partita.phases import divides, phases_of
from partita.plan import Offload, Plan
from partita.program import Fixed, Instruction, Layout, Once, Program, Segment, Split, Use, Whole
from partita.schedules import schedule
from partita.sharding.batch import BatchLayouts

ONCE_STAGE = -1
CALLER = "caller"
NORM = "aten.batch_norm.default"


def lower(
    graph: Graph,
    layouts: BatchLayouts,
    plan: Plan,
    *,
    batch: int,
    train: bool = True,
    part: str = "step",
    division: Division | None = None,
) -> Program:
    """The Program for a batch of ``batch`` samples.

    ``part``: 'step' (forward and backward interleaved as the schedule says), 'forward' (all forwards; activations
    kept when ``train``) or 'backward' (what follows such a forward). The plan must have passed ``check``.
    ``division``: what ``divide`` found for this plan and batch, where it is known already; its Program is that of the
    leaders' local graph.
    """
    division = division or divide(graph, layouts, plan, batch=batch)
    plan = leaders(plan)
    layouts, synchronised = effective(graph, layouts, plan, batch)
    sizes = plan.batch.split(batch) if batch > 0 and divides(graph, layouts) else (batch,)
    if division is None:
        stage_of: Mapping[str, int] = stages_of(plan, graph)
        phases: Mapping[str, str] = phases_of(graph, layouts, single=len(sizes) == 1)
    else:
        graph, layouts = division.graph, division.members[0].layouts
        stage_of, phases = division.stage_of, division.phases
    segments = _segments(graph, layouts, plan, stage_of, phases, sizes, synchronised)
    placement = tuple(_placement(s, plan, len(sizes)) for s in segments)
    builder = _Builder(graph, segments, placement, sizes, train)
    joined = part != "step" or any(s.phase == "whole" for s in segments)
    steps = schedule(plan.schedule, tuple(s.devices for s in plan.stages), len(sizes), joined=joined, train=train)
    instructions = builder.build(steps, part)
    return Program(
        devices=tuple(device for device, _ in instructions),
        sizes=sizes,
        segments=segments,
        placement=placement,
        instructions=instructions,
        layouts=tuple((t.name, layouts.of[t.name]) for t in graph.tensors if t.name in layouts.of),
        output_device=plan.stages[-1].devices[0],
        train=train,
        synchronised=synchronised,
        groups=division.groups if division is not None else (),
    )


def _segments(
    graph: Graph,
    layouts: BatchLayouts,
    plan: Plan,
    stage_of: Mapping[str, int],
    phases: Mapping[str, str],
    sizes: tuple[int, ...],
    synchronised: bool,
) -> tuple[Segment, ...]:
    single = len(sizes) == 1
    keys: list[tuple[int, str]] = [(ONCE_STAGE, "once")]
    keys += [(s, "split") for s in range(len(plan.stages))]
    keys += [(s, "whole") for s in range(len(plan.stages))]
    members: dict[tuple[int, str], list[Op]] = {key: [] for key in keys}
    for op in graph.ops:
        phase = phases[op.name]
        members[(ONCE_STAGE if phase == "once" else stage_of[op.name], phase)].append(op)
    live = [key for key in keys if members[key] or key == (ONCE_STAGE, "once")]
    index = {op.name: i for i, key in enumerate(live) for op in members[key]}
    producer = {out: index[op.name] for op in graph.ops for out in op.outputs if out}
    wanted: dict[str, None] = dict.fromkeys(graph.outputs)
    uses_of: list[tuple[Use, ...]] = []
    choices_of: list[tuple[tuple[str, str, int], ...]] = []
    for i, key in enumerate(live):
        uses: dict[tuple[str, Layout], Use] = {}
        asked: list[tuple[str, str, Layout]] = []
        totals: list[tuple[str, str, tuple[str, Layout]]] = []
        for op in members[key]:
            for name in op.uses():
                source = producer.get(name, -1)
                if source == i:
                    continue
                held = Whole() if single else _held(graph, layouts, phases, name)
                take = Whole() if single else _take(layouts, key[1], op, name, held)
                uses.setdefault((name, take), Use(name, source, held, take))
                asked.append((op.name, name, take))
                if source >= 0:
                    wanted[name] = None
            rewrite = None if single or key[1] != "split" else layouts.rewrites.get(op.name)
            if rewrite is not None and rewrite.kind == "sum_over_total":  # the total is taken over the whole batch
                for name in filter(None, (rewrite.target, rewrite.weight)):
                    uses.setdefault((name, Once()), Use(name, producer.get(name, -1), Once(), Once()))
                    totals.append((op.name, f"whole {name}", (name, Once())))
                    if producer.get(name, -1) >= 0:
                        wanted[name] = None
        uses_of.append(tuple(uses.values()))
        ways = Counter(u.tensor for u in uses.values())
        position = {key: n for n, key in enumerate(uses)}
        choices_of.append(
            (
                *((op, t, position[t, take]) for op, t, take in asked if ways[t] > 1),
                *((op, label, position[use]) for op, label, use in totals),
            )
        )
    result = []
    position_of = (
        {op.name: at for at, op in enumerate(graph.ops)} if any(s.offload or s.compile for s in plan.stages) else {}
    )
    for i, (stage, phase) in enumerate(live):
        ops = members[(stage, phase)]
        outputs = tuple(o for op in ops for o in op.outputs if o in wanted)
        recompute = _recompute(graph, ops, plan.stages[stage].recompute) if stage >= 0 else ()
        rewritten = phase == "split" and not single
        rescaled = tuple(op.name for op in ops if op.name in layouts.rewrites) if rewritten else ()
        names = tuple(op.name for op in ops)
        segment = Segment(stage, phase, names, uses_of[i], outputs, recompute, choices_of[i], rescaled)
        if stage >= 0 and plan.stages[stage].offload:
            samples = max(sizes) if phase == "split" else sum(sizes)
            segment = _offloaded(graph, ops, segment, plan.stages[stage].offload, position_of, samples)
        if stage >= 0 and plan.stages[stage].compile:
            eager = {n for n in rescaled if layouts.rewrites[n].kind != "call"}
            eager |= {op.name for op in ops if op.target == NORM} if synchronised and phase == "split" else set()
            found = compiled_ranges(graph, ops, listing_of(plan.stages[stage].compile), position_of, eager)
            segment = replace(segment, compiled=found)
        result.append(segment)
    return tuple(result)


def _offloaded(
    graph: Graph, ops: list[Op], segment: Segment, offload: Offload, position_of: Mapping[str, int], samples: int
) -> Segment:
    """The segment with what waits in host memory."""
    listed = _listed(ops, tuple(dict.fromkeys((*offload.activations, *offload.parameters))))
    mine = tuple((start, stop) for start, stop, name in listed if name in offload.activations)
    at = [position_of[op.name] for op in ops]
    away = leaving(graph, at, mine, segment.recompute, segment.outputs, given_bytes(graph), samples) if mine else ()
    lent = []
    for start, stop, name in listed:
        uses = dict.fromkeys(n for op in ops[start:stop] for n in op.uses() if graph.tensor(n).role == "parameter")
        if uses and name in offload.parameters:
            lent.append((start, tuple(uses)))
    return replace(segment, offload=tuple((a, b) for a, b, _ in listed), away=away, lent=tuple(lent))


def _listed(ops: list[Op], patterns: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Index ranges of the ops of each listed module or op, and its name."""
    listing = listing_of(patterns)
    ranges: list[tuple[int, int, str]] = []
    owner = -1
    for i, op in enumerate(ops):
        match = listing(op)
        if match >= 0 and match == owner:
            ranges[-1] = (ranges[-1][0], i + 1, patterns[match])
        elif match >= 0:
            ranges.append((i, i + 1, patterns[match]))
        owner = match
    return ranges


def _held(graph: Graph, layouts: BatchLayouts, phases: Mapping[str, str], name: str) -> Layout:
    """How a tensor exists outside the segment that uses it: inputs, parameters and once-values exist whole."""
    made_by = graph.producer(name)
    if made_by is None or phases[graph.ops[made_by].name] == "once":
        return Once()
    return layouts.of[name]


def _take(layouts: BatchLayouts, phase: str, op: Op, name: str, held: Layout) -> Layout:
    """How the op wants it. Rows of its microbatch, where the rules say so; else all of it."""
    if phase != "split":
        return Whole()
    wanted = layouts.take(op.name, name)
    return wanted if isinstance(wanted, Split) else (held if not isinstance(held, Once) else Once())


def _recompute(graph: Graph, ops: list[Op], patterns: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Index ranges of ops to run again in backward: one per listed module and call, without ops that mutate
    what existed before them (running statistics would be updated twice)."""
    if not patterns:
        return ()
    ranges: list[tuple[int, int]] = []
    start, owner = 0, ""
    made: set[str] = set()
    listing = listing_of(patterns)
    for i, op in enumerate(ops):
        at = listing(op) if op.grad else -1
        match = patterns[at] if at >= 0 else ""
        known = made if match == owner else ()
        if op.random or any(base not in known for base in op.writes):
            match = ""
        if match != owner:
            if owner:
                ranges.append((start, i))
            start, owner, made = i, match, set()
        made.update(graph.tensor(o).base or o for o in op.outputs if o)
    if owner:
        ranges.append((start, len(ops)))
    return tuple(ranges)


def _placement(segment: Segment, plan: Plan, microbatches: int) -> tuple[str, ...]:
    if segment.stage == ONCE_STAGE:
        return (CALLER,)
    devices = plan.stages[segment.stage].devices
    if segment.phase == "whole":
        return (devices[0],)
    return tuple(devices[m % len(devices)] for m in range(microbatches))


@dataclass(frozen=True, slots=True)
class _Run:
    """One execution of a segment: microbatch -1 is the whole batch."""

    segment: int
    microbatch: int


class _Builder:
    """Puts the transfers around the steps. Every message is sent once per receiving device."""

    def __init__(
        self,
        graph: Graph,
        segments: tuple[Segment, ...],
        placement: tuple[tuple[str, ...], ...],
        sizes: tuple[int, ...],
        train: bool,
    ) -> None:
        self.graph, self.segments, self.placement, self.sizes, self.train = graph, segments, placement, sizes, train
        self.by_stage = {(s.stage, s.phase): i for i, s in enumerate(segments)}
        self.batch = sum(sizes)
        self.consumers: dict[str, list[int]] = {}
        for i, segment in enumerate(segments):
            for name in dict.fromkeys(u.tensor for u in segment.uses if u.source > 0):
                self.consumers.setdefault(name, []).append(i)
        self.has_grad = [any(graph.tensor(o).needs_grad for o in s.outputs) and s.phase != "once" for s in segments]
        self.received: set[tuple[str, str, int]] = set()

    def device(self, run: _Run) -> str:
        places = self.placement[run.segment]
        return places[run.microbatch] if run.microbatch >= 0 else places[0]

    def runs(self, segment: int) -> tuple[_Run, ...]:
        if self.segments[segment].phase == "whole":
            return (_Run(segment, -1),)
        return tuple(_Run(segment, m) for m in range(len(self.sizes)))

    def peers(self, producer: _Run, consumer: int, name: str) -> tuple[_Run, ...]:
        """The runs of ``consumer`` that use what this run of the producer makes."""
        if producer.microbatch < 0 or self.segments[consumer].phase == "split":
            return (_Run(consumer, producer.microbatch),)
        held = next(u.layout for u in self.segments[consumer].uses if u.tensor == name)
        return (_Run(consumer, -1),) if not isinstance(held, Fixed) or producer.microbatch == 0 else ()

    def sources(self, consumer: _Run, producer: int, held: Layout) -> tuple[_Run, ...]:
        """The runs of ``producer`` whose results this run of the consumer uses."""
        if self.segments[producer].phase == "whole":
            return (_Run(producer, -1),)
        if consumer.microbatch >= 0:
            return (_Run(producer, consumer.microbatch),)
        runs = self.runs(producer)
        return runs[:1] if isinstance(held, Fixed) else runs

    def nbytes(self, name: str, run: _Run) -> int:
        batch = self.sizes[run.microbatch] if run.microbatch >= 0 else self.batch
        return self.graph.tensor(name).nbytes(batch)

    def forward(self, run: _Run) -> list[Instruction]:
        here, segment = self.device(run), self.segments[run.segment]
        before: list[Instruction] = []
        for use in segment.uses:
            if use.source <= 0:
                continue
            for source in self.sources(run, use.source, use.layout):
                there = self.device(source)
                key = (here, use.tensor, source.microbatch)
                if there != here and key not in self.received:
                    self.received.add(key)
                    before.append(
                        Instruction("RECV", source.segment, source.microbatch, use.tensor, there,
                                    nbytes=self.nbytes(use.tensor, source))
                    )  # fmt: skip
        after: list[Instruction] = []
        for name in segment.outputs:
            targets: dict[str, None] = {}
            for consumer in self.consumers.get(name, ()):
                for peer in self.peers(run, consumer, name):
                    targets[self.device(peer)] = None
            for there in targets:
                if there != here:
                    after.append(
                        Instruction("SEND", run.segment, run.microbatch, name, there, nbytes=self.nbytes(name, run))
                    )
        return [*before, Instruction("F", run.segment, run.microbatch), *after]

    def backward(self, run: _Run) -> list[Instruction]:
        if not self.has_grad[run.segment]:
            return []
        here, segment = self.device(run), self.segments[run.segment]
        before: list[Instruction] = []
        for name in segment.outputs:
            if not self.graph.tensor(name).needs_grad:
                continue
            for consumer in self.consumers.get(name, ()):
                if not self.has_grad[consumer]:
                    continue
                for peer in self.peers(run, consumer, name):
                    if self.device(peer) != here:
                        before.append(
                            Instruction("RECV", consumer, run.microbatch, name, self.device(peer), True,
                                        self.nbytes(name, run))
                        )  # fmt: skip
        after: list[Instruction] = []
        for name, source_segment, held in {(u.tensor, u.source, u.layout): None for u in segment.uses if u.source > 0}:
            if not self.graph.tensor(name).needs_grad:
                continue
            for source in self.sources(run, source_segment, held):
                there = self.device(source)
                if there != here:
                    after.append(
                        Instruction("SEND", run.segment, source.microbatch, name, there, True,
                                    self.nbytes(name, source))
                    )  # fmt: skip
        return [*before, Instruction("B", run.segment, run.microbatch), *after]

    def build(
        self, steps: Mapping[str, tuple[object, ...]], part: str
    ) -> tuple[tuple[str, tuple[Instruction, ...]], ...]:
        lists: dict[str, list[Instruction]] = {device: [] for device in steps}
        wholes = [i for i, s in enumerate(self.segments) if s.phase == "whole"]
        for device, order in steps.items():
            out, turned = lists[device], False
            for step in order:
                kind, stage, microbatch = step.kind, step.stage, step.microbatch  # type: ignore[attr-defined]
                if kind != "F" and not turned:
                    turned = True
                    self._turn(device, wholes, part, out)
                segment = self.by_stage.get((stage, "split"))
                if segment is None:
                    continue
                run = _Run(segment, microbatch)
                if kind == "F" and part != "backward":
                    out.extend(self.forward(run))
                elif kind == "B" and part != "forward" and self.train:
                    out.extend(self.backward(run))
                elif kind == "W" and part != "forward" and self.train and self.has_grad[segment]:
                    out.append(Instruction("W", segment, microbatch))
            if not turned:
                self._turn(device, wholes, part, out)
        return tuple((device, tuple(out)) for device, out in lists.items())

    def _turn(self, device: str, wholes: list[int], part: str, out: list[Instruction]) -> None:
        """Where a device's forwards end: the whole-batch segments, forwards then backwards."""
        mine = [_Run(i, -1) for i in wholes if self.device(_Run(i, -1)) == device]
        for run in mine:
            if part != "backward":
                out.extend(self.forward(run))
        for run in reversed(mine):
            if part != "forward" and self.train:
                out.extend(self.backward(run))
