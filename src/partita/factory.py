"""FACTORY on the command line: ``module:function`` or ``file.py:function`` that makes a model and an example call.

A name of ``partita.models`` (``llama-405b``) is one too: the model on meta tensors, of its published size.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from partita import models
from partita.errors import UsageError
from partita.strict_yaml import nearest

SHAPE = "it must return (model, example_args) or (model, example_args, example_kwargs)"
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def load(spec: str, batch: int | None = None, seq: int | None = None) -> Made:
    """Model, example args and example kwargs. ``batch``: samples of the example call; handed to the factory where it
    takes ``batch``, else the example tensors' rows are repeated or cut. ``seq``: tokens a sample, for named models and
    factories that take ``seq``. Raises UsageError."""
    if batch is not None and batch < 1:
        raise UsageError(f"--batch {batch} holds no samples; it must be at least 1")
    if ":" not in spec and spec.lower() in (*models.NAMES, *models.ALIASES):
        return (*models.make(spec, batch or 2, seq), {})
    factory = _find(spec)
    if seq is not None:
        if "seq" not in _parameters(factory):
            raise UsageError(
                f"FACTORY {spec!r} takes no 'seq'; leave out --seq, or give the function a parameter of it"
            )
        factory = partial(factory, seq=seq)
    takes_batch = "batch" in _parameters(factory)
    try:
        made = factory(batch=batch) if batch is not None and takes_batch else factory()
    except Exception as error:
        raise UsageError(f"FACTORY {spec!r} failed: {_where(error)}") from error
    model, args, kwargs = _checked(made, spec)
    if batch is not None and not takes_batch:
        args, kwargs = resize(args, kwargs, batch)
    return model, args, kwargs


def _find(spec: str) -> Callable[..., Any]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        hint = nearest(spec, models.NAMES) if not colon else ""
        raise UsageError(f"FACTORY {spec!r} names no function; write module:function or file.py:function{hint}")
    module = _from_file(place) if place.endswith(".py") else _from_name(place)
    found = getattr(module, name, None)
    if found is None:
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"FACTORY {spec!r}: {place} has no {name!r}{nearest(name, known)}")
    if not callable(found):
        raise UsageError(f"FACTORY {spec!r}: {name!r} is a {type(found).__name__}, not a function; {SHAPE}")
    result: Callable[..., Any] = found
    return result


def _from_file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"FACTORY: there is no file {place!r}{nearest(path.name, names)}")
    spec = importlib.util.spec_from_file_location(f"partita_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"FACTORY: {place!r} cannot be imported: {_where(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _from_name(place: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise UsageError(
                f"FACTORY: there is no module {place!r} here or installed; a file is written file.py:function"
            ) from None
        raise UsageError(f"FACTORY: module {place!r} cannot be imported: {_where(error)}") from error
    except Exception as error:
        raise UsageError(f"FACTORY: module {place!r} cannot be imported: {_where(error)}") from error
    finally:
        sys.path.remove(here)


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _where(error: BaseException) -> str:
    """``ValueError: … (model.py:12: x = int('a'))``: the last line of the user's own code."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if "partita/factory" not in f.filename.replace("\\", "/") and "importlib" not in f.filename
    ]
    tail = f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {error}{tail}"


def _checked(made: object, spec: str) -> Made:
    what = f"FACTORY {spec!r} returned "
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        found = f"{len(made)} values" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise UsageError(f"{what}{found}; {SHAPE}")
    model, args, kwargs = (*made, {})[:3]
    if not isinstance(model, nn.Module):
        raise UsageError(f"{what}a {type(model).__name__} as its model; {SHAPE}, with an nn.Module")
    if isinstance(args, torch.Tensor) or not isinstance(args, tuple | list):
        raise UsageError(f"{what}a {type(args).__name__} as example_args; {SHAPE}, with a tuple: (x,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UsageError(f"{what}a {type(kwargs).__name__} as example_kwargs; {SHAPE}, with a dict")
    return model, tuple(args), dict(kwargs or {})


def resize(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with ``batch`` samples: rows of every tensor whose first dim is the first tensor's, repeated or cut."""
    rows: list[int] = []

    def first(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.dim():
            rows.append(value.shape[0])
        elif isinstance(value, list | tuple):
            for item in value:
                first(item)
        elif isinstance(value, Mapping):
            for item in value.values():
                first(item)

    def change(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows[0]:
            index = torch.arange(batch, device=value.device) % rows[0]
            return value.detach()[index].requires_grad_(value.requires_grad)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(change(item) for item in value)
        if type(value) is dict:
            return {key: change(item) for key, item in value.items()}
        return value

    first((args, kwargs))
    if not rows or rows[0] == 0:
        raise UsageError("--batch needs an example call with a tensor of at least one sample; there is none")
    return change(args), change(kwargs)
