"""Where in the user's code an op comes from."""

from __future__ import annotations

import inspect
import linecache
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

TORCH = str(Path(torch.__file__).parent) + "/"
_PARTITA = str(Path(__file__).parent.parent) + "/"
_CHECKPOINT = str(Path(torch.__file__).parent / "utils" / "checkpoint.py")
_STDLIB = str(Path(linecache.__file__).parent) + "/"
UNKNOWN = "an unknown line"


@lru_cache(maxsize=4096)
def _foreign(filename: str) -> bool:
    """Torch's, ours, or Python's own: not the user's."""
    if filename.startswith((TORCH, _PARTITA, "<frozen", "<string", "<eval_with_key")):
        return True
    return filename.startswith(_STDLIB) and "site-packages" not in filename


@lru_cache(maxsize=65536)
def _line(filename: str, number: int) -> str:
    code = linecache.getline(filename, number).strip()
    return f"{filename}:{number}: {code}" if code else f"{filename}:{number}"


def user_line() -> str:
    """The innermost line on the stack that is neither torch's nor partita's: ``file.py:12: y = f(x)``."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _foreign(frame.f_code.co_filename):
            return _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def checkpointing_module() -> str | None:
    """The path of the module whose forward called ``torch.utils.checkpoint.checkpoint`` around here (the outermost such
    call; ``''``: the model's own forward); None where nothing around will be run again in backward."""
    frame, found, inside = sys._getframe(1), None, False
    while frame is not None:
        code = frame.f_code
        if code.co_name == "checkpoint" and code.co_filename == _CHECKPOINT:
            found, inside = "", True
        elif inside and code.co_name == "module_call" and code.co_filename.startswith(_PARTITA):
            found, inside = frame.f_locals["path"] or "", False
        frame = frame.f_back  # type: ignore[assignment]
    return found


def line_of(error: BaseException) -> str:
    """The innermost user's line an error passed through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if not _foreign(trace.tb_frame.f_code.co_filename):
            found = _line(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found or UNKNOWN


def place_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module of the model that an error passed through, and the innermost user's line:
    `` in module 'head' (Linear) at file.py:12: y = f(x)``; what is not known is left out."""
    paths = {id(module): path for path, module in model.named_modules()}
    inside, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name == "forward" and paths.get(id(owner)):
            inside = f" in module '{paths[id(owner)]}' ({type(owner).__name__})"
        trace = trace.tb_next
    line = line_of(error)
    return inside + (f" at {line}" if line != UNKNOWN else "")


def line_of_forward(module: nn.Module) -> str:
    """Where the module's forward begins."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return _line(code.co_filename, code.co_firstlineno) if code is not None else type(module).__name__


def methods_on_stack(paths: dict[int, str], module: str) -> tuple[str, ...]:
    """Methods of the current module between its forward and here, innermost first: ``blocks.0.route()``."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None:
        code, owner = frame.f_code, frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)) == module:
            if code.co_name == "forward":
                return tuple(found)
            method = getattr(type(owner), code.co_name, None)
            mine = inspect.isfunction(method) and inspect.unwrap(method).__code__ is code
            if mine and not code.co_filename.startswith(TORCH):
                found.append(f"{module}.{code.co_name}()" if module else f"{code.co_name}()")
        frame = frame.f_back  # type: ignore[assignment]
    return ()
