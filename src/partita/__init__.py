"""partita: automatic and manual model parallelism for PyTorch. Public names only; each is defined on its own floor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from partita.cluster import Cluster, Device, Link
from partita.errors import (
    CaptureError,
    CheckpointError,
    ClusterError,
    ExecutionError,
    InfeasibleError,
    PartitaError,
    PlanError,
    UsageError,
    VerificationError,
)
from partita.plan import Batch, Plan, Predicted, Stage
from partita.trace import Trace
from partita.uncollected import uncollected

if TYPE_CHECKING:
    from partita.api import (
        ModelParallel,
        ParallelModule,
        autoparallel,
        find_plan,
        parallelize,
        sharding_rule,
        split,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "ClusterError",
    "Device",
    "ExecutionError",
    "InfeasibleError",
    "Link",
    "ModelParallel",
    "ParallelModule",
    "PartitaError",
    "Plan",
    "PlanError",
    "Predicted",
    "Stage",
    "Trace",
    "UsageError",
    "VerificationError",
    "autoparallel",
    "find_plan",
    "parallelize",
    "sharding_rule",
    "split",
    "verify",
]


def __getattr__(name: str) -> object:
    """What needs torch is imported at first use, so that plans and clusters open in a moment."""
    if name in ("adapters", "checkpoint"):
        return importlib.import_module(f"partita.{name}")
    if name in __all__:
        with uncollected():
            return getattr(importlib.import_module("partita.api"), name)
    raise AttributeError(f"module 'partita' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
