"""What ``--device`` of a benchmark means: two CPU devices of this machine, or one GPU beside the host's memory.

On a GPU the same programs run other plans: on one device, what makes a model fit is recomputing, waiting in host
memory, and smaller microbatches. ``cpu:0`` takes that way on one CPU device, where it gains nothing: a trial run for
machines without a GPU. Where what was asked for is not there they say so and end well.
"""

from __future__ import annotations

import sys

import torch

from partita.cluster import Cluster
from partita.measure import local_cluster

DEVICES = ("cpu", "cpu:0", "cuda")


def skipped(device: str, what: str) -> bool:
    """Whether it is not there, which is said aloud."""
    if device != "cuda" or torch.cuda.is_available():
        return False
    why = "needs a CUDA GPU; torch.cuda.is_available() is False here"
    print(f"skipped: {what} --device {device}: {why}", file=sys.stderr)
    return True


def name_of(device: str) -> str:
    """Of the one device that is meant; '' where it is two."""
    return {"cpu": "", "cuda": "cuda:0"}.get(device, device)


def cluster_of(device: str) -> Cluster:
    """Two CPU devices, or the one that is meant."""
    name = name_of(device)
    return local_cluster([name]) if name else local_cluster(2)


def finish() -> None:
    """Wait for what a GPU still has to do: before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
