"""Measured: timings of blocks by signature and device kind, kept as JSON; they override the analytic model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from partita.cost.affine import Affine
from partita.errors import UsageError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one block for a microbatch: seconds of forward, backward to the inputs, weight gradients; saved bytes.

    ``saved``: bytes autograd keeps from forward to backward, parameters not counted; None where not measured.
    ``first``: seconds more that the first microbatch of a step takes (memory for the gradients is new to the process).
    ``alone``: share of the seconds that it takes while the devices that share the host's memory do nothing.
    """

    forward: Affine
    backward: Affine = Affine()
    weight: Affine = Affine()
    saved: Affine | None = None
    first: Affine = Affine()
    alone: float = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """(block signature, device kind) -> Timing."""

    timings: Mapping[tuple[str, str], Timing] = field(default_factory=lambda: MappingProxyType({}))

    def get(self, signature: str, kind: str) -> Timing | None:
        return self.timings.get((signature, kind))

    def merged(self, other: Measured) -> Measured:
        """Both; ``other`` wins."""
        return Measured({**self.timings, **other.timings})

    def to_json(self) -> str:
        rows = [
            {
                "signature": signature,
                "kind": kind,
                "alone": timing.alone,
                **{
                    name: [value.fixed, value.per_sample]
                    for name in ("forward", "backward", "weight", "saved", "first")
                    if (value := getattr(timing, name)) is not None
                },
            }
            for (signature, kind), timing in sorted(self.timings.items())
        ]
        return json.dumps({"partita_measured": VERSION, "timings": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> Measured:
        """Raises UsageError where the text is not such a table."""
        try:
            data = json.loads(text)
            if data["partita_measured"] != VERSION:
                raise UsageError(
                    f"measured timings of version {data['partita_measured']}; this partita reads {VERSION}"
                )
            found = {}
            for row in data["timings"]:
                parts = {name: Affine(*map(float, row[name])) for name in ("forward", "backward", "weight")}
                saved = Affine(*map(float, row["saved"])) if "saved" in row else None
                first = Affine(*map(float, row.get("first", (0.0, 0.0))))
                alone = float(row.get("alone", 1.0))
                found[str(row["signature"]), str(row["kind"])] = Timing(**parts, saved=saved, first=first, alone=alone)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"not a table of measured timings ({error}); measure again to replace it") from error
        return Measured(found)
