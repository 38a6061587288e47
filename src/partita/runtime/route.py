"""Route: one device's instruction list with everything looked up beforehand that is the same in every step.

    F1.0   in: x (a value, wants its gradient), w (alias)   out: y (needed here later)   drop after: x.0

A value is dropped after the last instruction that reads it: the last forward that takes it, the last send. What its
backward needs, autograd holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from partita.errors import PlanError
from partita.graph import Graph
from partita.program import Fixed, Instruction, Partial, Program, Split, Use

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Inlet:
    """How a run gets one tensor. ``way``: 'alias' (a parameter), 'given', 'once', 'value' or 'joined' (of all
    microbatches). ``leaf``: a gradient may have to go back. ``rows``: the microbatch's rows are cut from it. ``copy``:
    it is changed in place, and others hold it. ``changed``: the caller's own is changed in place.

    Of a value: ``key`` it is held under; ``sole``: nobody else in the step reads it or returns it; ``away``: its
    gradient goes to another device, else to a run of this one.
    """

    use: Use
    way: str
    leaf: bool
    rows: Split | None
    copy: bool
    changed: bool = False
    key: Key = ("", -1)
    sole: bool = False
    away: bool = False


@dataclass(frozen=True, slots=True)
class Outlet:
    """``key``: its name and microbatch. ``held``: read here later. ``result``: an output of the model."""

    key: Key
    held: bool
    result: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction, with what it takes, makes and drops. ``last_of_run``: the next is no W.

    ``after``: the segment on another device that draws random numbers just before this one, 0 for none; ``then``: the
    device of the one that draws next. Of F, ``samples`` of the microbatch. Of SEND and RECV, ``value``: what is sent,
    by tensor and microbatch, and ``message``: the key it travels under.
    """

    instruction: Instruction
    inlets: tuple[Inlet, ...] = ()
    outlets: tuple[Outlet, ...] = ()
    drops: tuple[Key, ...] = ()
    last_of_run: bool = True
    after: int = 0
    then: str = ""
    samples: int = 0
    value: Key = ("", -1)
    message: tuple[str, int, int, bool] = ("", -1, -1, False)


@dataclass(frozen=True, slots=True)
class Route:
    """The steps of one device's list. ``puts_off``: weight gradients have steps (W) of their own. ``adds``: a backward
    adds to gradients that one before it made. ``hosted``: something waits in host memory (``away``); ``lent``:
    parameters that live there."""

    instructions: tuple[Instruction, ...]
    steps: tuple[Step, ...]
    puts_off: bool
    adds: bool
    hosted: bool = False
    lent: frozenset[str] = frozenset()


def route(
    graph: Graph, program: Program, instructions: tuple[Instruction, ...], mutated: tuple[frozenset[int], ...]
) -> Route:
    """``mutated``: of each segment, the positions of the uses it changes in place.

    Raises PlanError where the Program could never end, or could not draw its random numbers in the model's order.
    """
    turns = random_turns(graph, program)
    stuck = waits_for_ever(program, turns)
    if stuck:
        raise PlanError(
            "this call runs the model's parts in another order than the plan's stages, so that the devices would wait "
            "for each other; make a plan with this call as the example:",
            stuck,
        )
    last: dict[Key, int] = {}
    for position, instruction in enumerate(instructions):
        for key in _reads(program, instruction):
            last[key] = position
    drops: dict[int, list[Key]] = {}
    for key, position in last.items():
        drops.setdefault(position, []).append(key)
    inlets: dict[tuple[int, bool], tuple[Inlet, ...]] = {}
    outputs = frozenset(graph.outputs)
    readers = Counter(use.tensor for segment in program.segments for use in segment.uses)
    batch = sum(program.sizes)
    steps = []
    for position, instruction in enumerate(instructions):
        index, microbatch = instruction.segment, instruction.microbatch
        step = Step(instruction, drops=tuple(drops.get(position, ())))
        if instruction.kind == "F":
            whole = microbatch < 0
            if (index, whole) not in inlets:
                inlets[index, whole] = _inlets(graph, program, index, mutated[index], whole=whole)
            taken = tuple(
                replace(
                    inlet, key=(inlet.use.tensor, microbatch), away=_away(program, inlet.use.source, index, microbatch),
                    sole=readers[inlet.use.tensor] == 1 and inlet.use.tensor not in outputs and not program.groups,
                )
                if inlet.way == "value" else inlet
                for inlet in inlets[index, whole]
            )  # fmt: skip
            outlets = tuple(
                Outlet((name, microbatch), (name, microbatch) in last, name in outputs)
                for name in program.segments[index].outputs
            )
            after, then = turns.get(index, (0, ""))
            samples = batch if whole else program.sizes[microbatch]
            step = replace(step, inlets=taken, outlets=outlets, after=after, then=then, samples=samples)
        elif instruction.kind == "W":
            following = instructions[position + 1 : position + 2]
            step = replace(step, last_of_run=not following or following[0].kind != "W")
        elif instruction.kind in ("SEND", "RECV"):
            value, grad = (instruction.tensor, microbatch), instruction.grad
            step = replace(step, value=value, message=(*value, index if grad else -1, grad))
        steps.append(step)
    return Route(
        instructions,
        tuple(steps),
        any(i.kind == "W" for i in instructions),
        sum(i.kind == "B" for i in instructions) > 1,
        any(s.away or s.lent for s in program.segments),
        program.lent,
    )


def _away(program: Program, source: int, segment: int, microbatch: int) -> bool:
    """Whether a microbatch of another segment's tensor is made on another device than it is used on."""
    made, used = (program.placement[i] for i in (source, segment))
    return made[max(microbatch, 0)] != used[max(microbatch, 0)]


def parts(program: Program, use: Use) -> tuple[Key, ...]:
    """The values that together are the whole of a tensor."""
    if isinstance(use.layout, Split | Partial):
        return tuple((use.tensor, m) for m in range(len(program.sizes)))
    return ((use.tensor, 0),) if isinstance(use.layout, Fixed) else ((use.tensor, -1),)


def _reads(program: Program, instruction: Instruction) -> list[Key]:
    if instruction.kind == "SEND" and not instruction.grad:
        return [(instruction.tensor, instruction.microbatch)]
    if instruction.kind != "F":
        return []
    uses = [use for use in program.segments[instruction.segment].uses if use.source > 0]
    if instruction.microbatch >= 0:
        return [(use.tensor, instruction.microbatch) for use in uses]
    return [key for use in uses for key in parts(program, use)]


def _inlets(graph: Graph, program: Program, index: int, mutated: frozenset[int], *, whole: bool) -> tuple[Inlet, ...]:
    found = []
    for position, use in enumerate(program.segments[index].uses):
        meta = graph.tensor(use.tensor)
        rows = use.take if isinstance(use.take, Split) and len(program.sizes) > 1 and use.source <= 0 else None
        if use.source > 0:
            way = "joined" if whole else "value"
            found.append(Inlet(use, way, meta.needs_grad, None, position in mutated))
        elif use.source == 0:
            found.append(Inlet(use, "once", False, rows, False, position in mutated))
        elif meta.role == "parameter":
            found.append(Inlet(use, "alias", False, None, False))
        else:
            found.append(Inlet(use, "given", meta.role == "input", rows, False, position in mutated))
    return tuple(found)


def random_turns(graph: Graph, program: Program) -> dict[int, tuple[int, str]]:
    """Segment -> (the one on another device that draws just before it, the other device that draws just after it).

    Random numbers come from one generator: segments that draw during the step do so in the model's order, whichever is
    ready first. Raises PlanError where the plan's order of segments cannot be the model's order of draws.
    """
    segment_of = {op: i for i, s in enumerate(program.segments) if s.phase != "once" for op in s.ops}
    drawing = [segment_of[op.name] for op in graph.ops if op.random and op.name in segment_of]
    order = [index for i, index in enumerate(drawing) if i == 0 or drawing[i - 1] != index]
    if len(set(order)) < 2 or any(_runs(program, index) > 1 for index in order):
        return {}
    for earlier, later in zip(order, order[1:], strict=False):
        if order.count(later) > 1 or (later < earlier and not _apart(program, earlier, later)):
            stages = program.segments[earlier].stage, program.segments[later].stage
            draws = [op.name for op in graph.ops if op.random and segment_of.get(op.name) in (earlier, later)]
            raise PlanError(
                f"stages {stages[0]} and {stages[1]} draw random numbers by turns ({', '.join(draws[:4])}), and a "
                "stage runs in one piece: its numbers would differ from the unsplit model's. Put these ops into one "
                "stage"
            )
    places = [program.placement[index][0] for index in order]
    turns: dict[int, tuple[int, str]] = {}
    for k, index in enumerate(order):
        after = order[k - 1] if k and places[k - 1] != places[k] else 0
        then = places[k + 1] if k + 1 < len(order) and places[k + 1] != places[k] else ""
        turns[index] = after, then
    return turns


def _runs(program: Program, index: int) -> int:
    return 1 if program.segments[index].phase == "whole" else len(program.sizes)


def _apart(program: Program, earlier: int, later: int) -> bool:
    """Whether a segment of a lower stage may wait for one of a higher stage: other devices, and nothing used of it."""
    return program.placement[earlier] != program.placement[later] and not _comes_after(program, earlier, later)


def _comes_after(program: Program, segment: int, other: int) -> bool:
    """Whether ``segment`` uses, directly or not, what ``other`` makes."""
    seen, stack = set(), [segment]
    while stack:
        for use in program.segments[stack.pop()].uses:
            if use.source == other:
                return True
            if use.source > 0 and use.source not in seen:
                seen.add(use.source)
                stack.append(use.source)
    return False


def waits_for_ever(program: Program, turns: dict[int, tuple[int, str]]) -> tuple[str, ...]:
    """Who would wait for what for ever, one line a device; empty where every device reaches the end of its list."""
    lists = dict(program.instructions)
    done = dict.fromkeys(lists, 0)
    sent: set[object] = set()
    moved = True
    while moved:
        moved = False
        for device, instructions in lists.items():
            while done[device] < len(instructions):
                step = instructions[done[device]]
                if step.kind in ("SEND", "RECV"):
                    key = (step.tensor, step.microbatch, step.segment if step.grad else -1, step.grad)
                    if step.kind == "SEND":
                        sent.add((device, step.peer, key))
                    elif (step.peer, device, key) not in sent:
                        break
                elif step.kind == "F" and step.segment in turns:
                    after, then = turns[step.segment]
                    if after and (device, after) not in sent:
                        break
                    sent.add((then, step.segment))
                done[device] += 1
                moved = True
    waiting = [(device, steps[done[device]]) for device, steps in lists.items() if done[device] < len(steps)]
    return tuple(
        f"{device} waits for {step.tensor} from {step.peer}" if step.kind == "RECV" else f"{device} waits for its turn"
        for device, step in waiting
    )
