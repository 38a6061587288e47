"""Contents: what mutable Python values held at one moment, and whether they still do.

Code reads configuration from dicts and objects, closures and module-level names; a graph made while they held one thing
is of no use once they hold another. Values are followed a few levels deep; tensors, modules and torch's own objects
are not looked into (an optimizer or a scheduler changes in every step and does not say what forward does).
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import numpy as np
import torch

DEPTH = 4  # containers in containers
OBJECTS = 2  # objects in objects
ARRAY_BYTES = 2**20  # larger arrays are taken to stay as they are
ITEMS = 10_000  # longer containers too, but for their length
PLAIN = (bool, int, float, str, complex, bytes, type(None), torch.dtype, torch.device)
_BY_IDENTITY = (*PLAIN, types.FunctionType, types.BuiltinFunctionType, type)  # or equal values, for what has such
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_CLOSED = (torch.Tensor, torch.nn.Module, type, types.ModuleType, types.BuiltinFunctionType)
# Objects of these change as a program goes on, whatever the model computes.
_DRIVERS = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "accelerate",
    "tqdm",
    "wandb",
    "mlflow",
    "tensorboard",
)
_MACHINERY = (
    "torch",
    "numpy",
    "logging",
    "threading",
    "_thread",
    "weakref",
    "concurrent",
    "multiprocessing",
    "asyncio",
)
_SKIPPED = frozenset((*_DRIVERS, *_MACHINERY))
FUNCTIONS = 500  # functions followed


@dataclass(frozen=True, eq=False, slots=True)
class Contents:
    """One value. ``then``: what it held that compares; ``size``: how much, where that counts; ``bound``: the parts that
    must be the very same objects. ``live``: where it holds them, if that is one mapping."""

    value: Any
    then: Any
    bound: tuple[tuple[Any, Any], ...] = ()
    size: int = -1
    live: Any = None

    def __str__(self) -> str:
        return f"what a {type(self.value).__name__} holds"

    def hold(self) -> bool:
        """Whether nothing in it (not in the values it holds) has changed."""
        try:
            now, then = self.live if self.live is not None else view(self.value), self.then
            if self.size >= 0 and len(now) != self.size:
                return False
            get = dict.__getitem__ if isinstance(now, dict) else getitem  # past what a subclass makes of it
            for key, item in self.bound:
                if get(now, key) is not item:
                    return False
            if isinstance(then, dict):
                return not then or bool(then.items() <= (dict.items(now) if isinstance(now, dict) else now.items()))
            if isinstance(then, np.ndarray):
                return bool(then.dtype == now.dtype and then.tobytes() == now.tobytes())
            return then is None or bool(then == now)
        except Exception:  # a part is gone, or of a kind that does not compare
            return False


def contents_of(values: Iterable[Any], seen: set[int]) -> Iterator[Contents]:
    """Contents of all that is mutable in ``values`` and not in ``seen`` (identities; added to)."""
    for value in values:
        yield from _follow(value, seen, DEPTH, OBJECTS)


def globals_of(functions: Iterable[Any], seen: set[int]) -> Iterator[Contents]:
    """What Python functions find by name: their closures and the module-level values, as ``named_by`` follows them."""
    spaces: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
    for space, name in named_by(functions):
        spaces.setdefault(id(space), (space, {}))[1][name] = None
    for space, names in spaces.values():
        found = {n: space[n] for n in names}
        plain = {n: v for n, v in found.items() if isinstance(v, _BY_IDENTITY)}  # one comparison for all
        bound = tuple((n, v) for n, v in found.items() if n not in plain and not isinstance(v, types.ModuleType))
        if plain or bound:
            yield Contents(space, plain, bound, live=space)
        yield from contents_of(found.values(), seen)
    yield from contents_of(functions, seen)


def of_class(cls: type) -> Contents:
    """The attributes and methods of a class itself."""
    return Contents(cls, {n: v for n, v in vars(cls).items() if not n.startswith("__")}, live=vars(cls))


def named_by(functions: Iterable[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(namespace, name) of the module-level values that functions name, and the user's functions that these call.

    Not seen: what is found under computed names, and what libraries and methods of other objects look up.
    """
    pending, done = list(functions), set[types.CodeType]()
    while pending and len(done) < FUNCTIONS:
        function = pending.pop()
        function = getattr(function, "__wrapped__", function)
        code = getattr(function, "__code__", None)
        if code is None or code in done:
            continue
        done.add(code)
        names = {n: None for c in codes(code) for n in c.co_names}
        own = function.__globals__
        modules = [v for n in names if isinstance(v := own.get(n), types.ModuleType) and _users(v.__name__)]
        for space in (own, *map(vars, modules)):
            for name in names:
                if name not in space:
                    continue
                yield space, name
                value = space[name]
                if callable(value) and not isinstance(value, type) and _users(getattr(value, "__module__", "")):
                    pending.append(value)
        pending.extend(v for v in view(function).values() if isinstance(v, types.FunctionType))


def _users(module: str | None) -> bool:
    root = (module or "torch").partition(".")[0]
    return root not in _SKIPPED and root not in sys.stdlib_module_names or root == "__main__"


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _follow(value: Any, seen: set[int], depth: int, objects: int) -> Iterator[Contents]:
    if not depth or not objects or id(value) in seen or not (isinstance(value, tuple) or _mutable(value)):
        return
    seen.add(id(value))
    parts = view(value)
    if isinstance(value, np.ndarray) or (isinstance(value, set | deque) and len(value) <= ITEMS):
        yield Contents(value, parts.copy())
        return
    if len(parts) > ITEMS:
        yield Contents(value, {} if isinstance(parts, dict) else None, (), len(parts))
        return
    if isinstance(value, type):
        yield of_class(value)
        return
    items: list[tuple[Any, Any]] = list(dict.items(parts) if isinstance(parts, dict) else enumerate(parts))
    bound = tuple((key, item) for key, item in items if not isinstance(item, PLAIN))
    if isinstance(value, list):
        yield Contents(value, list(value), bound, len(value), live=value)
    elif not isinstance(value, tuple):
        own = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        yield Contents(value, {k: v for k, v in items if isinstance(v, PLAIN)}, bound, len(items),
                       live=own if own is parts else None)  # fmt: skip
    inside = objects - (not isinstance(value, list | tuple | dict))
    for _, item in bound:
        yield from _follow(item, seen, depth - 1, inside)


def _mutable(value: Any) -> bool:
    if isinstance(value, list | dict | set | deque):
        return True
    if isinstance(value, np.ndarray):
        return value.nbytes <= ARRAY_BYTES
    if isinstance(value, type):  # an autograd function runs as one piece, whatever its class holds
        return _users(value.__module__) and not issubclass(value, torch.autograd.Function)
    if isinstance(value, (*_CLOSED, *PLAIN)):
        return False
    if isinstance(value, types.FunctionType | types.MethodType):  # a decorator's closure holds functions: no state
        return not all(isinstance(v, _CODE) for v in view(value).values())
    return is_object(value)


def is_object(value: Any) -> bool:
    """Whether it is an object of the user's, with attributes (callable or not), and no function, module or tensor."""
    if isinstance(value, (*_CLOSED, *PLAIN, types.FunctionType, types.MethodType)):
        return False
    if type(value).__module__.partition(".")[0] in _SKIPPED:
        return False
    if hasattr(value, "cache_info"):  # of functools.lru_cache
        return False
    return hasattr(value, "__dict__") or bool(getattr(type(value), "__slots__", ()))


def view(value: Any) -> Any:
    """What a value holds: a mapping by key or name, or the value itself."""
    if isinstance(value, list | tuple | dict | set | deque | np.ndarray):
        return value
    if isinstance(value, types.MethodType):
        return {"self": value.__self__}
    if isinstance(value, functools.partial):
        return {"function": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.FunctionType):
        found = dict(vars(value))
        if value.__defaults__ and not all(isinstance(v, PLAIN) for v in value.__defaults__):
            found["__defaults__"] = value.__defaults__
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        return found
    if not hasattr(value, "__dict__"):
        names = [n for cls in type(value).__mro__ for n in _texts(cls.__dict__.get("__slots__", ()))]
        return {n: getattr(value, n) for n in names if hasattr(value, n)}
    return vars(value)


def _texts(names: Any) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names
