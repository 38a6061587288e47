"""Bind: from a call of the model to the captured graph that was made for such a call, and its tensors by name.

A graph is used again only where everything it was made for still holds: the modules, their plain attributes, modes
and hooks; the parameters' shapes, dtypes and ties; the inputs' shapes; the values that the model read. Anything else
is captured anew, and kept beside the others.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture import Captured, capture
from partita.capture.beside import Beside, beside
from partita.errors import UsageError
from partita.runtime.census import CODE, Census, census
from partita.runtime.local import Local

_capturing = threading.RLock()  # tracing replaces functions of torch and moves the random generators for a while


@dataclass(frozen=True)
class Bound:
    """One call's captured graph with its tensors by name. ``engine`` None: the model runs live."""

    engine: Local | None
    captured: Captured
    given: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    arguments: Any = None

    def made(self) -> tuple[str, ...]:
        """The outputs that ops make, each once."""
        graph = self.captured.graph
        made = {o for op in graph.ops for o in op.outputs}
        return tuple(dict.fromkeys(name for name in graph.outputs if name in made))

    def answer(self, values: dict[str, torch.Tensor]) -> Any:
        """The call's answer around what was ``made``; what forward does to the model's attributes is done."""
        self.captured.after_call()
        every = {**self.captured.constants, **self.parameters, **self.given, **values}
        return self.captured.unflatten([every[name] for name in self.captured.graph.outputs], self.arguments)


def situation() -> tuple[object, ...]:
    """What a graph depends on besides model and inputs."""
    casts = tuple((k, torch.get_autocast_dtype(k)) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k))
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return (*modes, casts, tc.global_hooks())


def picture(leaves: list[torch.Tensor]) -> tuple[object, ...]:
    """What a graph depends on in the inputs, besides the structure around them."""
    return tuple([_looks(t) for t in leaves])


def _looks(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return (tensor.layout, tensor.dtype, tensor.device)  # never in a graph
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


Place = tuple[str, dict[str, Any], str]  # name in the graph, registry of the owning module, key there


@dataclass(eq=False)
class Entry:
    """One captured graph, what it was made for, and where its parameters and buffers stand. ``loss``: what its loss
    function reaches, ``apart`` from the model; None where there is none."""

    key: tuple[object, ...]
    census: Census
    loss: Beside
    apart: Census | None
    picture: tuple[object, ...]
    captured: Captured
    engine: Local | None
    ignored: frozenset[object] = frozenset()
    parameters: list[Place] = field(default_factory=list)
    buffers: list[Place] = field(default_factory=list)
    read: list[tuple[dict[str, Any], str, torch.Tensor]] = field(default_factory=list)  # buffers whose values it read

    def lossless(self) -> bool:
        """Whether the loss function's own part is what it was."""
        return self.apart is None or self.apart.holds(frozenset(), *self.loss.modules)

    def fits(self, leaves: list[torch.Tensor]) -> bool:
        """Whether every value that the model read is the one the graph was made for."""
        return all(now.get(key) is then for now, key, then in self.read) and self.captured.guards_hold(leaves)

    def bound(self, leaves: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        if self.engine is None:
            return Bound(None, self.captured, {}, {})
        given = dict(zip(self.captured.inputs, leaves, strict=True))
        given.update({name: registry[key] for name, registry, key in self.buffers})
        parameters = {n: registry[key] for n, registry, key in self.parameters}
        return Bound(self.engine, self.captured, given, parameters, (args, kwargs))


GUARDED = 3  # graphs made for values read from the inputs, before the reading part is left out of the graph instead
AGAIN = 20  # captures for changed Python values before a word about it
KEPT = 64  # graphs held, the newest first: shapes that come back are found again


class Binder:
    """The graphs captured for one model so far. ``engine(captured)``: makes what runs one; ``around()``: entered while
    the model is traced."""

    def __init__(
        self, model: nn.Module, engine: Callable[[Captured], Local],
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:  # fmt: skip
        self.model, self.engine, self.around = model, engine, around
        self.entries: list[Entry] = []
        self._lock = threading.Lock()
        self._again = 0

    def bind(
        self, what: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        loss_fn: Callable[..., Any] | None = None,
    ) -> Bound:  # fmt: skip
        """The graph for a call like this (captured now where there is none yet), and the call's tensors.

        ``loss_fn``: what ``forward`` runs besides the model. Where its own values change from call to call no graph
        holds it: then, as for a model that runs live, there is no engine.
        """
        if tc.transforming():
            raise UsageError(
                "a divided model cannot run inside vmap or another transform of torch.func, which would not reach its "
                "devices; apply the transform to the undivided model (.module)"
            )
        key = (what, *situation())
        missed = changed = 0
        for entry in self.entries:
            if entry.key != key or entry.loss.root is not loss_fn:
                continue
            if not entry.census.holds(entry.ignored, self.model):
                continue
            leaves = entry.captured.flatten(args, kwargs)
            if leaves is None or picture(leaves) != entry.picture:
                continue
            if not entry.lossless():
                changed += 1
            elif entry.fits(leaves):
                return entry.bound(leaves, args, kwargs)
            else:
                missed += 1
            if changed >= GUARDED:
                return Bound(None, entry.captured, {}, {})
        with _capturing:
            now = census(self.model)
            reached = beside(loss_fn)
            apart = census(*reached.modules, reached=reached) if loss_fn is not None else None
            self._tell(key)
            with self.around():
                captured = capture(self.model, args, kwargs, forward=forward, guards=missed < GUARDED, beside=reached)
        leaves = captured.flatten(args, kwargs)
        assert leaves is not None, "the call just captured"
        entry = self._entry(Entry(key, now, reached, apart, picture(leaves), captured, None))
        with self._lock:
            same = {id(m) for m in now.modules}
            kept = [e for e in self.entries if same == {id(m) for m in e.census.modules}]
            self.entries = [entry, *kept[: KEPT - 1]]
        return entry.bound(leaves, args, kwargs)

    def _tell(self, key: tuple[object, ...]) -> None:
        """A word where calls are captured again and again for no other reason than Python values that change."""
        last = next((entry for entry in self.entries if entry.key == key), None)
        if last is not None and not last.census.holds(last.ignored, self.model):
            self._again += 1
            if self._again == AGAIN:
                names = {id(module): name for name, module in self.model.named_modules()}
                warnings.warn(
                    f"the model has been captured anew {AGAIN} times because what it depends on changes between calls "
                    f"(this time {last.census.difference(names)}): keep such values out of its reach, in a buffer "
                    "or among the inputs say, to save the seconds",
                    stacklevel=4,
                )

    def _entry(self, entry: Entry) -> Entry:
        """The entry of what has just been captured, with its engine and where its tensors stand."""
        captured, now = entry.captured, entry.census
        if captured.live:
            entry.ignored = frozenset((CODE, *(id(m) for m in now.modules)))
            return entry
        ignored: set[object] = {(id(e.module), e.attribute) for e in captured.effects}
        ignored.update((id(module), attribute) for module, attribute in captured.left)
        for opaque in captured.opaques.values():
            module = getattr(opaque, "module", None)
            if isinstance(module, nn.Module):
                ignored.update(id(m) for m in module.modules())
        find = dict(self.model.named_modules())
        places: dict[str, list[Place]] = {"parameter": entry.parameters, "buffer": entry.buffers}
        for tensor in captured.graph.of_role("parameter", "buffer"):
            owner, _, name = tensor.path.rpartition(".")
            registry = getattr(find[owner], "_parameters" if tensor.role == "parameter" else "_buffers")
            places[tensor.role].append((tensor.name, registry, name))
        for path, was in ((p, t) for guard in captured.guards for p, t in guard.tensors.items()):
            owner, _, name = path.rpartition(".")
            if owner in find and name in find[owner]._buffers:
                entry.read.append((find[owner]._buffers, name, was))
        entry.engine, entry.ignored = self.engine(captured), frozenset(ignored)
        return entry
