"""Rehearsal: segments of a Program run on one device, one at a time, outside any schedule, as the runtime runs them.

Inputs are real: ``open`` runs every segment once, in order, and keeps what crosses their borders. Each run afterwards
is its own autograd graph over detached inputs and the device's own leaves of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from partita.capture import Captured, decode_symbol
from partita.program import Partial, Program, Split, Use
from partita.runtime.codegen import SegmentCode, generate
from partita.runtime.compiled import Compiler
from partita.runtime.kernels import resolver
from partita.runtime.weight_grad import WeightQueue, mark, use_queue
from partita.sharding.batch import BatchLayouts
from partita.torch_compat import run_backward

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Scene:
    """What all devices share: the program, its code, the call's tensors."""

    captured: Captured
    program: Program
    codes: tuple[SegmentCode, ...]
    given: Tensors
    parameters: Tensors
    train: bool


def scene(
    captured: Captured, layouts: BatchLayouts, program: Program, given: Tensors, parameters: Tensors, *, train: bool
) -> Scene:
    """The code a plan would run for each segment."""
    compiler = Compiler()
    codes = tuple(
        generate(
            captured.graph, s, layouts, index=i, symbols=decode_symbol, resolve=resolver(captured, program, s),
            compiler=compiler,
        )
        for i, s in enumerate(program.segments)
    )  # fmt: skip
    return Scene(captured, program, codes, {**captured.constants, **given}, parameters, train)


@dataclass(eq=False)
class Rehearsal:
    """One device's side. ``values``: what crosses segment borders, by (tensor, microbatch)."""

    scene: Scene
    device: torch.device
    values: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    once: dict[str, torch.Tensor] = field(default_factory=dict)
    queue: WeightQueue = field(default_factory=WeightQueue)
    _aliases: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)

    def begin(self) -> None:
        """On the thread that will run: its weight gradients are put off to ``weight``."""
        self.queue.put_off = True
        use_queue(self.queue if len(self.scene.program.sizes) > 1 else None)

    def end(self) -> None:
        use_queue(None)
        self._pending.clear()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for alias in self._aliases.values():
            alias.grad = None

    def microbatch(self, index: int) -> int:
        return -1 if self.scene.program.segments[index].phase == "whole" else 0

    def forward(self, index: int, microbatch: int | None = None, *, keep: bool = False) -> None:
        """``keep``: the outputs become what later segments take."""
        program, code = self.scene.program, self.scene.codes[index]
        segment = program.segments[index]
        at = self.microbatch(index) if microbatch is None else microbatch
        taken = [self._take(use, at) for use in segment.uses]
        arguments = [t.clone() if i in code.mutated else t for i, t in enumerate(taken)]
        samples = program.sizes[at] if at >= 0 else sum(program.sizes)
        with torch.set_grad_enabled(self.scene.train and segment.phase != "once"):
            outputs = code.run(samples, sum(program.sizes), self.device, *arguments)
        if keep:
            self.values.update({(n, at): v.detach() for n, v in zip(segment.outputs, outputs, strict=True)})
        leaves = [t for t, use in zip(taken, segment.uses, strict=True) if use.source > 0 and t.requires_grad]
        self._pending[index] = ([v for v in outputs if v.requires_grad], leaves)

    def seed(self, index: int) -> list[torch.Tensor]:
        """A gradient for each output of the last forward."""
        return [torch.full_like(v, 1e-3) for v in self._pending[index][0]]

    def backward(self, index: int, grads: list[torch.Tensor]) -> None:
        roots, leaves = self._pending.pop(index)
        self.queue.key = index
        if roots:
            run_backward(roots, grads)
        for leaf in leaves:
            leaf.grad = None

    def weight(self, index: int) -> None:
        self.queue.flush([index])

    def drop(self, index: int) -> None:
        self._pending.pop(index, None)

    def open(self, alike: Mapping[int, int] = MappingProxyType({})) -> dict[int, float]:
        """Collect every segment's inputs. Segment index -> bytes autograd keeps of it, every storage counted once.

        ``alike``: segment -> an equal one before it; it is not run, and copies of that one's results stand in for its
        own.
        A storage that another segment made counts with its maker, as in ``cost.table``; parameters, buffers and
        constants do not count.
        """
        program = self.scene.program
        roles = {t.name for t in self.scene.captured.graph.of_role("buffer", "constant")}
        for segment, code in zip(program.segments, self.scene.codes, strict=True):
            if segment.phase == "once" and segment.ops:
                uses = [self._find(u.tensor) for u in segment.uses]
                batch = sum(program.sizes)
                with torch.no_grad():
                    outputs = code.run(batch, batch, torch.device("cpu"), *uses)
                self.once.update(zip(segment.outputs, outputs, strict=True))
        fixed = {_address(t) for t in (*self.scene.parameters.values(), *self.once.values())}
        fixed |= {_address(t) for n, t in self.scene.given.items() if n in roles}
        self.begin()
        maker: dict[int, int] = {}
        counted: set[int] = set()
        result: dict[int, float] = {}
        joins = any(s.phase == "whole" for s in program.segments)
        for index, segment in enumerate(program.segments):
            if segment.phase == "once":
                continue
            if index in alike:
                self._stand_in(index, alike[index])
                continue
            here: dict[int, int] = {}
            if segment.compiled:  # first, so that no hook is at work while it is compiled
                self.forward(index)
                self.drop(index)

            def pack(tensor: torch.Tensor, here: dict[int, int] = here) -> torch.Tensor:
                here[_address(tensor)] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                self.forward(index, keep=True)
            at = self.microbatch(index)
            for name in segment.outputs:
                maker.setdefault(_address(self.values[name, at]), index)
            for where, size in here.items():
                if where in fixed or where in counted:
                    continue
                if where in maker:  # alive as long as the values are, so its address stays its own
                    counted.add(where)
                owner = maker.get(where, index)
                result[owner] = result.get(owner, 0.0) + size
            self.drop(index)
            for other in range(1, len(program.sizes)) if joins and segment.phase == "split" else ():
                self.forward(index, other, keep=True)
                self.drop(index)
        self.end()
        return result

    def _stand_in(self, index: int, other: int) -> None:
        segments = self.scene.program.segments
        for mine, theirs in zip(segments[index].outputs, segments[other].outputs, strict=True):
            for at in range(-1, len(self.scene.program.sizes)):
                if (theirs, at) in self.values:
                    self.values[mine, at] = self.values[theirs, at].clone()

    def _find(self, name: str) -> torch.Tensor:
        for source in (self.once, self.scene.given, self.scene.parameters):
            if name in source:
                return source[name].to(self.device)
        raise KeyError(name)

    def _take(self, use: Use, microbatch: int) -> torch.Tensor:
        meta = self.scene.captured.graph.tensor(use.tensor)
        sizes = self.scene.program.sizes
        if use.source <= 0:
            if meta.role == "parameter" and use.source < 0:
                return self._alias(use.tensor)
            value = self._find(use.tensor).detach()
            if isinstance(use.take, Split) and len(sizes) > 1 and microbatch >= 0:
                start, length = sum(sizes[:microbatch]), sizes[microbatch]
                value = value.narrow(use.take.dim, start * use.take.factor, length * use.take.factor)
            return value
        value = self._joined(use) if microbatch < 0 else self.values[use.tensor, microbatch]
        value = value.detach()
        return value.requires_grad_() if self.scene.train and meta.needs_grad else value

    def _joined(self, use: Use) -> torch.Tensor:
        program = self.scene.program
        if program.segments[use.source].phase == "whole":
            return self.values[use.tensor, -1]
        parts = [self.values[use.tensor, m] for m in range(len(program.sizes))]
        if isinstance(use.layout, Split):
            return torch.cat(parts, use.layout.dim)
        return torch.stack(parts).sum(0) if isinstance(use.layout, Partial) else parts[0]

    def _alias(self, name: str) -> torch.Tensor:
        found = self._aliases.get(name)
        if found is None:
            parameter = self.scene.parameters[name]
            found = parameter.detach().to(self.device).requires_grad_(self.scene.train and parameter.requires_grad)
            mark(found, name)
            self._aliases[name] = found
        return found


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
