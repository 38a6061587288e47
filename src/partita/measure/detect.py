"""This machine as a Cluster, and what a user writes for ``devices=`` as a Cluster of this machine.

A CPU device is a group of cores that no other device shares, unless there are more devices than cores;
its memory is its share of what is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from partita import cluster_file
from partita.cluster import Cluster, Device, Link
from partita.errors import ClusterError, UsageError
from partita.measure import cache, machine, speed
from partita.strict_yaml import nearest
from partita.units import format_bytes, parse_bytes

Memory = str | int | Mapping[str, str | int] | None
FORMAT = 1
MEMORY_SHARE = 0.9
MAX_GROUPS = 4
MAX_PER_CORE = 8
_REPEATED = re.compile(r"^(\d+)\s*x\s*(cpu|cuda|gpu)$", re.IGNORECASE)


def parse(spec: int | str | Sequence[str] | Cluster, *, memory: Memory = None) -> Cluster:
    """``Cluster.parse``."""
    if isinstance(spec, str) and spec.strip().lower().endswith((".yaml", ".yml")):
        return limited(cluster_file.load(spec.strip()), memory)
    if isinstance(spec, str) and cluster_file.is_description(spec):
        return limited(cluster_file.describe(spec), memory)
    return local_cluster(spec, memory=memory)


def detect(*, refresh: bool = False) -> Cluster:
    """``Cluster.detect``: every GPU, and the CPU cores in up to four equal groups."""
    cores = len(machine.usable_cores())
    names = [f"cuda:{i}" for i in range(_num_cuda())] + [f"cpu:{i}" for i in range(min(cores, MAX_GROUPS))]
    return _build(names, refresh)


def local_cluster(devices: int | str | Sequence[str] | Cluster, memory: Memory = None) -> Cluster:
    """Devices of this machine: ``2`` or ``"2"`` (of the best kind), ``"auto"``, ``"cpu,cpu"``, ``["cpu:0", "cuda:1"]``.

    ``memory``: the limit of each device, ``"2GiB"``, or of some, ``{"cpu:0": "2GiB"}``.
    Raises ClusterError where a device is not there, and lists what is.
    """
    if isinstance(devices, Cluster):
        return limited(devices, memory)
    return limited(_build(_names(devices), False), memory)


def limited(cluster: Cluster, memory: Memory) -> Cluster:
    """The cluster with ``memory`` in place of what its devices have. Raises UsageError for a device it has not."""
    if memory is None:
        return cluster
    names = tuple(d.name for d in cluster.devices)
    if isinstance(memory, Mapping):
        for name in memory:
            if name not in names:
                raise UsageError(
                    f"memory= names a device {name!r} that is not used{nearest(str(name), names)}; "
                    f"devices: {', '.join(names)}"
                )
        limits = {name: parse_bytes(amount) for name, amount in memory.items()}
    else:
        limits = dict.fromkeys(names, parse_bytes(memory))
    for name, limit in limits.items():
        if limit <= 0:
            raise UsageError(f"memory= gives {name} nothing; a device needs memory to run anything")
    kept = (replace(d, memory_bytes=limits.get(d.name, d.memory_bytes)) for d in cluster.devices)
    return replace(cluster, devices=tuple(kept))


def _num_cuda() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _present() -> str:
    cores = len(machine.usable_cores())
    gpus = _num_cuda()
    cuda = ", ".join(f"cuda:{i}" for i in range(gpus))
    if not cuda:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        cuda = "no CUDA GPU" if built else "no CUDA GPU (this torch is built without CUDA)"
    return f"this machine has {cores} CPU core{'s' if cores != 1 else ''} and {cuda}"


def _names(devices: int | str | Sequence[str]) -> list[str]:
    """The user's words as names, each device once."""
    if isinstance(devices, bool) or not isinstance(devices, int | str | Sequence):
        raise ClusterError(f"devices={devices!r} names no devices; write for example 2, 'auto' or ['cpu', 'cpu']")
    if isinstance(devices, str):
        text = devices.strip()
        if text.isdecimal():
            devices = int(text)
        elif text.lower() in ("auto", ""):
            cuda = _num_cuda()
            return [f"cuda:{i}" for i in range(cuda)] or [
                f"cpu:{i}" for i in range(min(len(machine.usable_cores()), MAX_GROUPS))
            ]
        else:
            devices = [part.strip() for part in text.split(",") if part.strip()]
    if isinstance(devices, int):
        if devices < 1:
            raise ClusterError(f"devices={devices} leaves nothing to run on; it must be at least 1")
        kind = "cuda" if 0 < devices <= _num_cuda() else "cpu"
        return [f"{kind}:{i}" for i in range(devices)]
    words: list[str] = []
    for word in devices:
        repeated = _REPEATED.match(word.strip()) if isinstance(word, str) else None
        words += [repeated.group(2).lower()] * int(repeated.group(1)) if repeated else [str(word).strip()]
    if not words:
        raise ClusterError("devices=[] leaves nothing to run on; name at least one, for example ['cpu']")
    return _number(words)


def _number(words: Sequence[str]) -> list[str]:
    """``["cpu", "cpu"]`` -> ``["cpu:0", "cpu:1"]``; numbers a word already has are kept."""
    words = ["cuda" + w[3:] if w.lower().startswith("gpu") else w.lower() for w in words]
    taken = {w for w in words if ":" in w}
    names: list[str] = []
    for word in words:
        kind, colon, index = word.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not index.isdecimal()):
            hint = nearest(kind, ("cpu", "cuda")) or ""
            raise ClusterError(
                f"there is no device {word!r}{hint}; {_present()}; to plan for devices that are not here, describe "
                f"them: devices='8xH100'"
            )
        if not colon:
            word = next(f"{kind}:{i}" for i in range(len(words) + 1) if f"{kind}:{i}" not in taken)
            taken.add(word)
        if word in names:
            raise ClusterError(f"device {word!r} is named twice; each device takes part once")
        names.append(word)
    return names


def _build(names: Sequence[str], refresh: bool) -> Cluster:
    """Descriptions of named devices; cores are dealt out in order among the CPU devices named, shared if too few."""
    cores = machine.usable_cores()
    groups = [name for name in names if name.startswith("cpu")]
    most = MAX_PER_CORE * len(cores)
    for name in names:
        index = int(name.partition(":")[2])
        if name.startswith("cuda") and index >= _num_cuda() or name.startswith("cpu") and index >= most:
            limit = (
                f" (cpu:0 to cpu:{most - 1}, {MAX_PER_CORE} devices a core at most)" if name.startswith("cpu") else ""
            )
            raise ClusterError(
                f"there is no device {name!r}; {_present()}{limit}; to plan for devices that are not here, describe "
                f"them: devices='{len(names)}x{'H100' if name.startswith('cuda') else 'CPU'}' in find_plan"
            )
    figures = _figures(sum(name.startswith("cuda") for name in names), len(cores), refresh)
    share = int(machine.available_memory() * MEMORY_SHARE) // max(1, len(groups))
    share -= share % 2**20
    devices: list[Device] = []
    links: list[Link] = []
    for name in names:
        if name.startswith("cuda"):
            devices.append(_cuda_device(name, figures))
        else:
            at = groups.index(name)
            own = cores[at * len(cores) // len(groups) : (at + 1) * len(cores) // len(groups)]
            crowd = 1.0
            if len(groups) > len(cores):
                own, crowd = (cores[at % len(cores)],), len(groups) / len(cores)
            devices.append(_cpu_device(name, own, share, figures, len(cores), crowd))
    if groups:
        links.append(Link("cpu:*", "cpu:*", _round(figures["bandwidth"]), _round(figures["handover"])))
    for i, name in enumerate(names):
        if name.startswith("cuda"):
            links.append(Link("cpu:*", name, _round(figures[f"{name}.host"]), _round(figures["handover"] + 1e-5)))
            links += [
                Link(other, name, _round(_between(other, name, figures)), 1e-5)
                for other in names[:i]
                if other.startswith("cuda")
            ]
    return Cluster(tuple(devices), tuple(links))


def describe_rank(name: str, local_rank: int, local_size: int) -> Device:
    """This process's device as one of ``local_size`` of its host: its GPU, or its share of the cores."""
    cores = machine.usable_cores()
    figures = _figures(int(name.startswith("cuda")), len(cores), False)
    if name.startswith("cuda"):
        here = torch.cuda.current_device()
        return replace(_cuda_device(f"cuda:{here}", figures), name=name)
    share = int(machine.available_memory() * MEMORY_SHARE) // local_size
    own, crowd = cores, 1.0
    if len(cores) > local_size:
        own = cores[local_rank * len(cores) // local_size : (local_rank + 1) * len(cores) // local_size]
    elif local_size > 1:
        own, crowd = (cores[local_rank % len(cores)],), local_size / len(cores)
    return _cpu_device(name, own, share - share % 2**20, figures, len(cores), crowd)


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _cpu_device(
    name: str, own: tuple[int, ...], memory: int, figures: Mapping[str, float], total: int, crowd: float
) -> Device:
    """``crowd``: devices that share each core."""
    bandwidth = min(figures["bandwidth"] * len(own), figures["all_bandwidth"] * len(own) / total)
    return Device(
        name=name,
        kind=f"{len(own)}x {machine.cpu_model()}",
        memory_bytes=memory,
        flops=_round(figures["flops"] * len(own) / crowd),
        memory_bandwidth=_round(bandwidth / crowd),
        cores=own,
        overhead_seconds=_round(figures["overhead"]),
    )


def _cuda_device(name: str, figures: Mapping[str, float]) -> Device:
    index = int(name.partition(":")[2])
    free, _ = torch.cuda.mem_get_info(index)
    memory = int(free * MEMORY_SHARE)
    return Device(
        name=name,
        kind=torch.cuda.get_device_name(index),
        memory_bytes=memory - memory % 2**20,
        flops=_round(figures[f"{name}.flops"]),
        memory_bandwidth=_round(figures[f"{name}.bandwidth"]),
        host_bandwidth=_round(figures[f"{name}.host"]),
    )


def _between(a: str, b: str, figures: Mapping[str, float]) -> float:
    return figures.get(f"{a}-{b}") or figures[f"{b}-{a}"]


def _figures(cuda: int, cores: int, refresh: bool) -> dict[str, float]:
    """Measured numbers of this machine, from disk where the same machine and torch were measured before."""
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(_num_cuda()))
    key = f"{FORMAT}|{machine.cpu_model()}|{cores}|{torch.__version__}|{'|'.join(gpus)}"
    kept = {} if refresh else cache.read("machine").get(key, {})
    figures = {name: float(value) for name, value in kept.items()}
    if "flops" not in figures:
        figures |= speed.core_speed()
        figures["all_bandwidth"] = speed.all_cores_bandwidth(cores)
        figures["handover"] = speed.handover_seconds()
    if cuda and "cuda:0.flops" not in figures:
        for i in range(len(gpus)):
            figures |= {f"cuda:{i}.{name}": value for name, value in speed.cuda_speed(i).items()}
            figures |= {f"cuda:{j}-cuda:{i}": speed.cuda_link(j, i) for j in range(i)}
    if figures != kept:
        cache.write("machine", {**cache.read("machine"), key: figures})
    return figures


def summary(cluster: Cluster) -> str:
    """A line a device."""
    return "\n".join(
        f"{d.name}: {d.kind}, {format_bytes(d.memory_bytes)}, {d.flops / 1e9:.3g} Gflop/s, "
        f"{d.memory_bandwidth / 1e9:.3g} GB/s" + (f", cores {','.join(map(str, d.cores))}" if d.cores else "")
        for d in cluster.devices
    )
