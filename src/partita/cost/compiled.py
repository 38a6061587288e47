"""Compiled: what was measured of a program's compiled ranges, in place of their ops' own prices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from partita.cost.blocks import Block, signature
from partita.cost.measured import Measured
from partita.cost.ops import family
from partita.cost.table import CostTable, priced_as
from partita.graph import Graph
from partita.program import Program

EAGER, COMPILED = "eager ", "compiled "
"""What stands before a signature: the same ops timed as they are, and as one compiled function."""
COPIES = 1.1
"""Compiled code saves images in a layout of its own, some of them beside the ones it was given: ResNet, 1.04."""


def units(graph: Graph, program: Program, kind: str) -> tuple[Block, ...]:
    """The compiled ranges of a program as blocks to be timed, and what stands between them: all ops in order. None
    where a range is not one run of the graph's ops. ``kind``: EAGER or COMPILED."""
    at = {op.name: i for i, op in enumerate(graph.ops)}
    once = {name for segment in program.segments if segment.phase == "once" for name in segment.ops}
    found: list[Block] = []
    for segment in program.segments:
        for a, b in segment.compiled:
            ops = [at[name] for name in segment.ops[a:b]]
            between = {graph.ops[i].name for i in range(ops[0], ops[-1] + 1)}.difference(segment.ops[a:b])
            if not between <= once:
                return ()
            found.append(Block(ops[0], ops[-1] + 1, "", kind + signature(graph, [graph.ops[i] for i in ops])))
    edges = sorted({0, len(graph.ops), *(b.start for b in found), *(b.stop for b in found)})
    ranges = {(b.start, b.stop): b for b in found}
    pairs = zip(edges, edges[1:], strict=False)
    return tuple(
        ranges.get((a, b)) or Block(a, b, "", f"beside {kind}{signature(graph, graph.ops[a:b])}") for a, b in pairs
    )


def with_compiled(table: CostTable, program: Program, measured: Measured) -> CostTable:
    """The table with the seconds and saved bytes of compiled ranges as they were measured, where they were; images
    between convolutions that were not count ``COPIES`` times."""
    graph, at = table.graph, {op.name: i for i, op in enumerate(table.graph.ops)}
    arrays = {
        name: {kind: rows.copy() for kind, rows in getattr(table, name).items()}
        for name in ("forward", "backward", "weight", "first")
    }
    kept = list(table.kept)
    for segment in program.segments:
        for a, b in segment.compiled:
            ops = [at[name] for name in segment.ops[a:b]]
            key = COMPILED + signature(graph, [graph.ops[i] for i in ops])
            for kind in table.kinds:
                timing = measured.get(key, kind)
                if timing is not None:
                    rows = {name: found[kind] for name, found in arrays.items()}
                    kept = priced_as(rows, kept, ops, timing, max(graph.batch, 1))
            if not any(measured.get(key, kind) for kind in table.kinds) and any(
                family(graph.ops[i]) == "conv" for i in ops
            ):
                for i in ops:
                    kept[i] = tuple(k.scaled(COPIES) for k in kept[i])
    saved = np.array([[sum(k.size.fixed for k in row), sum(k.size.per_sample for k in row)] for row in kept])
    return replace(
        table, forward=arrays["forward"], backward=arrays["backward"], weight=arrays["weight"], first=arrays["first"],
        kept=tuple(kept), saved=saved.reshape(-1, 2),
    )  # fmt: skip
