"""The demonstration: three models trained on data any machine has, divided, checked against the unsplit and timed."""

from __future__ import annotations

from partita.demo.run import main

__all__ = ["main"]
