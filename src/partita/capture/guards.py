"""Guards: the values a graph was made for, and how to see whether other inputs have them too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from partita.capture.encode import decode, resolve
from partita.capture.records import Call, Read, Trace, flat
from partita.capture.shadow import needed_calls
from partita.graph import refs


@dataclass(frozen=True)
class Guard:
    """Values read while tracing, each of which depends on the inputs alone, and the few ops that make them again."""

    reads: tuple[Read, ...]
    calls: tuple[tuple[int, Call], ...]
    inputs: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]

    def holds(self, leaves: list[torch.Tensor]) -> bool:
        """Whether the reads give the same values on these inputs."""
        written = {base for _, call in self.calls for base in call.writes}
        values: dict[str, Any] = {n: t.clone() if n in written else t for n, t in self.tensors.items()}
        values.update((n, t.clone() if n in written else t) for n, t in zip(self.inputs, leaves, strict=True))
        pending = list(self.calls)
        try:
            with torch.no_grad():
                for read in self.reads:
                    while pending and pending[0][0] < read.position:
                        call = pending.pop(0)[1]
                        out = resolve(call.target)(
                            *[decode(a, values, 0) for a in call.args],
                            **{k: decode(v, values, 0) for k, v in call.kwargs},
                        )
                        values.update((n, o) for n, o in zip(call.outputs, flat(out), strict=True) if n)
                    if not equal(read.function(*[decode(a, values, 0) for a in read.args]), read.value):
                        return False
        except Exception:  # the ops do not even run on these inputs
            return False
        return True

    def __str__(self) -> str:
        return "; ".join(f"{read.what} is {_short(read.value)} ({read.source})" for read in self.reads[:3]) + (
            f"; and {len(self.reads) - 3} more" if len(self.reads) > 3 else ""
        )


def make_guards(trace: Trace, inputs: tuple[str, ...], tensors: Mapping[str, torch.Tensor]) -> tuple[Guard, ...]:
    """One Guard for all reads of a trace; none where nothing was read."""
    if not trace.reads:
        return ()
    needed: set[int] = set()
    for read in trace.reads:
        needed |= needed_calls(trace, set(refs(read.args)), read.position)
    calls = tuple((i, trace.calls[i]) for i in sorted(needed))
    used = {r for _, c in calls for r in (*refs(c.args), *(n for _, v in c.kwargs for n in refs(v)))}
    used |= {r for read in trace.reads for r in refs(read.args)}
    every = {**tensors, **trace.constants}
    return (Guard(tuple(trace.reads), calls, inputs, {n: t for n, t in every.items() if n in used}),)


def equal(a: Any, b: Any) -> bool:
    """Whether two read values (numbers, lists, arrays) are the same; NaN is NaN."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "tobytes") and hasattr(b, "tobytes"):
        return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())
    return bool(a == b) or bool(a != a and b != b)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
