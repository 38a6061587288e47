"""Cluster: devices and the links between them, as numbers. A description needs no hardware.

``parse`` reads ``2``, ``"cpu:0,cpu:1"``, ``"2xCPU"``, ``"8xA100-80GB + 16xV100-16GB"``; presets carry the public
source of each figure (``cluster_presets.py``). What this machine has is found by ``measure.detect``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from os import PathLike


@dataclass(frozen=True, slots=True)
class Device:
    """``name`` as torch would spell it (``cpu:0`` is a group of CPU cores); ``kind``: devices of one kind are alike.

    ``memory_bytes``: what a plan may use. ``flops``: float32 operations per second a large matrix product reaches.
    ``memory_bandwidth``: bytes per second. ``cores``: of a CPU group. ``overhead_seconds``: floor of one op.
    ``half_flops``: peak operations per second in 16 bits, products summed in 32 (0: no faster than float32).
    ``host_bandwidth``: bytes per second between its memory and its host's, each way (0: one memory, or not known).
    """

    name: str
    kind: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    cores: tuple[int, ...] = ()
    overhead_seconds: float = 5e-6
    node: int = 0
    half_flops: float = 0.0
    host_bandwidth: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """Between two devices, either way: ``message_seconds + bytes / bandwidth`` for one transfer.

    ``latency_seconds``: of the link itself. ``overhead_seconds``: what the ends' software adds to each message.
    ``host_bandwidth``: bytes per second that an end's own cores hand over or take, where they do the moving (sockets):
    time that their computing goes without; infinite where something else moves the data. An end that stops in '*' means
    every device whose name begins so: ``node0/*``, ``*``.
    """

    source: str
    target: str
    bandwidth: float
    latency_seconds: float
    host_bandwidth: float = inf
    overhead_seconds: float = 0.0

    @property
    def message_seconds(self) -> float:
        """What each message takes besides its bytes."""
        return self.latency_seconds + self.overhead_seconds


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices in order and their links; the most specific link wins, later over earlier."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    def device(self, name: str) -> Device:
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)

    def link(self, source: str, target: str) -> Link:
        best, rank = Link(source, target, float("inf"), 0.0), -1
        for link in self.links:
            for a, b in ((link.source, link.target), (link.target, link.source)):
                if _matches(a, source) and _matches(b, target):
                    specific = _literal(a) + _literal(b)
                    if specific >= rank:
                        best, rank = link, specific
        return best

    def transfer_seconds(self, source: str, target: str, nbytes: float) -> float:
        """Seconds for one message; 0 within one device."""
        if source == target:
            return 0.0
        link = self.link(source, target)
        return link.message_seconds + nbytes / link.bandwidth

    @staticmethod
    def detect(*, refresh: bool = False) -> Cluster:
        """This machine: groups of CPU cores, GPUs, measured speeds (kept on disk; ``refresh`` measures again)."""
        from partita.measure.detect import detect

        return detect(refresh=refresh)

    @staticmethod
    def parse(
        spec: int | str | Sequence[str] | Cluster, *, memory: str | int | Mapping[str, str | int] | None = None
    ) -> Cluster:
        """A description (``"2x8xH100"``), a file (``"cluster.yaml"``), or devices of this machine (``2``, ``"auto"``,
        ``["cpu", "cpu"]``, ``"cuda:0,cuda:1"``), with ``memory`` as the limit per device."""
        from partita import cluster_file

        if isinstance(spec, str) and memory is None and cluster_file.reads(spec):
            return cluster_file.describe(spec)
        from partita.measure.detect import parse

        return parse(spec, memory=memory)

    @staticmethod
    def load(path: str | PathLike[str]) -> Cluster:
        """Read a cluster file. Raises ClusterError naming every mistake with its line."""
        from partita import cluster_file

        return cluster_file.load(path)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cluster as YAML. Raises UsageError where that is not possible."""
        from partita import cluster_file

        cluster_file.save(self, path)


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _literal(pattern: str) -> int:
    """How specific a pattern is: a whole name before any beginning, a longer beginning before a shorter one."""
    return len(pattern) - 1 if pattern.endswith("*") else 10_000
