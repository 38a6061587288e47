"""As one: whether all CPU cores should rather work on every op together than on parts of their own.

A plan whose parts cannot all be busy (no microbatches, statistics of the whole batch) leaves cores idle; PyTorch's own
threads over one united device then take less time. That is no division of the model, so it must be clearly faster.
"""

from __future__ import annotations

from dataclasses import replace

from partita.cluster import Cluster
from partita.plan import Plan
from partita.units import format_seconds

BUSY_ENOUGH = 0.93
CLEARLY = 0.95


def worth_asking(divided: Plan, cluster: Cluster) -> bool:
    """False where the divided plan already keeps (nearly) every device busy."""
    predicted = divided.predicted
    if predicted is None or not predicted.step_seconds:
        return False
    return predicted.one_device_seconds / predicted.step_seconds < BUSY_ENOUGH * len(cluster.devices)


def better(divided: Plan, united: Plan) -> Plan:
    """The one that is predicted to be faster, with what the other would take among its reasons."""
    assert divided.predicted is not None and united.predicted is not None
    apart, together = divided.predicted.step_seconds, united.predicted.step_seconds
    if together >= CLEARLY * apart:
        said = f"all cores as one device: {format_seconds(together)} ({together / apart - 1:+.1%}), not clearly faster"
        return replace(divided, reasons=(*divided.reasons, said))
    alone = divided.predicted.one_device_seconds
    reasons = (
        f"all cores work on every op, as one device, by PyTorch's own threads: {format_seconds(together)} a step, "
        f"{alone / together:.2f}x one device alone ({format_seconds(alone)})",
        f"next best: divided into {len(divided.stages)} stage{'s' if len(divided.stages) > 1 else ''} of "
        f"{len(divided.stages[0].devices)} device{'s' if len(divided.stages[0].devices) > 1 else ''}: "
        f"{format_seconds(apart)} ({apart / together - 1:+.1%})",
        *(r for r in divided.reasons if "whole batch" in r or "cannot be cut" in r),
        *(r for r in united.reasons if "compiled" in r),
    )
    predicted = replace(united.predicted, one_device_seconds=alone)
    return replace(united, devices=divided.devices, predicted=predicted, reasons=reasons)
