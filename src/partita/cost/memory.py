"""Memory of one device: parameters, gradients, optimizer state, activations in flight, buffers; closed forms.

Devices that share a memory (groups of CPU cores) hold a replicated parameter once, with its owner, the stage's first
device; every replica has its own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from partita.errors import UsageError

Bytes = TypeVar("Bytes", float, NDArray[np.float64])

OPTIMIZER_STATE = MappingProxyType(
    {"none": 0, "sgd": 0, "momentum": 1, "sgd_momentum": 1, "adagrad": 1, "rmsprop": 1, "lion": 1, "adam": 2,
     "adamw": 2, "nadam": 2, "radam": 2, "adamax": 2}
)  # fmt: skip
"""Optimizer's name -> its state as a multiple of the trained parameters' bytes."""


def optimizer_factor(name: str) -> int:
    """Raises UsageError for an optimizer without a known state."""
    key = name.lower()
    if key not in OPTIMIZER_STATE:
        raise UsageError(f"optimizer {name!r} has no known memory need; take one of {', '.join(OPTIMIZER_STATE)}")
    return OPTIMIZER_STATE[key]


ADAM_ON_HOST = 1.39 / 4e9
"""Seconds a byte of float32 parameters that PyTorch's Adam takes on the host: 1.39 s for 1e9 of them (Ren et al.,
"ZeRO-Offload", USENIX ATC 2021, table 4: two Xeon 8168)."""


def host_update(optimizer: str) -> float:
    """Seconds a trained byte that the optimizer takes on the host, by the memory it reads and writes: parameter,
    gradient and each state read, all but the gradient written."""
    if optimizer.lower() == "none":
        return 0.0
    return ADAM_ON_HOST * (3 + 2 * optimizer_factor(optimizer)) / 7


def static_bytes(parameters: float, trained: float, *, optimizer: str, train: bool = True, owner: bool = True) -> float:
    """What stays for the whole step: ``parameters`` (buffers too) + gradients + state of the ``trained`` part.

    A replica that shares its owner's memory holds gradients only.
    """
    gradients = trained if train else 0.0
    if not owner:
        return gradients
    return parameters + gradients + (optimizer_factor(optimizer) * trained if train else 0.0)


def in_flight(
    schedule: str, *, microbatches: int, replicas: int, devices_after: int, devices: int, joined: bool
) -> int:
    """Microbatches one device of a stage holds at the peak. ``microbatches``: of that device; ``devices_after``: used
    by this stage and all later ones; ``devices``: by all stages. Exact for gpipe and 1f1b with one stage a device.
    """
    if joined or schedule == "gpipe":
        return microbatches
    reach = devices if schedule == "zero_bubble" else devices_after
    return max(1, min(microbatches, ceil(reach / replicas - 1e-9)))


@dataclass(frozen=True, slots=True)
class Alive:
    """Microbatches that one device of a stage holds at once: ``before`` their backward, ``behind`` it, where weight
    gradients are ``put_off``."""

    before: int
    behind: int = 0
    put_off: bool = False

    def peak(self, held: Bytes, owed: Bytes, *, again: bool = False) -> Bytes:
        """Bytes at the worst moment. ``held``: of a microbatch from forward to backward; ``owed``: from there to its
        weight gradients. ``again``: parts are recomputed, so that what is owed was not held before (an upper bound).
        """
        if not self.put_off:
            return self.before * held
        more = owed if again else np.maximum(owed - held, 0.0)
        return self.before * held + self.behind * owed + more


def alive(schedule: str, *, microbatches: int, replicas: int, devices_after: int, devices: int, joined: bool) -> Alive:
    """As ``in_flight``, told apart by what is kept of them. In zero_bubble a stage has as many before their backward as
    in 1f1b, and others that wait for W.
    """
    most = in_flight(
        schedule, microbatches=microbatches, replicas=replicas, devices_after=devices_after, devices=devices,
        joined=joined,
    )  # fmt: skip
    if schedule != "zero_bubble":
        return Alive(most)
    before = most if joined else max(1, min(most, ceil(devices_after / replicas - 1e-9)))
    return Alive(before, most - before, True)


def shares_memory(device: str) -> bool:
    """Whether devices named like this live in one memory: CPU core groups (``cpu:0``) do."""
    return device.partition(":")[0] == "cpu"
