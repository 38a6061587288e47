"""Bind: from a call of the model to the captured graph that was made for such a call, and its tensors by name.

A graph is used again only where everything it was made for still holds: the modules, their plain attributes, modes
and hooks; the parameters' shapes, dtypes and ties; the inputs' shapes; the values that the model read. Anything else
is captured anew, and kept beside the others.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from partita.capture import Captured, capture
from partita.runtime.local import Local

_PLAIN = (bool, int, float, str, complex, type(None), torch.Tensor, torch.dtype, torch.device)
_OWN = frozenset(vars(nn.Module()))  # the base class's registries
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_capturing = threading.RLock()  # tracing replaces functions of torch and moves the random generators for a while


@dataclass(frozen=True)
class Bound:
    """One call's captured graph with its tensors by name. ``engine`` None: the model runs live."""

    engine: Local | None
    captured: Captured
    given: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Census:
    """What a graph depends on in the model. ``modules`` are kept alive, so that no other takes their identity.

    ``tensors``: modes, hooks, and of parameters and buffers all but the values. ``kept``: of each module the number of
    its attributes and those that are numbers, texts or tensors. ``others``: the plain containers and configuration
    objects it holds, as they were.
    """

    modules: tuple[nn.Module, ...]
    tensors: tuple[object, ...]
    kept: tuple[tuple[int, dict[str, Any]], ...]
    others: tuple[tuple[int, Any, Any], ...]

    def holds(self, model: nn.Module, ignored: frozenset[object]) -> bool:
        """Whether nothing differs now, but for the attributes that are ``ignored``: (module's identity, name), or the
        identity alone for all of a module's."""
        modules = modules_of(model)
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return False
        if _tensors(modules) != self.tensors:
            return False
        for module, (count, kept) in zip(modules, self.kept, strict=True):
            own = vars(module)
            if (len(own) != count or not _within(kept, own)) and not _excused(module, kept, own, ignored):
                return False
        return all(owner in ignored or _as_it_was(value, then) for owner, value, then in self.others)


def _within(kept: dict[str, Any], own: dict[str, Any]) -> bool:
    try:
        return kept.items() <= own.items()
    except RuntimeError:  # a tensor replaced by another
        return False


def _excused(module: nn.Module, kept: dict[str, Any], own: dict[str, Any], ignored: frozenset[object]) -> bool:
    if id(module) in ignored:
        return True
    now = {name: value for name, value in own.items() if isinstance(value, _PLAIN)}
    changed = [n for n in {**kept, **now} if n not in now or n not in kept or not _within({n: kept[n]}, now)]
    return bool(changed) and all((id(module), name) in ignored for name in changed)


def _copied(value: Any) -> Any:
    """The contents of a plain container or configuration object; None for what is not looked into."""
    if isinstance(value, list | dict | set):
        return copy.copy(value)
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module | torch.Tensor | type) and not callable(value):
        return {name: item for name, item in vars(value).items() if isinstance(item, _PLAIN)}
    return None


def _as_it_was(value: Any, then: Any) -> bool:
    try:
        return bool(value == then) if type(value) is type(then) else _within(then, vars(value))
    except Exception:
        return False


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, in a fixed order; faster than ``model.modules()``."""
    found: dict[int, nn.Module] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            children = module._modules
            if children:
                stack.extend([child for child in children.values() if child is not None])
    return list(found.values())


def _tensors(modules: list[nn.Module]) -> tuple[object, ...]:
    facts: list[object] = []
    number: dict[int, int] = {}
    for module in modules:
        own = vars(module)
        facts.append(own["training"])
        for registry in (own["_parameters"], own["_buffers"]):
            for tensor in registry.values():
                if tensor is None:
                    facts.append(None)
                    continue
                first = number.setdefault(id(tensor), len(number))
                facts.append((first, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device))
        for name in _HOOKS:
            if own[name]:
                facts.append((name, *own[name]))
    return tuple(facts)


def census(model: nn.Module) -> Census:
    """The model as it is now."""
    modules = modules_of(model)
    kept, others, seen = [], [], set()
    for module in modules:
        own = vars(module)
        kept.append((len(own), {name: value for name, value in own.items() if isinstance(value, _PLAIN)}))
        for name, value in own.items():
            then = None if name in _OWN or id(value) in seen else _copied(value)
            if then is not None:
                seen.add(id(value))
                others.append((id(module), value, then))
    return Census(tuple(modules), _tensors(modules), tuple(kept), tuple(others))


def situation() -> tuple[object, ...]:
    """What a graph depends on besides model and inputs."""
    casts = tuple((k, torch.get_autocast_dtype(k)) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), casts)


def picture(leaves: list[torch.Tensor]) -> tuple[object, ...]:
    """What a graph depends on in the inputs, besides the structure around them."""
    return tuple([(t.shape, t.dtype, t.device, t.requires_grad) for t in leaves])


Place = tuple[str, dict[str, Any], str]  # name in the graph, registry of the owning module, key there


@dataclass(eq=False)
class Entry:
    """One captured graph, what it was made for, and where its parameters and buffers stand."""

    key: tuple[object, ...]
    census: Census
    picture: tuple[object, ...]
    captured: Captured
    engine: Local | None
    ignored: frozenset[object] = frozenset()
    parameters: list[Place] = field(default_factory=list)
    buffers: list[Place] = field(default_factory=list)

    def bound(self, leaves: list[torch.Tensor]) -> Bound:
        if self.engine is None:
            return Bound(None, self.captured, {}, {})
        given = dict(zip(self.captured.inputs, leaves, strict=True))
        given.update({name: registry[key] for name, registry, key in self.buffers})
        return Bound(self.engine, self.captured, given, {n: registry[key] for n, registry, key in self.parameters})


GUARDED = 3  # graphs made for values read from the inputs, before the reading part is left out of the graph instead
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

    def bind(self, what: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The graph for a call like this (captured now where there is none yet), and the call's tensors."""
        key = (what, *situation())
        missed = 0
        for entry in self.entries:
            if entry.key != key or not entry.census.holds(self.model, entry.ignored):
                continue
            leaves = entry.captured.flatten(args, kwargs)
            if leaves is None or picture(leaves) != entry.picture:
                continue
            if entry.captured.guards_hold(leaves):
                return entry.bound(leaves)
            missed += 1
        with _capturing:
            now = census(self.model)
            with self.around():
                captured = capture(self.model, args, kwargs, forward=forward, guards=missed < GUARDED)
        leaves = captured.flatten(args, kwargs)
        assert leaves is not None, "the call just captured"
        entry = self._entry(key, now, captured, leaves)
        with self._lock:
            same = {id(m) for m in now.modules}
            kept = [e for e in self.entries if same == {id(m) for m in e.census.modules}]
            self.entries = [entry, *kept[: KEPT - 1]]
        return entry.bound(leaves)

    def _entry(self, key: tuple[object, ...], now: Census, captured: Captured, leaves: list[torch.Tensor]) -> Entry:
        made = picture(leaves)
        if captured.live:
            return Entry(key, now, made, captured, None, frozenset(id(m) for m in now.modules))
        ignored: set[object] = {(id(e.module), e.attribute) for e in captured.effects}
        for opaque in captured.opaques.values():
            module = getattr(opaque, "module", None)
            if isinstance(module, nn.Module):
                ignored.update(id(m) for m in module.modules())
        find = dict(self.model.named_modules())
        places: dict[str, list[Place]] = {"parameter": [], "buffer": []}
        for tensor in captured.graph.of_role("parameter", "buffer"):
            owner, _, name = tensor.path.rpartition(".")
            registry = getattr(find[owner], "_parameters" if tensor.role == "parameter" else "_buffers")
            places[tensor.role].append((tensor.name, registry, name))
        return Entry(key, now, made, captured, self.engine(captured), frozenset(ignored),
                     places["parameter"], places["buffer"])  # fmt: skip
