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


def missing(device: str) -> str:
    """Why nothing can run on it; '' where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU; torch.cuda.is_available() is False here"
    return ""


def skipped(device: str, what: str) -> bool:
    """Whether it is missing, which is said aloud."""
    why = missing(device)
    if why:
        print(f"skipped: {what} --device {device}: {why}", file=sys.stderr)
    return bool(why)


def cluster_of(device: str) -> Cluster:
    """Two CPU devices, or the first one of a kind."""
    return local_cluster(2) if device == "cpu" else local_cluster(["cuda:0" if device == "cuda" else device])


def finish() -> None:
    """Wait for what a GPU still has to do: before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
