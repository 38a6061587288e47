"""Unruled: ops that every member of a group must run whole because no rule says how they treat their dims."""

from __future__ import annotations

from collections.abc import Iterable

from partita.graph import Graph
from partita.sharding import rules  # noqa: F401  (fills the table)
from partita.sharding.registry import find


def unruled(graph: Graph, names: Iterable[str]) -> tuple[str, ...]:
    """One line for each kind of op without a rule, with what would let it be divided."""
    listed = set(names)
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        if op.name in listed and op.flops >= 0 and op.uses() and find(op.target) is None:
            if op.target.startswith(("partita.", "opaque:")) or op.random:
                continue
            found.setdefault(op.target, []).append(op.source or op.name)
    return tuple(
        f"{target} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}) runs whole on every member "
        f"of its group: no rule says how it treats its dims; one line such as "
        f'partita.sharding_rule("x.. k -> x.. k", op="{target}") lets it be divided'
        for target, places in found.items()
    )
