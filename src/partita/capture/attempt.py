"""``capture``: a model and example inputs become a Graph, or the reason why not.

Traced on fake tensors at two batch sizes; a module whose inside no graph can hold runs as one opaque op.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from partita.capture.beside import Beside
from partita.capture.captured import Captured
from partita.capture.frames import line_of, line_of_forward, place_of
from partita.capture.generalise import Disagree, Line, build, extrapolates, join, live, own_constants
from partita.capture.guards import make_guards
from partita.capture.memory import Change, Effect, Spoilt, Tally, keep_buffers, memo_of, memo_of_tensors, step_of
from partita.capture.opaque import substituted
from partita.capture.outward import Pieces
from partita.capture.randomness import separate
from partita.capture.records import Break, Call, Trace
from partita.capture.shadow import Shadow
from partita.capture.state import ModuleState, same_random_numbers
from partita.capture.structure import Structure, held_by, put_together, still_holds, take_apart
from partita.capture.tracer import Draws, Tracer
from partita.capture.unfit import ordinary, unfit
from partita.errors import CaptureError
from partita.torch_compat import FakeTensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's fake tensors log a traceback for every refused op; the refusal itself is what capture reports."""
    logger = logging.getLogger(FakeTensor.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


_ONE_AT_A_TIME = threading.RLock()  # tracing patches torch and puts fakes into the model


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    guards: bool = True,
    beside: Beside | None = None,
) -> Captured:
    """The Graph of ``forward(*args, **kwargs)`` (default: the model itself), and what running it needs.

    The model, its buffers and all random generators are afterwards what they were. Raises CaptureError where even
    running the model as it is cannot work. Without ``guards`` a module that reads values of the inputs runs as one
    piece. ``beside``: what ``forward`` runs that is no part of the model.
    """
    with _ONE_AT_A_TIME, _quiet():
        return _Capture(model, tuple(args), dict(kwargs or {}), forward or model, guards, beside or Beside()).result()


class _Capture:
    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        forward: Callable[..., Any],
        guards: bool,
        beside: Beside,
    ) -> None:
        self.model, self.forward, self.guards, self.beside = model, forward, guards, beside
        self.leaves, self.structure = take_apart((args, kwargs))
        self.inputs = tuple(_input_name(path) for path in self.structure.paths)
        self.in_contents = self.structure.contents()
        self.batch = batch_of(self.leaves)
        self.notes: list[str] = []
        self.pieces = Pieces(model)
        self.effects: tuple[Effect, ...] = ()
        self.names, self.ties = named_tensors(model)
        self.tensors = {n: t for n, (t, _) in self.names.items()}
        self.meta = any(t.device.type == "meta" for t in (*self.leaves, *self.tensors.values()))

    def result(self) -> Captured:
        with same_random_numbers():
            found = unfit(self.model, dict(zip(self.inputs, self.leaves, strict=True)), self.tensors) or self.settled()
            if isinstance(found, str):
                return self.alive(found)
            trace, calls = found
            calls, shapes, batch = self.generalised(trace, calls)
        self.notes.extend(self.pieces.notes())
        if trace.unchecked:
            self.notes.append("torch.distributions: the checks of their arguments (validate_args) are left out")
        guards = make_guards(trace, self.inputs, self.tensors)
        self.notes.extend(f"made for these inputs: {guard}" for guard in guards)
        graph = self.graph(trace, calls, shapes, batch)
        used = {t.name for t in graph.tensors}
        for call in calls:
            if call.target in trace.opaques:
                outs = [graph.tensor(o).shape for o in call.outputs if o]
                trace.opaques[call.target].shapes = tuple(outs)
        modules = dict(self.model.named_modules())
        return Captured(graph, trace.opaques, {n: t for n, t in trace.constants.items() if n in used}, self.inputs,
                        self.structure, trace.structure, guards=guards, effects=self.effects,
                        left=tuple((modules[path], attribute) for path, attribute in trace.left),
                        filled=trace.filled, same=trace.same, returned=trace.returned,
                        in_contents=self.in_contents)  # fmt: skip

    def settled(self) -> tuple[Trace, list[Call]] | str:
        """A trace, after making a piece of everything in its way; or the reason why the model itself is."""
        while True:
            try:
                return self.traced(self.leaves)
            except Break as found:
                reason = self.pieces.around(found)
                if reason:
                    if self.meta:
                        raise CaptureError(
                            f"{found}: values are read, and a model or inputs without data (device 'meta') have none. "
                            "Give real example inputs and parameters, or take the read out of forward."
                        ) from None
                    if found.__cause__ is not None and (problem := self.fails_for_real()):
                        raise CaptureError(
                            f"{type(self.model).__name__} cannot run on the example inputs: {type(problem).__name__}: "
                            f"{str(problem).strip()}{place_of(problem, self.model)}. "
                            "Check that model(*args, **kwargs) works before dividing it."
                        ) from problem
                    return reason

    def fails_for_real(self) -> Exception | None:
        """What goes wrong when the model runs as it is on the example inputs."""
        state = ModuleState(self.model, self.beside)
        own = list(self.tensors.values())
        copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in own]
        args, kwargs = put_together(
            self.structure, [t.detach().clone().requires_grad_(t.requires_grad) for t in self.leaves]
        )
        try:
            with substituted(self.model, own, copies):
                self.forward(*args, **kwargs)
        except Exception as error:
            return error
        finally:
            state.restore()
        return None

    def graph(self, trace: Trace, calls: list[Call], shapes: dict[str, Any], batch: int) -> Any:
        return build(type(self.model).__name__, trace, calls, shapes, batch=batch, ties=self.ties,
                     mode="train" if self.model.training else "eval", notes=tuple(self.notes))  # fmt: skip

    def alive(self, reason: str) -> Captured:
        """No graph: the model runs as it is."""
        tracer = Tracer(self.model)
        inputs = zip(self.inputs, self.leaves, strict=True)
        for name, tensor, role in (*((n, *t) for n, t in self.names.items()), *((n, t, "input") for n, t in inputs)):
            if ordinary(tensor):
                tracer.enter(name, tensor, role, name)
        self.notes.append(f"runs module by module: {reason}")
        return Captured(self.graph(tracer.trace, [], {}, 0), {}, {}, self.inputs, self.structure, None, live=reason)

    def enter(self, tracer: Tracer, leaves: list[torch.Tensor]) -> tuple[list[Any], dict[int, Any]]:
        """Fake inputs, and fake parameters and buffers by the identity of the real ones."""
        fakes = {id(t): tracer.enter(name, t, role, name) for name, (t, role) in self.names.items()}
        inputs = [tracer.enter(n, t, "input", n) for n, t in zip(self.inputs, leaves, strict=True)]
        small = sum(t.numel() * t.element_size() for t in self.tensors.values()) < COPY_BYTES
        borrowed = frozenset() if small else frozenset(n for n, (_, role) in self.names.items() if role == "parameter")
        real = {n: t for n, (t, _) in self.names.items()} | dict(zip(self.inputs, leaves, strict=True))
        tracer.shadow = Shadow(tracer.trace, real, borrowed)
        return inputs, fakes

    def traced(self, leaves: list[torch.Tensor]) -> tuple[Trace, list[Call]]:
        """One trace of the forward on inputs of these shapes. Raises Break."""
        try:
            return self.trace(leaves, watch=False)
        except Draws:
            return self.trace(leaves, watch=True)

    def trace(self, leaves: list[torch.Tensor], *, watch: bool) -> tuple[Trace, list[Call]]:
        state = ModuleState(self.model, self.beside)
        try:
            tracer = self.run(leaves, watch=watch)
            for path, name, value in state.outside_changes():
                if memo_of(tracer, value) != "memo":
                    line = line_of_forward(state.modules[path])
                    raise Break(f"forward (or a hook) changes {name}, which is no part of the model,", "", line)
            changes = state.changes()
            for path, attribute in changes:
                if path in state.others:
                    what = f"the loss function changes {attribute!r} of {path.rstrip(':')}"
                    raise Break(what, "", line_of_forward(state.modules[path]))
            if changes:
                left = self.excuse(tracer, leaves, state, changes)
                tracer.trace.left = tuple(left)
                self.give_back(tracer, (tracer.out, [*left.values(), *tracer.filled.values()]))
        finally:
            state.restore()
        trace = tracer.trace
        written = {base for call in trace.calls for base in call.writes}
        for read in trace.reads:
            for name in written.intersection(read.buffers):
                raise Break(f"{read.what} reads the buffer {name}, which forward changes,", read.module, read.source)
        return trace, own_constants(trace, separate(trace))

    def run(
        self, leaves: list[torch.Tensor], *, watch: bool = False, instead: Mapping[int, Any] | None = None
    ) -> Tracer:
        """As ``recorded``; an error of the user's code becomes a Break in the module it came from."""
        tracer = Tracer(self.model, pieces=self.pieces.paths, guards=self.guards, watch=watch)
        try:
            self.recorded(tracer, leaves, instead)
        except Exception as error:
            if tracer.broken is not None:
                raise tracer.broken from error
            text = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
            raise Break(f"forward fails ({text})", tracer.failed_in or "", line_of(error)) from error
        return tracer

    def recorded(self, tracer: Tracer, leaves: list[torch.Tensor], instead: Mapping[int, Any] | None) -> None:
        """Trace once and leave the model as it is afterwards, its parameters replaced by fakes."""
        inputs, fakes = self.enter(tracer, leaves)
        given = tracer.given
        args, kwargs = put_together(self.structure, inputs, given)
        before = {n: held_by(item) for n, item in given.items() if not isinstance(item, tuple)}
        swap(self.model, {**fakes, **{old: fakes[real] for old, real in (instead or {}).items()}})
        tracer.buffer_at = {
            (path, key): t for path, m in self.model.named_modules() for key, t in m._buffers.items() if t is not None
        }
        out = tracer.run(self.forward, args, kwargs)
        keep_buffers(tracer, self.model)
        tracer.out = out
        tracer.filled = {n: held_by(given[n]) for n, then in before.items() if not still_holds(given[n], then)}
        tracer.trace.returned = len(take_apart(out)[0])
        tracer.trace.filled = tuple(tracer.filled)
        self.give_back(tracer, (out, list(tracer.filled.values())))

    def give_back(self, tracer: Tracer, value: Any) -> None:
        """The tensors in ``value`` are what the graph gives."""
        found: dict[int, Any] = {}
        tensors, tracer.trace.structure = take_apart(value, found)
        number = {id(item): n for n, item in tracer.given.items() if not isinstance(item, tuple)}
        tracer.trace.same = tuple((n, number[id(item)]) for n, item in found.items() if id(item) in number)
        tracer.trace.outputs = [tracer.name_of(tracer.stand_in(tensor)) for tensor in tensors]

    def excuse(
        self, tracer: Tracer, leaves: list[torch.Tensor], state: ModuleState, changes: list[Change]
    ) -> dict[Change, Any]:
        """Forward changed Python state. Fine if it does not act on it: a memo, a counter, a loss or a map left behind.

        Told by running again from the changed state: the same ops, and no further change. Raises Break otherwise.
        Returns the attributes with tensors that forward leaves behind, made anew in each call.
        """
        again: list[Change] = []
        spoilt: dict[Change, Any] = {}
        for path, attribute in changes:
            kind = memo_of_tensors(tracer, state.modules[path], attribute)
            if kind == "state":  # fine where forward makes it anew before it looks: spoilt for the second run
                spoilt[path, attribute] = vars(state.modules[path])[attribute]
                state.modules[path].__dict__[attribute] = Spoilt()
            if kind == "memo":  # made of nothing but shapes: made anew by each run
                state.put_back(path, attribute)
                again.append((path, attribute))
        first = {c: vars(state.modules[c[0]]).get(c[1]) for c in changes if c not in again}
        between = ModuleState(self.model, self.beside)
        known = {id(t) for t in self.tensors.values()}
        originals = {id(fake): id(real) for real, fake in tracer.entered if id(real) in known}
        try:
            second = self.run(leaves, instead=originals)
        except (Break, Exception):
            path, attribute = (list(spoilt) or changes)[0]
            raise self.keeps(path, f"keeps the attribute {attribute!r} from call to call") from None
        more = [c for c in between.changes() if c not in again and c not in spoilt]
        counters = {}
        for change in more:
            step = step_of(state.value(*change), first.get(change), vars(state.modules[change[0]]).get(change[1]))
            if step is None:
                raise self.keeps(change[0], f"changes the attribute {change[1]!r}")
            counters[change] = step
        self.compare(tracer, second, changes[0])
        if counters:
            self.count(tracer, leaves, state, counters)
        return spoilt

    def count(self, tracer: Tracer, leaves: list[torch.Tensor], state: ModuleState, steps: dict[Change, Any]) -> None:
        """Numbers that grow by the same step in each call: allowed if forward does nothing else with them."""
        state.restore()
        for path, attribute in steps:
            state.modules[path].__dict__[attribute] = Tally(0, partial(tracer.stop, module=path))
        third = self.run(leaves)
        for (path, attribute), step in steps.items():
            tally = vars(state.modules[path]).get(attribute)
            if not isinstance(tally, Tally) or tally.total != step:
                raise self.keeps(path, f"changes the attribute {attribute!r}")
        self.compare(tracer, third, next(iter(steps)))
        self.effects = tuple(Effect(state.modules[p], a, step) for (p, a), step in steps.items())

    def keeps(self, path: str, what: str) -> Break:
        return Break(f"forward {what}", path, line_of_forward(self.model.get_submodule(path)))

    def compare(self, tracer: Tracer, other: Tracer, change: Change) -> None:
        if tracer.trace.calls != other.trace.calls or tracer.trace.outputs != other.trace.outputs:
            raise self.keeps(change[0], f"changes the attribute {change[1]!r} and acts on it")

    def generalised(self, trace: Trace, calls: list[Call]) -> tuple[list[Call], dict[str, Any], int]:
        """The calls and shapes with Sizes, and the batch; 0 where the sizes do not follow one."""
        calls = live(calls, trace.outputs)
        if self.batch == 0:
            self.notes.append("no microbatches: the inputs share no dim 0")
            return calls, {}, 0
        reasons = []
        sizes = ((2, 5),) if self.batch == 1 else ((self.batch, 2 * self.batch + 1), (self.batch, 2 * self.batch))
        for small, large in sizes:
            try:
                found = self.joined(trace, calls, small, large)
                return *found, self.batch
            except (Disagree, Break) as error:
                reasons.append(str(error))
        self.notes.append(f"no microbatches: {reasons[0]}")
        return calls, {}, 0

    def joined(self, trace: Trace, calls: list[Call], small: int, large: int) -> tuple[list[Call], dict[str, Any]]:
        """The calls and shapes with Sizes, which give this trace at its own batch. Raises Disagree, Break."""
        second = self.live_at(large)
        if small == self.batch:
            return join(trace, calls, *second, Line(small, large))
        joined, shapes = join(*self.live_at(small), *second, Line(small, large))
        extrapolates(joined, shapes, trace, calls, self.batch)  # one sample broadcasts: more must not differ
        return joined, shapes

    def live_at(self, batch: int) -> tuple[Trace, list[Call]]:
        trace, calls = self.traced(resize(self.leaves, self.batch, batch))
        return trace, live(calls, trace.outputs)


COPY_BYTES = 2**28  # parameters up to this size are copied for real runs, larger ones read in place


def _input_name(path: str) -> str:
    """``[0][1]['x']`` -> ``args[1]['x']``; ``[1]['x']`` -> ``kwargs['x']``."""
    return f"args{path[3:]}" if path.startswith("[0]") else f"kwargs{path[3:]}"


def named_tensors(model: nn.Module) -> tuple[dict[str, tuple[torch.Tensor, str]], tuple[tuple[str, str], ...]]:
    """Parameters and buffers by first name, with their role; every other name -> the first."""
    found: dict[str, tuple[torch.Tensor, str]] = {}
    first: dict[int, str] = {}
    ties = []
    every: list[tuple[str, torch.Tensor, str]] = [
        (n, t, "parameter") for n, t in model.named_parameters(remove_duplicate=False)
    ]
    every += [(n, t, "buffer") for n, t in model.named_buffers(remove_duplicate=False)]
    for name, tensor, role in every:
        if id(tensor) in first:
            ties.append((name, first[id(tensor)]))
        else:
            first[id(tensor)] = name
            found[name] = (tensor, role)
    return found, tuple(ties)


def swap(model: nn.Module, stand_in: dict[int, Any]) -> None:
    """Put the stand-ins in the places of the model's parameters and buffers (ModuleState.restore undoes it)."""
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for key, tensor in list(registry.items()):
                if tensor is not None and id(tensor) in stand_in:
                    registry[key] = stand_in[id(tensor)]


def batch_of(leaves: list[torch.Tensor]) -> int:
    """The most common dim 0 among the inputs (the first of equals); 0 without inputs."""
    counts = Counter(t.shape[0] for t in leaves if not t.is_nested and t.dim() > 0)
    return counts.most_common(1)[0][0] if counts else 0


def resize(leaves: list[torch.Tensor], batch: int, other: int) -> list[torch.Tensor]:
    """The inputs with ``other`` rows where they have ``batch``: rows repeat from the first on."""
    made = []
    for leaf in leaves:
        if leaf.dim() == 0 or leaf.shape[0] != batch or batch == 0:
            made.append(leaf)
            continue
        rows = torch.arange(other, device=leaf.device) % batch
        made.append(leaf.detach().index_select(0, rows).requires_grad_(leaf.requires_grad))
    return made


__all__ = ["CaptureError", "Structure", "capture"]
