"""Bind: from a call of the model to the captured graph that was made for such a call, and its tensors by name.

A graph is used again only where everything it was made for still holds: the modules, their plain attributes, modes
and hooks; the parameters' shapes, dtypes and ties; the inputs' shapes; the values that the model read. Anything else
is captured anew, and kept beside the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from partita.capture import Captured, capture
from partita.runtime.local import Local

_PLAIN = frozenset((bool, int, float, str, complex, type(None)))
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
    """What a graph depends on in the model. ``modules`` are kept alive, so that no other takes their identity."""

    modules: tuple[nn.Module, ...]
    tensors: tuple[object, ...]
    plain: tuple[dict[str, object], ...]

    def same(self, other: Census, ignored: frozenset[object]) -> bool:
        """Whether nothing differs, but for plain attributes that are ``ignored``: (module's identity, name), or the
        identity alone for all of a module's."""
        if self.tensors != other.tensors or len(self.modules) != len(other.modules):
            return False
        if any(a is not b for a, b in zip(self.modules, other.modules, strict=True)):
            return False
        if self.plain == other.plain:
            return True
        missing = object()
        return all(
            a == b
            or id(m) in ignored
            or all(a.get(k, missing) == b.get(k, missing) or (id(m), k) in ignored for k in {**a, **b})
            for m, a, b in zip(self.modules, self.plain, other.plain, strict=True)
        )


def census(model: nn.Module) -> Census:
    """The model as it is now."""
    modules: list[nn.Module] = []
    tensors: list[object] = []
    plain: list[dict[str, object]] = []
    number: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        modules.append(module)
        own = vars(module)
        for registry in (own["_parameters"], own["_buffers"]):
            for key, tensor in registry.items():
                if tensor is None:
                    tensors.append((key, None))
                    continue
                first = number.setdefault(id(tensor), len(number))
                tensors.append((key, first, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device))
        for name in _HOOKS:
            if own[name]:
                tensors.append((name, *own[name]))
        tensors.append(own["training"])
        plain.append({name: value for name, value in own.items() if value.__class__ in _PLAIN})
        stack.extend([child for child in own["_modules"].values() if child is not None])
    return Census(tuple(modules), tuple(tensors), tuple(plain))


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


class Binder:
    """The graphs captured for one model so far. ``engine(captured)``: makes what runs one."""

    def __init__(self, model: nn.Module, engine: Callable[[Captured], Local]) -> None:
        self.model, self.engine = model, engine
        self.entries: list[Entry] = []
        self._lock = threading.Lock()

    def bind(
        self, what: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Bound:
        """The graph for a call like this (captured now where there is none yet), and the call's tensors."""
        key = (what, *situation())
        now = census(self.model)
        for entry in self.entries:
            if entry.key != key or not entry.census.same(now, entry.ignored):
                continue
            leaves = entry.captured.flatten(args, kwargs)
            if leaves is not None and picture(leaves) == entry.picture and entry.captured.guards_hold(leaves):
                return entry.bound(leaves)
        with _capturing:
            captured = capture(self.model, args, kwargs, forward=forward)
        leaves = captured.flatten(args, kwargs)
        assert leaves is not None, "the call just captured"
        entry = self._entry(key, now, captured, leaves)
        with self._lock:
            same = {id(m) for m in now.modules}
            self.entries = [entry, *(e for e in self.entries if same == {id(m) for m in e.census.modules})]
        return entry.bound(leaves)

    def _entry(
        self, key: tuple[object, ...], now: Census, captured: Captured, leaves: list[torch.Tensor]
    ) -> Entry:
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
