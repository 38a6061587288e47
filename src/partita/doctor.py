"""Doctor: what this installation and this machine offer, a finding a line."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass

from partita.errors import PartitaError
from partita.measure import cache, machine
from partita.units import format_bytes

OPTIONAL = {
    "jinja2": "the HTML report: pip install 'partita[report]'",
    "transformers": "the speech model of the demo: pip install 'partita[demo]'",
    "scikit-learn": "the digits of the demo: pip install 'partita[demo]'",
}
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True, slots=True)
class Finding:
    """``ok`` False: something a user may want to change, with ``next_step``."""

    what: str
    found: str
    ok: bool = True
    next_step: str = ""


def findings() -> tuple[Finding, ...]:
    """Versions, devices, memory, caches, optional packages; under ``torchrun`` the group too (and nothing on the other
    ranks, for which rank 0 speaks)."""
    import torch

    from partita.runtime.distributed import join_world, launched

    group: tuple[Finding, ...] = ()
    if launched():
        group = group_findings()
        if join_world().rank:
            return ()

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    new_enough = version >= OLDEST_TORCH
    rows = [
        Finding("python", sys.version.split()[0]),
        Finding(
            "torch", torch.__version__, new_enough, "" if new_enough else "partita needs 2.11 or newer; update torch"
        ),
    ]
    cores = machine.usable_cores()
    total = os.cpu_count() or len(cores)
    rows.append(
        Finding(
            "cpu", f"{machine.cpu_model()}, {len(cores)} of {total} cores usable, {len(cores)} devices at full speed"
        )
    )
    rows.append(Finding("memory", f"{format_bytes(machine.available_memory())} free for this process"))
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        rows.append(Finding("gpu", names))
    else:
        built = torch.version.cuda is not None
        rows.append(Finding("gpu", "none" if built else "none (this torch is built without CUDA)"))
    try:
        from partita.measure.detect import detect, summary

        rows.append(Finding("devices", summary(detect()).replace("\n", " | ")))
    except PartitaError as error:
        rows.append(Finding("devices", "none", False, str(error)))
    folder = cache.cache_dir()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    writable = os.access(nearest, os.W_OK)
    step = (
        ""
        if writable
        else "set PARTITA_CACHE to a directory you may write to, or measurements are taken again each time"
    )
    rows.append(Finding("cache", str(folder), writable, step))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        rows.append(Finding("OMP_NUM_THREADS", threads))
    for package, purpose in OPTIONAL.items():
        try:
            rows.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append(Finding(package, "not installed", False, f"needed for {purpose}"))
    return (*rows, *group)


def group_findings() -> tuple[Finding, ...]:
    """The ranks, their hosts, versions and links. Collective."""
    import torch

    from partita.measure.links import links_between
    from partita.runtime.distributed import join_world
    from partita.units import format_seconds

    world = join_world()
    hosts = list(dict.fromkeys(world.hosts))
    rows = [
        Finding("group", f"{world.size} ranks on {len(hosts)} host{'s' if len(hosts) > 1 else ''}: {', '.join(hosts)}")
    ]
    mine = {"torch": torch.__version__, "python": sys.version.split()[0], "partita": sys.modules["partita"].__version__}
    every = world.gather(mine, "the ranks' versions")
    for name, version in every[0].items():
        other = [f"rank {r} has {v[name]}" for r, v in enumerate(every) if v[name] != version]
        if other:
            advice = f"{'; '.join(other)}: install the same everywhere"
            rows.append(Finding(f"{name} on rank 0", version, False, advice))
    for (a, b), (bandwidth, latency, _, overhead) in links_between(world).items():
        text = f"{format_bytes(int(bandwidth))}/s after {format_seconds(latency)}"
        text += f", and {format_seconds(overhead)} of software a message"
        rows.append(Finding(f"rank {a} - rank {b}", text))
    return tuple(rows)
