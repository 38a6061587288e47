"""Two traces at two batch sizes become one Graph whose sizes follow the batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from partita.capture.counts import flops
from partita.capture.records import Call, Trace
from partita.graph import Arg, Dim, Graph, Op, Ref, Size, Tensor, refs


class Disagree(Exception):
    """The traces differ in more than numbers that follow the batch."""


@dataclass(frozen=True, slots=True)
class Line:
    """The straight line through a number at batch ``a`` and at batch ``b``."""

    a: int
    b: int

    def size(self, x: int, y: int, what: str) -> Dim:
        if x == y:
            return x
        slope, rest = divmod(y - x, self.b - self.a)
        if rest:
            raise Disagree(f"{what} is {x} at batch {self.a} and {y} at batch {self.b}: not a straight line")
        if x < slope * self.a:  # x * x would look so
            raise Disagree(
                f"{what} is {x} at batch {self.a} and {y} at batch {self.b}: not a straight line from zero up"
            )
        return Size(x - slope * self.a, slope)

    def arg(self, x: Arg, y: Arg, what: str) -> Arg:
        if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
            return tuple(self.arg(i, j, what) for i, j in zip(x, y, strict=True))
        if type(x) is int and type(y) is int:
            return self.size(x, y, what)
        if x == y and type(x) is type(y) or (x != x and y != y):
            return x
        raise Disagree(f"{what} takes {x!r} at batch {self.a} and {y!r} at batch {self.b}")

    def shape(self, x: tuple[int, ...], y: tuple[int, ...], what: str) -> tuple[Dim, ...]:
        if len(x) != len(y):
            raise Disagree(f"{what} has {len(x)} dims at batch {self.a} and {len(y)} at batch {self.b}")
        return tuple(self.size(i, j, f"a dim of {what}") for i, j in zip(x, y, strict=True))

    def call(self, x: Call, y: Call) -> Call:
        if replace(x, args=(), kwargs=()) != replace(y, args=(), kwargs=()):
            raise Disagree(
                f"{x.name} ({x.target}) at batch {self.a} is {y.name} ({y.target}) at batch {self.b}, {x.source}"
            )
        what = f"{x.target} ({x.source})"
        args = self.arg(x.args, y.args, what)
        names = tuple(k for k, _ in x.kwargs)
        if names != tuple(k for k, _ in y.kwargs):
            raise Disagree(f"{what} takes other keywords at batch {self.b}")
        kwargs = tuple((k, self.arg(i, j, what)) for (k, i), (_, j) in zip(x.kwargs, y.kwargs, strict=True))
        assert isinstance(args, tuple)
        return replace(x, args=args, kwargs=kwargs)


def live(calls: list[Call], outputs: list[str]) -> list[Call]:
    """Without the pure calls whose results nobody uses."""
    needed = set(outputs)
    kept: list[Call] = []
    for call in reversed(calls):
        if call.random or call.writes or call.target.startswith("opaque:") or needed.intersection(call.outputs):
            kept.append(call)
            needed.update(refs(call.args), *(refs(v) for _, v in call.kwargs), call.reads)
    return kept[::-1]


def join(a: Trace, calls_a: list[Call], b: Trace, calls_b: list[Call], line: Line) -> tuple[list[Call], dict[str, Any]]:
    """The calls with Sizes, and the shape of every value with Sizes. Raises Disagree."""
    if len(calls_a) != len(calls_b):
        first = next((x for x, y in zip(calls_a, calls_b, strict=False) if x.target != y.target), calls_a[-1])
        raise Disagree(
            f"{len(calls_a)} ops at batch {line.a}, {len(calls_b)} at batch {line.b}; first at {first.source}"
        )
    calls = [line.call(x, y) for x, y in zip(calls_a, calls_b, strict=True)]
    if a.outputs != b.outputs:
        raise Disagree("the model returns other tensors")
    if set(a.constants) != set(b.constants):
        raise Disagree("the model makes other constants")
    for name, value in a.constants.items():
        other = b.constants[name]
        if value is not other and not (
            value.shape == other.shape and value.dtype == other.dtype and bool((value == other).all())
        ):
            raise Disagree(f"{name} (a tensor made from Python numbers) has other values")
    used = {r for c in calls for r in (*refs(c.args), *(n for _, v in c.kwargs for n in refs(v)), *c.reads, *c.outputs)}
    shapes = {}
    for name in [*used, *a.outputs, *(n for n, v in a.values.items() if v.role != "op")]:
        if name and name in a.values:
            if name not in b.values:
                raise Disagree(f"{name} exists at batch {line.a} only")
            shapes[name] = line.shape(a.values[name].shape, b.values[name].shape, name)
    return calls, shapes


def extrapolates(calls: list[Call], shapes: dict[str, Any], trace: Trace, at: list[Call], batch: int) -> None:
    """Raise Disagree unless the calls with Sizes, at this batch, are those of this trace."""
    if len(calls) != len(at):
        raise Disagree(f"{len(at)} ops at batch {batch}, {len(calls)} at larger batches")
    for call, found in zip(calls, at, strict=True):
        args, kwargs = tuple(_at(a, batch) for a in call.args), tuple((k, _at(v, batch)) for k, v in call.kwargs)
        if replace(call, args=args, kwargs=kwargs) != found:
            raise Disagree(f"{found.name} ({found.source}) at batch {batch} is not what larger batches make of it")
    for name, shape in shapes.items():
        if name not in trace.values or tuple(_at(d, batch) for d in shape) != trace.values[name].shape:
            raise Disagree(f"{name} at batch {batch} has not the shape that follows from larger batches")


def _at(arg: Any, batch: int) -> Any:
    if isinstance(arg, tuple):
        return tuple(_at(a, batch) for a in arg)
    return arg.at(batch) if isinstance(arg, Size) else arg


def own_constants(trace: Trace, calls: list[Call]) -> list[Call]:
    """Constants made anew by each run, where they are changed or returned: copied first."""
    exposed = {base for call in calls for base in call.writes}
    exposed.update(trace.values[n].base for n in trace.outputs)
    copies = []
    for name in sorted(exposed & trace.fresh):
        value, data = trace.values[name], f"{name}.data"
        trace.values[data] = replace(value, name=data, base=data)
        trace.values[name] = replace(value, role="op")
        trace.constants[data] = trace.constants.pop(name)
        copies.append(Call(f"{name}.clone", "aten.clone.default", (Ref(data),), (), (name,), "", "", False))
    return [*copies, *calls]


def build(
    name: str, trace: Trace, calls: list[Call], shapes: dict[str, Any], *, batch: int,
    ties: tuple[tuple[str, str], ...],    mode: str, notes: tuple[str, ...],
) -> Graph:  # fmt: skip
    """The Graph of a trace. ``shapes`` overrides those that follow the batch."""
    used = {r for c in calls for r in (*refs(c.args), *(n for _, v in c.kwargs for n in refs(v)), *c.reads, *c.outputs)}
    used.update(trace.outputs)
    kept = [v for v in trace.values.values() if v.name in used or v.role in ("input", "parameter", "buffer")]
    present = {v.name for v in kept}
    tensors = tuple(
        Tensor(v.name, shapes.get(v.name, v.shape), v.dtype, v.role, v.path, v.base if v.base in present else v.name,
               v.needs_grad)
        for v in kept
    )  # fmt: skip
    ops = tuple(
        Op(c.name, c.target, c.args, c.kwargs, c.outputs, c.module, c.source, c.grad, c.random, c.reads, c.writes,
           flops(c, lambda n: trace.values[n].shape))
        for c in calls
    )  # fmt: skip
    return Graph(name, fingerprint(tensors, ops), batch, tensors, ops, tuple(trace.outputs), ties, mode, notes)


def fingerprint(tensors: tuple[Tensor, ...], ops: tuple[Op, ...]) -> str:
    """A hash of the parameters and buffers (names, shapes, dtypes) and of the ops, whatever the batch."""
    digest = hashlib.sha256()
    for t in tensors:
        if t.role in ("parameter", "buffer"):
            digest.update(f"{t.name}|{t.shape}|{t.dtype}\n".encode())
    for op in ops:
        digest.update(f"{op.name}|{op.target}\n".encode())
    return digest.hexdigest()[:16]


__all__ = ["Disagree", "Line", "Ref", "build", "fingerprint", "join", "live"]
