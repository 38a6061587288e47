"""Keep freed memory in the process: large activations are given back and asked for again at every step.

glibc hands blocks above 32 MiB (often much less) to the system as soon as they are freed, so each step's activations
and gradients are mapped, zeroed page by page and unmapped again, and the threads of a process wait for each other at
its one memory map. Told to keep them, glibc serves the next step from its own heap. Linux with glibc only; elsewhere
nothing changes. The environment variable ``PARTITA_KEEP_MEMORY=0`` leaves the allocator alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Once a process; True where the allocator took it."""
    if not sys.platform.startswith("linux") or os.environ.get("PARTITA_KEEP_MEMORY", "1") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_TRIM_THRESHOLD, _LARGE))
