"""What a forward may change besides its result: random generators, module attributes, buffers; saved and put back."""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partita.capture.beside import Beside
from partita.capture.contents import ITEMS, is_object, named_by
from partita.capture.structure import identical
from partita.torch_compat import version

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)
# Registries (compared by other means), and lists that recurrent layers rebuild from their parameters at will.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_flat_weights", "_flat_weight_refs")


@dataclass(frozen=True, slots=True)
class Generators:
    """The states of all random generators a model may draw from."""

    torch_cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any

    @classmethod
    def save(cls) -> Generators:
        started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = tuple(torch.cuda.get_rng_state_all()) if started else ()
        numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy)

    def restore(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: Generators) -> bool:
        """Whether nothing was drawn between the two."""
        return (
            bool(torch.equal(self.torch_cpu, other.torch_cpu))
            and len(self.cuda) == len(other.cuda)
            and all(bool(torch.equal(a, b)) for a, b in zip(self.cuda, other.cuda, strict=True))
            and self.python == other.python
            and repr(self.numpy) == repr(other.numpy)
        )


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draws inside leave no mark on the generators."""
    saved = Generators.save()
    try:
        yield
    finally:
        saved.restore()


def python_draws() -> tuple[Any, Any]:
    """A value that changes when Python's or NumPy's generator is drawn from."""
    numpy = None
    if "numpy" in sys.modules:
        _, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        numpy = (keys.tobytes(), position, has_gauss, gauss)
    return random.getstate(), numpy


def _digest(value: Any, depth: int, seen: frozenset[int]) -> Any:
    """A comparable picture of a value: contents of containers and plain objects, identity of the rest."""
    if isinstance(value, _PLAIN):
        return (type(value).__name__, "nan") if value != value else value
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value), version(value) if not value.is_inference() else 0)
    if id(value) in seen or depth == 0 or isinstance(value, nn.Module):
        return ("object", id(value))
    inner = seen | {id(value)}
    if isinstance(value, dict | list | set) and len(value) > ITEMS:
        return ("object", id(value), len(value))
    if isinstance(value, dict):
        items = tuple((_digest(k, 1, inner), _digest(v, depth - 1, inner)) for k, v in dict.items(value))
        return (type(value).__name__, id(value), items)
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        return (type(value).__name__, 0 if isinstance(value, tuple) else id(value),
                tuple(_digest(v, depth - 1, inner) for v in value))  # fmt: skip
    if isinstance(value, types.CellType):
        return ("cell", id(value), _digest(_cell(value), depth - 1, inner))
    if _has_attributes(value):
        return ("object", id(value), _digest(vars(value), depth - 1, inner))
    return ("object", id(value))


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and (not callable(value) or is_object(value))


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _copy_container(value: Any, depth: int, memo: dict[int, Any]) -> None:
    """Remember the contents of every mutable container reachable from ``value``."""
    if depth == 0 or id(value) in memo or isinstance(value, (*_PLAIN, torch.Tensor, nn.Module)):
        return
    if isinstance(value, dict):
        memo[id(value)] = (value, dict(dict.items(value)))  # a subclass's own access may make things
        children: Any = list(dict.values(value))
    elif isinstance(value, list):
        memo[id(value)] = (value, list(value))
        children = list(value)
    elif isinstance(value, set) or type(value).__name__ == "deque":
        memo[id(value)] = (value, list(value))
        children = []
    elif isinstance(value, tuple):
        children = value
    elif isinstance(value, types.CellType):
        memo[id(value)] = (value, _cell(value))
        children = [_cell(value)]
    elif _has_attributes(value):
        memo[id(value)] = (vars(value), dict(vars(value)))
        children = list(vars(value).values())
    else:
        return
    for child in children:
        _copy_container(child, depth - 1, memo)


def _put_back(container: Any, contents: Any) -> None:
    """The old contents, by the base class's own methods (a subclass may forbid changes)."""
    if isinstance(container, types.CellType):
        if _cell(container) is not contents:
            container.cell_contents = contents
    elif isinstance(container, list):
        if not identical(container, contents):
            list.__setitem__(container, slice(None), contents)
    elif isinstance(container, dict):
        if not identical(dict(dict.items(container)), contents):
            base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
            base.clear(container)
            base.update(container, contents)
    elif not identical(list(container), contents):
        container.clear()
        for item in contents:
            container.add(item) if isinstance(container, set) else container.append(item)


class ModuleState:
    """The attributes of every module of a model (and ``beside`` it) at one moment, and the containers that methods and
    hooks find by name or in closures. Buffers' and parameters' values are not kept here."""

    DEPTH = 4

    def __init__(self, model: nn.Module, beside: Beside | None = None) -> None:
        beside = beside or Beside()
        known = set(map(id, model.modules()))
        self.others = {p: m for p, m in beside.named_modules().items() if id(m) not in known}
        every = {**dict(model.named_modules()), **self.others}
        self.modules = {p: m for p, m in every.items() if not isinstance(m, torch.jit.ScriptModule)}
        self.contents: dict[int, Any] = {}
        self.digests: dict[str, dict[str, Any]] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.registries: dict[str, tuple[dict[str, Any], ...]] = {}
        for path, module in self.modules.items():
            own = {k: v for k, v in vars(module).items() if k not in _REGISTRIES}
            self.attributes[path] = own
            self.registries[path] = (dict(module._parameters), dict(module._buffers), dict(module._modules))
            for value in own.values():
                _copy_container(value, self.DEPTH, self.contents)
            self.digests[path] = self._picture(module)
        self.outside, self.cached = outside(self.modules, beside)
        for _, _, value in self.outside:
            _copy_container(value, self.DEPTH, self.contents)
        self.classes = {c: _data_of(c) for c in _classes(self.modules)}
        self.outside_digests = [_digest(value, self.DEPTH, frozenset()) for _, _, value in self.outside]
        self.cached_sizes = [function.cache_info().currsize for function in self.cached]

    def _picture(self, module: nn.Module) -> dict[str, Any]:
        return {k: _digest(v, self.DEPTH, frozenset()) for k, v in vars(module).items() if k not in _HOOKS}

    def changes(self) -> list[tuple[str, str]]:
        """(module path, attribute) of everything that is no longer what it was."""
        found: list[tuple[str, str]] = []
        for path, module in self.modules.items():
            now, then = self._picture(module), self.digests[path]
            both = dict.fromkeys([*then, *now])
            found.extend((path, k) for k in both if now.get(k, _MISSING) != then.get(k, _MISSING))
            if set(module._modules) != set(self.registries[path][2]):
                found.append((path, "_modules"))
            if path in self.others and _differ(module._buffers, self.registries[path][1]):
                found.append((path, "_buffers"))  # the model's own become writes to the old ones (keep_buffers)
        return found

    def outside_changes(self) -> list[tuple[str, str, Any]]:
        """(module path, name, value) of what is no longer what it was beside the modules."""
        classes = [
            (path, f"the class attribute {name!r}", now.get(name))
            for (cls, path), then in zip(_classes(self.modules).items(), self.classes.values(), strict=True)
            for now in (_data_of(cls),)
            for name in {**then, **now} if now.get(name, _MISSING) is not then.get(name, _MISSING)
        ]  # fmt: skip
        return classes + [
            found for found, then in zip(self.outside, self.outside_digests, strict=True)
            if _digest(found[2], self.DEPTH, frozenset()) != then
        ]  # fmt: skip

    def value(self, path: str, attribute: str) -> Any:
        """The attribute as it was."""
        return self.attributes[path].get(attribute)

    def put_back(self, path: str, attribute: str) -> None:
        """Restore one attribute, with the contents of the containers in it."""
        memo: dict[int, Any] = {}
        if attribute in self.attributes[path]:
            self.modules[path].__dict__[attribute] = self.attributes[path][attribute]
            _copy_container(self.attributes[path][attribute], self.DEPTH, memo)
            for key in memo:
                if key in self.contents:
                    _put_back(*self.contents[key])
        else:
            self.modules[path].__dict__.pop(attribute, None)

    def restore(self) -> None:
        """Put every attribute and container back. Parameters and buffers: the same objects as before."""
        for path, module in self.modules.items():
            now = module.__dict__
            for key in [k for k in now if k not in _REGISTRIES and k not in self.attributes[path]]:
                del now[key]
            now.update(self.attributes[path])
            for registry, old in zip(
                (module._parameters, module._buffers, module._modules), self.registries[path], strict=True
            ):
                if dict(registry) != old if registry is module._modules else _differ(registry, old):
                    registry.clear()
                    registry.update(old)
        for container, contents in self.contents.values():
            _put_back(container, contents)
        for cls, data in self.classes.items():
            now = _data_of(cls)
            for name in [n for n in {**data, **now} if now.get(n, _MISSING) is not data.get(n, _MISSING)]:
                setattr(cls, name, data[name]) if name in data else delattr(cls, name)
        for function, size in zip(self.cached, self.cached_sizes, strict=True):
            if function.cache_info().currsize != size:
                function.cache_clear()  # what it made while traced is good for nothing else


def _classes(modules: dict[str, nn.Module]) -> dict[type, str]:
    """The modules' own classes, with the path of the first of each."""
    found: dict[type, str] = {}
    for path, module in modules.items():
        for cls in type(module).__mro__:
            if not cls.__module__.startswith(("torch.", "builtins")):
                found.setdefault(cls, path)
    return found


def _data_of(cls: type) -> dict[str, Any]:
    """Plain values and tensors among a class's attributes, which code may assign anew."""
    kinds = (bool, int, float, str, type(None), torch.Tensor)
    return {n: v for n, v in vars(cls).items() if not n.startswith("__") and isinstance(v, kinds)}


def outside(modules: dict[str, nn.Module], beside: Beside) -> tuple[list[tuple[str, str, Any]], list[Any]]:
    """Mutable values that the modules' methods and hooks and a loss function reach beside the modules: (module path,
    name, value), and the functions with an ``lru_cache``."""
    classes = _classes(modules)
    functions: list[tuple[str, Any]] = []
    for path, module in modules.items():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        functions.extend((path, hook) for hook in hooks)
    functions += [(path, f) for cls, path in classes.items() for f in vars(cls).values() if callable(f)]
    functions += [("", f) for f in beside.functions]
    found = {id(o): ("", f"an object of {type(o).__name__} that the loss function uses", o) for o in beside.objects}
    cached: dict[int, Any] = {}
    for path, function in functions:
        if isinstance(function, types.MethodType) and not isinstance(function.__self__, nn.Module):
            found.setdefault(id(function.__self__), (path, f"the object of {function.__qualname__}", function.__self__))
        if isinstance(function, types.FunctionType):
            name = f"what {function.__qualname__} itself holds"
            found.setdefault(id(vars(function)), (path, name, vars(function)))
            for value in function.__defaults__ or ():
                if isinstance(value, list | dict | set):
                    found.setdefault(id(value), (path, f"a default argument of {function.__qualname__}", value))
        for name, cell in closure_of(function):
            found.setdefault(id(cell), (path, f"the variable {name!r} of {function.__qualname__}", cell))
    for space, name in named_by([f for _, f in functions]):
        value = space[name]
        if hasattr(value, "cache_clear") and hasattr(value, "cache_info"):
            cached[id(value)] = value
        elif isinstance(value, list | dict | set) or type(value).__name__ == "deque":
            found.setdefault(id(value), ("", f"the global {name!r}", value))
    return list(found.values()), list(cached.values())


def closure_of(function: Any) -> list[tuple[str, types.CellType]]:
    """The variables a function's closure holds."""
    code = getattr(function, "__code__", None)
    return list(zip(code.co_freevars, function.__closure__ or (), strict=True)) if code is not None else []


_MISSING = object()


def _differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) != list(b) or any(a[k] is not b[k] for k in a)
