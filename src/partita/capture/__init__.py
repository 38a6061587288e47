"""Capture: a model and example inputs become a Graph."""

from partita.capture.attempt import capture
from partita.capture.captured import Captured
from partita.capture.encode import decode_symbol, resolve

__all__ = ["Captured", "capture", "decode_symbol", "resolve"]
