"""Importing without garbage collection: thousands of small objects are made, none of which goes away again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collection rests inside, and works afterwards if it did before. A fifth of the time of a large import."""
    worked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if worked:
            gc.enable()
