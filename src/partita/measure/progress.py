"""A progress bar on the error stream that shows itself only where something takes over a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each of ``total`` parts. Nothing is shown where nobody watches."""
    began = time.perf_counter()
    bar: Progress | None = None

    def advance() -> None:
        if bar is not None:
            if not bar.live.is_started and time.perf_counter() - began > 1.0:
                bar.start()
            bar.advance(task)

    if show and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True), transient=True)
        task = bar.add_task(title, total=total)
    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
