"""A segment as one Python function over torch ops, generated once and run for every microbatch.

    def segment(b, B, dev, t0, t1, t2, group=None):     # b: samples of the microbatch, B: of the batch
        v0 = f0(t0, t1, t2)                     # blocks.0.attn.qkv: aten.linear.default
        ...
        return (v7, v9)

Tensors are deleted at their last use. Line numbers lead back to ops, so that an error names the user's line.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from partita.capture import resolve
from partita.compilable import is_loose
from partita.graph import Arg, Graph, Op, Ref, Size, Symbol
from partita.program import Segment
from partita.runtime.away import away
from partita.runtime.compiled import Compiler
from partita.runtime.kernels import returns_sequence, rewritten
from partita.sharding.batch import BatchLayouts

Resolve = Callable[[Op], Callable[..., Any]]
NO_GRAD = "with no_grad() if grads() else as_is:"  # torch's own context manager is a dozen calls


@dataclass(frozen=True)
class SegmentCode:
    """``run(b, B, dev, *uses, group=None) -> tuple`` of the segment's outputs; ``op_at`` finds the op of an error.

    ``routes``: what workers look up once in a Program that runs this code (``route.route``), by instruction list.
    """

    run: Callable[..., tuple[Any, ...]]
    source: str
    filename: str
    lines: tuple[tuple[int, Op], ...]
    mutated: frozenset[int]
    routes: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def op_at(self, error: BaseException) -> Op | None:
        """The op whose line raised, if the error passed through this segment's code."""
        number = None
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == self.filename:
                number = frame.lineno
        if number is None:
            return None
        return next((op for line, op in reversed(self.lines) if line <= number), None)


def _last_uses(ops: Sequence[Op], start: int, end: int) -> dict[str, int]:
    """Tensor -> the last of the ops [start, end) that uses or makes it."""
    return {t: i for i in range(start, end) for t in (*ops[i].uses(), *(o for o in ops[i].outputs if o))}


def _drops(last: Mapping[str, int]) -> dict[int, list[str]]:
    """Op -> the tensors that are dropped after it."""
    found: dict[int, list[str]] = {}
    for tensor, i in last.items():
        found.setdefault(i, []).append(tensor)
    return found


class _Writer:
    def __init__(
        self, graph: Graph, segment: Segment, layouts: BatchLayouts, resolve: Resolve, symbols: Callable[[Symbol], Any],
        compiler: Compiler | None = None,
    ) -> None:  # fmt: skip
        self.compiler = compiler
        self.graph, self.segment, self.layouts = graph, segment, layouts
        self.resolve, self.symbols = resolve, symbols
        self.ops = {op.name: op for op in graph.ops}
        self.names: dict[str, Any] = {
            "no_grad": torch.no_grad, "grads": torch.is_grad_enabled, "as_is": nullcontext(), "checkpoint": checkpoint,
            "away": away,
        }  # fmt: skip
        self.lines: list[str] = []
        self.op_lines: list[tuple[int, Op]] = []
        self.variables: dict[str, str] = {}
        self.use_variable = {i: f"u{i}" for i in range(len(segment.uses))}
        for i, use in enumerate(segment.uses):
            self.variables.setdefault(use.tensor, f"u{i}")
        self.going: dict[int, list[str]] = {}
        for tensor, after in segment.away:
            self.going.setdefault(after, []).append(tensor)
        self.choice = {(op, tensor): f"u{i}" for op, tensor, i in segment.choices}

    def constant(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self.names)}"
        self.names[name] = value
        return name

    def arg(self, op: Op, arg: Arg, sizes: str) -> str:
        if isinstance(arg, Ref):
            return self.choice.get((op.name, arg.name)) or self.variables[arg.name]
        if isinstance(arg, Size):
            return f"({arg.fixed} + {arg.per_sample} * {sizes})"
        if isinstance(arg, Symbol):
            return "dev" if arg.text.startswith("device:") else self.constant("s", self.symbols(arg))
        if isinstance(arg, tuple):
            return "[" + ", ".join(self.arg(op, a, sizes) for a in arg) + "]"
        if isinstance(arg, float) and (arg != arg or arg in (float("inf"), float("-inf"))):
            return self.constant("s", arg)
        return repr(arg)

    def call(self, op: Op, indent: str) -> None:
        rewrite = self.layouts.rewrites[op.name] if op.name in self.segment.rescaled else None
        original = op
        if rewrite is not None and rewrite.kind == "call":
            op = replace(op, target=rewrite.target_op, args=rewrite.args, kwargs=())
        plain = self.resolve(op)
        function = self.constant("f", plain if rewrite is None else rewritten(plain, rewrite))
        true_sizes = "b" if self.layouts.sizes_follow_microbatch(op) else "B"
        parts = [self.arg(op, a, true_sizes) for a in op.args]
        parts += [f"{key}={self.arg(op, value, true_sizes)}" for key, value in op.kwargs]
        if op.reads:
            parts.append("reads=[" + ", ".join(self.arg(op, Ref(r), "b") for r in op.reads) + "]")
        if getattr(plain, "in_group", False):
            parts.append("group=group")
        if rewrite is not None and rewrite.kind == "weighted":
            parts = ["b / B", *parts]
        if rewrite is not None and rewrite.kind == "sum_over_total":
            wholes = [self.choice[op.name, f"whole {t}"] for t in (rewrite.target, rewrite.weight) if t]
            parts = [f"[{', '.join(wholes)}]", *parts]
        results = []
        for out in op.outputs:
            variable = f"v{len(self.variables)}" if out else "_"
            if out:
                self.variables[out] = variable
            results.append(variable)
        left = ", ".join(results) + ("," if len(results) == 1 and returns_sequence(plain) else "")
        text = f"{function}({', '.join(parts)})"
        if not results or all(r == "_" for r in results):
            left = "_"
        self.op_lines.append((len(self.lines) + 1, original))
        self.lines.append(f"{indent}{left} = {text}")

    def drop(self, position: int, last: Mapping[int, list[str]], indent: str) -> None:
        names = [self.variables[t] for t in last.get(position, ()) if t in self.variables]
        if names:
            self.lines.append(f"{indent}del {', '.join(dict.fromkeys(names))}")

    def write(self) -> tuple[str, dict[str, Any]]:
        ops = [self.ops[name] for name in self.segment.ops]
        parameters = "".join(f", u{i}" for i in range(len(self.segment.uses)))
        self.lines.append(f"def segment(b, B, dev{parameters}, group=None):")
        last_use = _last_uses(ops, 0, len(ops))
        for start, end in self.segment.recompute:  # a range's inputs live to its end
            for tensor, i in last_use.items():
                if start <= i < end:
                    last_use[tensor] = end - 1
        kept = set(self.segment.outputs) | {t for _, t, _ in self.segment.choices}
        drops = _drops({t: i for t, i in last_use.items() if t not in kept})
        starts = dict(self.segment.recompute)
        lent = dict(self.segment.lent)
        hosted = {a: b for a, b in self.segment.offload if a in lent or any(a <= i < b for i in self.going)}
        if hosted:
            self.lines.append("    outside = away(dev)")
        together = dict(self.segment.compiled) if self.compiler is not None else {}
        i = 0
        while i < len(ops):
            if i in together:
                self.together(ops, i, together[i], drops, kept)
                i = together[i]
                continue
            if i in hosted:
                self.hosted(ops, i, hosted[i], drops, lent)
                i = hosted[i]
                continue
            if i in starts:
                inner = self.range(ops, i, starts[i], kept)
                i = starts[i]
                self.drop(i - 1, {i - 1: [t for t in drops.get(i - 1, ()) if t not in inner]}, "    ")
                continue
            if ops[i].grad:
                self.call(ops[i], "    ")
                self.drop(i, drops, "    ")
                i += 1
                continue
            self.lines.append(f"    {NO_GRAD}")
            while i < len(ops) and not ops[i].grad and not {i} & (starts.keys() | hosted.keys() | together.keys()):
                self.call(ops[i], "        ")
                self.drop(i, drops, "        ")
                i += 1
        results = "".join(f"{self.variables[t]}, " for t in self.segment.outputs)
        self.lines.append(f"    return ({results})")
        return "\n".join(self.lines), self.names

    def hosted(
        self, ops: list[Op], start: int, end: int, drops: Mapping[int, list[str]], lent: Mapping[int, tuple[str, ...]]
    ) -> None:
        """Ops [start, end), of which something that autograd saves goes to the host, or whose parameters live there."""
        self.lines.append("    with outside:")
        own = {name: self.variables[name] for name in lent.get(start, ())}
        if own:
            following = next((names for at, names in sorted(lent.items()) if at > start), ())
            self.lines.append(f"        outside.ahead([{', '.join(own.values())}])")
            copies = ", ".join(f"{u}_" for u in own.values())
            self.lines.append(f"        {copies}, = outside.lend([{', '.join(own.values())}])")
            self.lines.append(f"        outside.ahead([{', '.join(self.variables[n] for n in following)}])")
            self.variables.update({name: f"{u}_" for name, u in own.items()})
        for i in range(start, end):
            indent = "        "
            if not ops[i].grad:
                self.lines.append(f"{indent}{NO_GRAD}")
                indent += "    "
            self.call(ops[i], indent)
            self.lines += [f"{indent}outside.send({self.variables[t]})" for t in self.going.get(i, ())]
            self.drop(i, drops, indent)
        self.variables.update(own)
        dropped = {t for i in range(start, end) for t in drops.get(i, ())}
        self.lines += [f"        del {u}_" for name, u in own.items() if name not in dropped]

    def together(self, ops: list[Op], start: int, end: int, drops: Mapping[int, list[str]], kept: set[str]) -> None:
        """Ops [start, end) as one function of tensors, which is compiled when it first runs; random draws before it."""
        assert self.compiler is not None
        inside = ops[start:end]
        for op in filter(is_loose, inside):
            if not op.grad:
                self.lines.append(f"    {NO_GRAD}")
            self.call(op, "    " if op.grad else "        ")
        part = _PartWriter(self, [op for op in inside if not is_loose(op)])
        after = {t for op in ops[end:] for t in op.uses()} | kept
        taken = part.write_part(after)
        label = _common(op.module for op in part.ops_inside)
        function = self.constant("part", self.compiler.part(label, "\n".join(part.lines), part.names))
        results = []
        for name in part.leaving:
            self.variables[name] = variable = f"v{len(self.variables)}"
            results.append(variable)
        self.op_lines.append(
            (len(self.lines) + 1, replace(part.ops_inside[0], target="compiled", source="", module=label))
        )
        left = f"{', '.join(results)}," if results else "_"
        self.lines.append(f"    {left} = {function}({', '.join(['b', 'B', 'dev', *taken])})")
        self.drop(start, {start: [t for i in range(start, end) for t in drops.get(i, ())]}, "    ")

    def range(self, ops: list[Op], start: int, end: int, kept: set[str]) -> set[str]:
        """Ops [start, end) as an inner function under activation checkpointing, but for ``kept`` each tensor dropped
        after its last use; the tensors that stay inside it.
        """
        inside = {o for op in ops[start:end] for o in op.outputs if o}
        needed = dict.fromkeys(self.arg(op, Ref(t), "b") for op in ops[start:end] for t in op.uses() if t not in inside)
        after = {t for op in ops[end:] for t in op.uses()} | set(self.segment.outputs)
        leaving = [o for op in ops[start:end] for o in op.outputs if o and o in after]
        taken = ", ".join(["b", "B", "dev", *needed])
        self.lines.append(f"    def again{start}({taken}):")
        own = inside.difference(leaving, kept)
        drops = _drops({t: i for t, i in _last_uses(ops, start, end).items() if t in own})
        for i in range(start, end):
            if ops[i].grad:
                self.call(ops[i], "        ")
            else:
                self.lines.append(f"        {NO_GRAD}")
                self.call(ops[i], "            ")
            self.drop(i, drops, "        ")
        results = "".join(f"{self.variables[t]}, " for t in leaving)
        self.lines.append(f"        return ({results})")
        self.lines.append(
            f"    {results or '_'} = checkpoint(again{start}, {taken}, use_reentrant=False, preserve_rng_state=False)"
        )
        self.lines.append(f"    del again{start}")
        return inside - set(leaving)


class _PartWriter(_Writer):
    """A function of tensors alone, spelt in the same way wherever the same ops stand. Sizes and device are globals."""

    def __init__(self, around: _Writer, ops: list[Op]) -> None:
        super().__init__(around.graph, around.segment, around.layouts, lambda op: resolve(op.target), around.symbols)
        self.around, self.ops_inside = around, ops
        self.names, self.variables, self.choice = {"no_grad": torch.no_grad}, {}, {}
        self.inside = {o for op in ops for o in op.outputs if o}
        self.taken: dict[str, str] = {}
        self.leaving: list[str] = []

    def arg(self, op: Op, arg: Arg, sizes: str) -> str:
        if isinstance(arg, Ref) and arg.name not in self.inside:
            outer = self.around.arg(op, arg, sizes)
            return self.taken.setdefault(outer, f"a{len(self.taken)}")
        return super().arg(op, arg, sizes)

    def write_part(self, after: set[str]) -> list[str]:
        """Writes the lines; the variables around it that it takes, in order. ``after``: tensors that others take."""
        ops = self.ops_inside
        self.leaving = [o for op in ops for o in op.outputs if o and o in after]
        drops = _drops({t: i for t, i in _last_uses(ops, 0, len(ops)).items() if t in self.inside and t not in after})
        for i, op in enumerate(ops):
            if not op.grad:
                self.lines.append("    with no_grad():")
            self.call(op, "    " if op.grad else "        ")
            self.drop(i, drops, "    " if op.grad else "        ")
        self.lines.insert(0, f"def part({', '.join(self.taken.values())}):")
        self.lines.append(f"    return ({''.join(f'{self.variables[t]}, ' for t in self.leaving)})")
        return list(self.taken)


def _common(modules: Iterable[str]) -> str:
    """The module around all of these."""
    paths = [m.split(".") for m in modules]
    low, high = min(paths), max(paths)
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return ".".join(low[:n])


def generate(
    graph: Graph,
    segment: Segment,
    layouts: BatchLayouts,
    *,
    index: int,
    resolve: Resolve,
    symbols: Callable[[Symbol], Any],
    compiler: Compiler | None = None,
) -> SegmentCode:
    """The segment's function. ``resolve``: op -> callable; ``symbols``: Symbol -> torch constant; ``compiler``: of the
    ranges that are compiled (None: all runs as it is)."""
    writer = _Writer(graph, segment, layouts, resolve, symbols, compiler)
    source, names = writer.write()
    filename = f"<partita segment {index}: {segment.phase} of stage {segment.stage}>"
    exec(compile(source, filename, "exec"), names)
    written = {base for name in segment.ops for base in writer.ops[name].writes}
    mutated = frozenset(
        i for i, use in enumerate(segment.uses) if (graph.tensor(use.tensor).base or use.tensor) in written
    )
    return SegmentCode(names["segment"], source, filename, tuple(writer.op_lines), mutated)
