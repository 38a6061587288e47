"""Bind: from a call of the model to the captured graph that was made for such a call, and its tensors by name.

A graph is used again only where everything it was made for still holds: the modules, their plain attributes, modes
and hooks; the parameters' shapes, dtypes and ties; the inputs' shapes; the values that the model read. Anything else
is captured anew, and kept beside the others.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture import Captured, capture
from partita.capture.beside import Beside, beside
from partita.capture.contents import PLAIN, Contents, contents_of, globals_of, of_class
from partita.errors import UsageError
from partita.runtime.local import Local

_OWN = frozenset(vars(nn.Module()))  # the base class's registries
CODE = 0  # the owner of what the modules' methods find by name
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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


@dataclass(frozen=True)
class Census:
    """What a graph depends on in the model, or in what its loss function reaches. ``modules`` are kept alive, so that
    no other takes their identity.

    ``tensors``: classes, modes, hooks, and of parameters and buffers all but the values. ``kept``: of each module the
    number of its attributes, those that are numbers or texts, and the others, which must be the very same objects.
    ``contents``: the containers, arrays and configuration objects reached from it, as they were.
    """

    modules: tuple[nn.Module, ...]
    tensors: tuple[object, ...]
    kept: tuple[tuple[int, dict[str, Any], tuple[tuple[str, Any], ...]], ...]
    contents: tuple[tuple[int, Contents], ...]

    def holds(self, ignored: frozenset[object], *roots: nn.Module) -> bool:
        """Whether nothing differs now, but for the attributes that are ``ignored``: (module's identity, name), or the
        identity alone for all of a module's."""
        modules = modules_of(*roots)
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return False
        if _tensors(modules) != self.tensors:
            return False
        for module, (count, kept, bound) in zip(modules, self.kept, strict=True):
            own = vars(module)
            as_before = len(own) == count and _within(kept, own) and all(own.get(n) is v for n, v in bound)
            if not as_before and not _excused(module, kept, bound, own, ignored):
                return False
        return all(owner in ignored or contents.hold() for owner, contents in self.contents)

    def difference(self, names: dict[int, str]) -> str:
        """What differs now, for a person; ``names``: the modules' by identity."""
        for module, (_, kept, bound) in zip(self.modules, self.kept, strict=True):
            own = vars(module)
            changed = _changed(kept, bound, own)
            if changed:
                return f"the attribute {names.get(id(module), '')}.{changed[0]}".replace(" .", " ")
        for owner, contents in self.contents:
            if not contents.hold():
                where = f"reached from {names.get(owner) or 'the model'}" if owner else "found by name"
                return f"{contents}, {where}"
        return "its modules, modes, hooks or tensors"


def _within(kept: dict[str, Any], own: dict[str, Any]) -> bool:
    try:
        return kept.items() <= own.items()
    except Exception:  # another kind of value, which does not compare
        return False


def _changed(kept: dict[str, Any], bound: tuple[tuple[str, Any], ...], own: dict[str, Any]) -> list[str]:
    """The attributes that are not what they were."""
    plain = [n for n, v in kept.items() if not _within({n: v}, own)]
    return plain + [n for n, v in bound if own.get(n) is not v]


def _excused(
    module: nn.Module, kept: dict[str, Any], bound: tuple[tuple[str, Any], ...], own: dict[str, Any],
    ignored: frozenset[object],
) -> bool:  # fmt: skip
    if id(module) in ignored:
        return True
    changed = _changed(kept, bound, own)
    changed += own.keys() - kept.keys() - {n for n, _ in bound} - _OWN
    return bool(changed) and all((id(module), name) in ignored for name in changed)


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """Every module once, in a fixed order; faster than ``model.modules()``."""
    found: dict[int, nn.Module] = {}
    stack = list(roots)
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
        facts.append((type(module), getattr(type(module), "forward", None), module.training))
        for registry in (module._parameters, module._buffers):
            for tensor in registry.values():
                if tensor is None:
                    facts.append(None)
                    continue
                first = number.setdefault(id(tensor), len(number))
                facts.append((first, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device))
        for name in _HOOKS:
            if own.get(name):
                facts.append((name, *own[name]))
    return tuple(facts)


def census(*roots: nn.Module, reached: Beside | None = None) -> Census:
    """The model as it is now; with ``reached``, what a loss function reaches besides modules."""
    modules = modules_of(*roots)
    kept, seen, classes = [], set[int](), dict[type, None]()
    contents: list[tuple[int, Contents]] = []
    for module in modules:
        own = {n: v for n, v in vars(module).items() if n not in _OWN}
        plain = {n: v for n, v in own.items() if isinstance(v, PLAIN)}
        bound = tuple((n, v) for n, v in own.items() if n not in plain)
        kept.append((len(vars(module)), plain, bound))
        contents.extend((id(module), c) for c in contents_of((v for _, v in bound), seen))
        classes.update(dict.fromkeys(c for c in type(module).__mro__ if not c.__module__.startswith("torch.")))
    functions = [f for cls in classes for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    if reached is not None:
        functions += reached.functions
        contents.extend((CODE, c) for c in contents_of([reached.root, *reached.functions, *reached.objects], seen))
    contents.extend((CODE, c) for c in (*map(of_class, classes), *globals_of(functions, seen)))
    return Census(tuple(modules), _tensors(modules), tuple(kept), tuple(contents))


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
