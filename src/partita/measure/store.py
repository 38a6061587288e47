"""Store: measured timings on disk, by unit, kind of device, sizes, torch version and what else ran at the time."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from partita.cluster import Cluster
from partita.cost.blocks import Block
from partita.cost.measured import VERSION, Measured
from partita.errors import UsageError
from partita.measure import cache, machine

NAME = "timings"
FORMAT = 3
MOST = 20_000


def _prefix(cluster: Cluster, sizes: Sequence[int], train: bool) -> str:
    """Neighbouring devices are part of it: they share the machine's memory."""
    kinds = ",".join(f"{d.kind}*{len(d.cores)}" for d in cluster.devices)
    where = f"{machine.cpu_model()}|{torch.__version__}|{torch.get_num_interop_threads()}"
    return f"{FORMAT}|{where}|{kinds}|{','.join(map(str, sizes))}|{'train' if train else 'infer'}"


def read(parts: Sequence[Block], cluster: Cluster, sizes: Sequence[int], train: bool = True) -> Measured:
    """What was kept of these units; empty where nothing was or it cannot be read."""
    rows = cache.read(NAME).get(_prefix(cluster, sizes, train), [])
    try:
        kept = Measured.from_json(json.dumps({"partita_measured": VERSION, "timings": rows}))
    except UsageError:
        return Measured()
    wanted = {p.signature for p in parts}
    return Measured({key: timing for key, timing in kept.timings.items() if key[0] in wanted})


def write(measured: Measured, cluster: Cluster, sizes: Sequence[int], train: bool = True) -> None:
    """Add to what is kept."""
    everything = cache.read(NAME)
    key = _prefix(cluster, sizes, train)
    try:
        old = Measured.from_json(json.dumps({"partita_measured": VERSION, "timings": everything.get(key, [])}))
    except UsageError:
        old = Measured()
    rows = json.loads(old.merged(measured).to_json())["timings"]
    cache.write(NAME, {**everything, key: rows[-MOST:]})


def forget(measured: Measured) -> None:
    """Drop what is kept of these units on these kinds of devices: the next process measures them again."""
    everything = cache.read(NAME)
    kept = {
        key: [row for row in rows if (row.get("signature"), row.get("kind")) not in measured.timings]
        for key, rows in everything.items()
    }
    if kept != everything:
        cache.write(NAME, {key: rows for key, rows in kept.items() if rows})
