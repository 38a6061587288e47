"""Compiled: functions of tensors that ``torch.compile`` makes faster code of, equal ones once.

    blocks.0 ┐                                            ┌ shapes, dtypes, strides, gradients wanted,
    blocks.1 ┼─ the same text ─▶ one function for each of ┤ threads, grad mode
    blocks.2 ┘                                            └

A function is compiled, forward and backward, by whoever first calls it, while all others who compile wait. Where that
fails, it runs as it is and says so; so does a part that has been asked for at more sizes than are worth a compilation.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from partita.errors import PartitaError
from partita.torch_compat import watched, whole_compilation

MOST_SIZES = 8
"""Sizes for which one part is compiled; as many as torch itself compiles of one function before it gives up."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """One compilation: what was compiled first by it, how long it took, why it failed ('' where it did not)."""

    part: str
    seconds: float
    failed: str = ""


class _Function:
    """One part for one kind of arguments."""

    def __init__(self, label: str, make: Callable[[], Callable[..., Any]]) -> None:
        self.label = label
        self.eager = make()  # a code object of its own: torch keeps what it compiled by that
        self.run: Callable[..., tuple[torch.Tensor, ...]] = self.first

    def first(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compile; and run, as it is where that fails."""
        with _lock:
            if self.run != self.first:
                return self.run(*tensors)
            compiled = torch.compile(self.eager, fullgraph=True, dynamic=False)
            began = time.perf_counter()
            try:
                with _all_cores(), whole_compilation():
                    result: tuple[torch.Tensor, ...] = compiled(*tensors)
            except PartitaError:
                raise
            except Exception as error:
                failure, seconds = error, time.perf_counter() - began
            else:
                _made.append(Compilation(self.label, time.perf_counter() - began))
                self.run = compiled
                return result
        result = self.eager(*tensors)  # if this fails too, it is the call's own error
        reason = _short(failure)
        with _lock:
            _made.append(Compilation(self.label, seconds, reason))
            self.run = self.eager
        warnings.warn(
            f"'{self.label}' could not be compiled and runs as it is, with the same numbers: {reason}. Take it out "
            "of the plan's 'compile', or see what torch.compile says of that module alone (TORCH_LOGS=+dynamo)",
            stacklevel=2,
        )
        return result


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """The C++ compiler, which inherits the calling thread's cores, may use all that the process has."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


_lock = threading.RLock()
_made: list[Compilation] = []
_functions: WeakValueDictionary[Hashable, _Function] = WeakValueDictionary()


def compilations() -> tuple[Compilation, ...]:
    """Every compilation of this process so far, in order."""
    with _lock:
        return tuple(_made)


@dataclass(eq=False)
class Compiler:
    """What one divided model has had compiled: of each part, for which arguments."""

    asked: dict[str, set[Hashable]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def part(self, label: str, source: str, names: Mapping[str, Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
        """A function ``f(b, B, dev, *tensors)`` of this text, whose globals are ``names``, ``b``, ``B`` and ``dev``.
        ``label``: what of the model it is."""
        label = label or "the model itself"
        spelt = (source, tuple((name, _identity(value)) for name, value in sorted(names.items())))
        taken = set(re.findall(r"\b(?:b|B|dev)\b", source))
        found: dict[Hashable, _Function] = {}

        def run(b: int, B: int, dev: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            sizes = b if "b" in taken else 0, B if "B" in taken else 0, dev if "dev" in taken else None
            looks = tuple([(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors])
            key = (
                sizes, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), looks,
            )  # fmt: skip
            function = found.get(key)
            if function is None:

                def make() -> Callable[..., Any]:
                    space = {**names, "b": b, "B": B, "dev": dev}
                    exec(compile(source, f"<partita part {label}>", "exec"), space)
                    part: Callable[..., Any] = space["part"]
                    return part

                function = found[key] = self._function(label, (spelt, key), make)
            return function.eager(*tensors) if watched() else function.run(*tensors)

        return run

    def _function(self, label: str, key: Hashable, make: Callable[[], Callable[..., Any]]) -> _Function:
        with _lock:
            known = self.asked.setdefault(label, set())
            if len(known) >= MOST_SIZES and key not in known:
                function = _Function(label, make)
                function.run = function.eager
                if label not in self.told:
                    self.told.add(label)
                    warnings.warn(
                        f"'{label}' has been compiled for {MOST_SIZES} sizes; at others it runs as it is, with the "
                        "same numbers. Pad or bucket the inputs to fewer sizes, or take it out of the plan's 'compile'",
                        stacklevel=2,
                    )
                return function
            known.add(key)
            function = _functions.get(key) or _Function(label, make)
            _functions[key] = function
            return function


_compilers: WeakKeyDictionary[Any, Compiler] = WeakKeyDictionary()


def compiler_of(owner: object) -> Compiler:
    """The one that counts for this owner."""
    with _lock:
        return _compilers.setdefault(owner, Compiler())


def lacking(devices: Iterable[str]) -> str:
    """What this machine lacks to compile for these devices, with the remedy; '' where nothing is missing."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not any(device.startswith("cpu") for device in devices) or shutil.which(name) is not None:
        return ""
    return (
        f"code for CPUs is compiled by a C++ compiler, and there is no {name!r} here: install one, name one in the "
        "environment variable CXX, or take 'compile' out of the plan"
    )


def _identity(value: Any) -> Hashable:
    """What of a constant makes the text mean what it means."""
    return repr(value) if isinstance(value, float) else value if isinstance(value, Hashable) else id(value)


def _short(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
