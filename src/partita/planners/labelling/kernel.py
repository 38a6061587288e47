"""Loops over flat arrays: compiled by numba where it is installed (extra ``search``), plain Python elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

Loop = TypeVar("Loop", bound=Callable[..., object])

try:
    import numba
except ImportError:  # the same loops, slower by two orders of magnitude
    COMPILED = False

    def kernel(loop: Loop) -> Loop:
        return loop

else:
    COMPILED = True

    def kernel(loop: Loop) -> Loop:
        """``loop`` as machine code, kept on disk, run without the interpreter's lock."""
        return cast(Loop, numba.njit(cache=True, nogil=True)(loop))
