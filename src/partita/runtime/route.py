"""Route: one device's instruction list with everything looked up beforehand that is the same in every step.

    F1.0   in: x (a value, wants its gradient), w (alias)   out: y (needed here later)   drop after: x.0

A value is dropped after the last instruction that reads it: the last forward that takes it, the last send. What its
backward needs, autograd holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from partita.graph import Graph
from partita.program import Fixed, Instruction, Partial, Program, Split, Use

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Inlet:
    """How a run gets one tensor. ``way``: 'alias' (a parameter), 'given', 'once', 'value' or 'joined' (of all
    microbatches). ``leaf``: a gradient may have to go back. ``rows``: the microbatch's rows are cut from it. ``copy``:
    it is changed in place, and others hold it.
    """

    use: Use
    way: str
    leaf: bool
    rows: Split | None
    copy: bool


@dataclass(frozen=True, slots=True)
class Outlet:
    """``held``: read here later. ``result``: an output of the model."""

    name: str
    held: bool
    result: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction, with what it takes, makes and drops. ``last_of_run``: the next is no W."""

    instruction: Instruction
    inlets: tuple[Inlet, ...] = ()
    outlets: tuple[Outlet, ...] = ()
    drops: tuple[Key, ...] = ()
    last_of_run: bool = True


def route(
    graph: Graph, program: Program, instructions: tuple[Instruction, ...], mutated: tuple[frozenset[int], ...]
) -> tuple[Step, ...]:
    """``mutated``: of each segment, the positions of the uses it changes in place."""
    last: dict[Key, int] = {}
    for position, instruction in enumerate(instructions):
        for key in _reads(program, instruction):
            last[key] = position
    drops: dict[int, list[Key]] = {}
    for key, position in last.items():
        drops.setdefault(position, []).append(key)
    inlets: dict[tuple[int, bool], tuple[Inlet, ...]] = {}
    outputs = frozenset(graph.outputs)
    steps = []
    for position, instruction in enumerate(instructions):
        step = Step(instruction, drops=tuple(drops.get(position, ())))
        if instruction.kind == "F":
            whole = instruction.microbatch < 0
            index = instruction.segment
            if (index, whole) not in inlets:
                inlets[index, whole] = _inlets(graph, program, index, mutated[index], whole=whole)
            outlets = tuple(
                Outlet(name, (name, instruction.microbatch) in last, name in outputs)
                for name in program.segments[index].outputs
            )
            step = replace(step, inlets=inlets[index, whole], outlets=outlets)
        elif instruction.kind == "W":
            following = instructions[position + 1 : position + 2]
            step = replace(step, last_of_run=not following or following[0].kind != "W")
        steps.append(step)
    return tuple(steps)


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
            found.append(Inlet(use, "once", False, rows, False))
        elif meta.role == "parameter":
            found.append(Inlet(use, "alias", False, None, False))
        else:
            found.append(Inlet(use, "given", meta.role == "input", rows, False))
    return tuple(found)
