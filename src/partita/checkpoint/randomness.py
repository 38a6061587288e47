"""Randomness: the states of torch's, Python's and NumPy's generators as plain values, and back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def states() -> dict[str, Any]:
    """The generators of this process; CUDA's where it is in use, NumPy's where it is imported."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), *rest]
    return found


def restore(found: dict[str, Any]) -> None:
    """Put the generators back; those of CUDA devices that are not here are left out."""
    torch.set_rng_state(found["torch"])
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in found and torch.cuda.is_available():
        for device, state in enumerate(found["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    if "numpy" in found:
        import numpy

        kind, keys, *rest = found["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
