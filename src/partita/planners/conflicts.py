"""Conflicts: the smallest set of constraints that cannot hold together, found by deletion (Chinneck and Dravnieks,
"Locating minimal infeasible constraint sets", ORSA Journal on Computing 3, 1991).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from partita.planners.constraints import Constraints

Works = Callable[[Constraints], bool]


@dataclass(frozen=True, slots=True)
class Atom:
    """One constraint a person wrote: an entry of a list (``split_before``'s 'blocks.3') or a whole field."""

    field: str
    value: Any

    def __str__(self) -> str:
        value = self.value
        if self.field == "place":
            return f"place {value[0]!r} on {value[1]}"
        if self.field == "shard":
            return f"shard {value[0]!r} as {value[1]}"
        if isinstance(value, tuple):
            return f"{self.field} {' + '.join(map(repr, value))}"
        if isinstance(value, bool):
            return f"{self.field} {str(value).lower()}"
        return f"{self.field} {value!r}" if isinstance(value, str) else f"{self.field} {value}"


def atoms(constraints: Constraints) -> tuple[Atom, ...]:
    """Everything that is not left open, entry by entry."""
    found: list[Atom] = []
    for item in fields(Constraints):
        value = getattr(constraints, item.name)
        if isinstance(item.default, tuple):
            found += [Atom(item.name, entry) for entry in value]
        elif value != item.default or type(value) is not type(item.default):
            found.append(Atom(item.name, value))
    return tuple(found)


def joined(parts: Sequence[Atom]) -> Constraints:
    """The constraints that consist of these; ``joined(atoms(c)) == c``."""
    values: dict[str, Any] = {}
    for item in fields(Constraints):
        mine = [a.value for a in parts if a.field == item.name]
        if mine:
            values[item.name] = tuple(mine) if isinstance(item.default, tuple) else mine[-1]
    return Constraints(**values)


def smallest_conflict(parts: Sequence[Atom], works: Works) -> tuple[Atom, ...]:
    """A subset that does not work while each set without one of its members does; () where nothing helps.

    ``works``: whether constraints can be met; dropping one must never make that harder. Asked once for each part, and
    once for none at all.
    """
    if not works(Constraints()):
        return ()
    kept = list(parts)
    for atom in parts:
        without = [a for a in kept if a is not atom]
        if len(kept) > 1 and not works(joined(without)):
            kept = without
    return tuple(kept)


def largest_agreement(parts: Sequence[Atom], works: Works) -> tuple[Atom, ...]:
    """A subset that works and to which no further part can be added; earlier parts are preferred."""
    kept: list[Atom] = []
    for atom in parts:
        if works(joined([*kept, atom])):
            kept.append(atom)
    return tuple(kept)
