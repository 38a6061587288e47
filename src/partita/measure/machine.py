"""What the operating system grants this process: cores (affinity, cgroup quota) and memory (physical, cgroup limit)."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import psutil


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cgroup(name: str) -> str:
    """The first non-empty ``name`` of this process's cgroup (version 2), from its own directory upward."""
    own = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    folder = Path("/sys/fs/cgroup") / own.lstrip("/")
    for place in (folder, *folder.parents):
        if not str(place).startswith("/sys/fs/cgroup"):
            break
        text = _read(str(place / name))
        if text:
            return text
    return ""


def usable_cores() -> tuple[int, ...]:
    """Cores this process may run on, siblings of one physical core side by side; no more than the quota pays for."""
    try:
        cores = sorted(os.sched_getaffinity(0))
    except AttributeError:
        cores = list(range(os.cpu_count() or 1))
    quota = cpu_quota()
    where = {core: _topology(core) for core in cores}
    ordered = sorted(cores, key=lambda core: (*where[core], core))
    return tuple(ordered[: max(1, min(len(ordered), quota))])


def cpu_quota() -> int:
    """Whole cores the cgroup's CPU quota pays for, rounded up; a large number where there is none."""
    words = _cgroup("cpu.max").split()
    if len(words) == 2 and words[0] != "max":
        return max(1, math.ceil(int(words[0]) / int(words[1])))
    quota, period = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return max(1, math.ceil(int(quota) / int(period)))
    return 1 << 20


def _topology(core: int) -> tuple[int, int]:
    stem = f"/sys/devices/system/cpu/cpu{core}/topology"
    package, physical = _read(f"{stem}/physical_package_id"), _read(f"{stem}/core_id")
    return (int(package), int(physical)) if package.isdigit() and physical.isdigit() else (0, core)


def available_memory() -> int:
    """Bytes a new allocation could take now: free physical memory, or what is left under the cgroup's limit."""
    free = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    limit, used = (_read(f"/sys/fs/cgroup/memory/memory.{part}_in_bytes") for part in ("limit", "usage"))
    if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:
        free = min(free, max(0, int(limit) - int(used)))
    return free


def cpu_model() -> str:
    """The processor's name as its maker writes it."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
