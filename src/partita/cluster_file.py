"""Cluster descriptions as text: ``2x8xH100`` read into devices and links, and YAML files both ways."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from math import inf
from typing import Any

import msgspec

from partita.cluster import Cluster, Device, Link
from partita.cluster_presets import ALIASES, FABRICS, NETWORKS, PRESETS, Preset
from partita.errors import ClusterError, UsageError
from partita.strict_yaml import Flow, FlowList, Reader, dump, nearest, read_text, write_text
from partita.units import parse_bytes

VERSION = 1
FABRIC_LATENCY = 10e-6
NETWORK_LATENCY = 30e-6
_TERM = re.compile(
    r"^(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z][A-Za-z0-9]*(?:-\d+GB)?)((?:\s*@\s*[A-Za-z0-9-]+)*)$",
    re.IGNORECASE,
)
_PREFIX = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12}
_SECONDS = {"s": 0, "ms": -3, "us": -6, "ns": -9}


@dataclass(frozen=True, slots=True)
class _Node:
    per_node: int
    kind: str
    preset: Preset
    fabric_latency: float
    network_latency: float


def describe(spec: str) -> Cluster:
    """``"8xH100"``: one node; ``"2x8xH100"``: two; ``"8xA100-80GB + 16xV100-16GB"``: one node of each.

    ``"4x8xA100@PCIE4@ETHERNET-25G"``: with these links inside and between the nodes. In one node devices are called
    as torch calls them there (``cuda:0``), in several ``node1/cuda:0``.
    """
    nodes: list[_Node] = []
    for term in spec.split("+"):
        match = _TERM.match(term.strip())
        if match is None:
            raise ClusterError(
                f"cannot read {term.strip()!r} in the cluster {spec!r}; write for example '8xH100', '2x8xH100' or "
                f"'8xA100-80GB + 16xV100-16GB'"
            )
        first, second, kind, links = match.groups()
        count, per_node = (int(first), int(second)) if second else (1, int(first or 1))
        if count < 1 or per_node < 1:
            raise ClusterError(f"{term.strip()!r} in the cluster {spec!r} has no devices; counts start at 1")
        node = _Node(per_node, _name(kind), _preset(kind, spec), FABRIC_LATENCY, NETWORK_LATENCY)
        nodes += [_linked(node, links, spec)] * count
    return _joined(nodes)


def _linked(node: _Node, links: str, spec: str) -> _Node:
    """The node with the links named after '@'."""
    for name in filter(None, (part.strip().upper() for part in links.split("@"))):
        if name in NETWORKS:
            network = NETWORKS[name]
            node = replace(
                node,
                preset=replace(node.preset, network=network.bandwidth),
                network_latency=network.latency_seconds,
            )
        elif name in FABRICS:
            fabric = FABRICS[name]
            node = replace(
                node, preset=replace(node.preset, fabric=fabric.bandwidth), fabric_latency=fabric.latency_seconds
            )
        else:
            known = (*FABRICS, *NETWORKS)
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise ClusterError(f"no figures for a link called {name!r} in the cluster {spec!r}{hint}")
    return node


def _joined(nodes: Sequence[_Node]) -> Cluster:
    """Devices of all nodes; a link inside each, one between all, and one between faster ones where they differ."""
    devices: list[Device] = []
    slowest = min(n.preset.network for n in nodes)
    links = [Link("*", "*", slowest, max(n.network_latency for n in nodes))]
    faster: list[int] = []
    for index, node in enumerate(nodes):
        preset = node.preset
        stem = f"node{index}/{preset.prefix}:" if len(nodes) > 1 else f"{preset.prefix}:"
        devices += [
            Device(
                name=f"{stem}{i}",
                kind=node.kind,
                memory_bytes=preset.memory_bytes,
                flops=preset.flops,
                memory_bandwidth=preset.memory_bandwidth,
                overhead_seconds=preset.overhead_seconds,
                node=index,
                half_flops=preset.half_flops,
                host_bandwidth=preset.host,
            )
            for i in range(node.per_node)
        ]
        links.append(Link(f"{stem}*", f"{stem}*", preset.fabric, node.fabric_latency))
        if preset.network != slowest:
            links += [
                Link(f"{stem}*", f"node{other}/*", min(preset.network, nodes[other].preset.network),
                     max(node.network_latency, nodes[other].network_latency))
                for other in faster
            ]  # fmt: skip
            faster.append(index)
    return Cluster(tuple(devices), tuple(links))


def _name(kind: str) -> str:
    upper = kind.upper()
    return ALIASES.get(upper, upper)


def _preset(kind: str, spec: str) -> Preset:
    name = _name(kind)
    if name in PRESETS:
        return PRESETS[name]
    base, _, memory = name.rpartition("-")
    base = ALIASES.get(base, base)
    if memory.endswith("GB") and base in PRESETS:
        return replace(PRESETS[base], memory_bytes=parse_bytes(memory))
    known = (*PRESETS, *ALIASES)
    hint = nearest(name, known) or f"; known: {', '.join(PRESETS)}"
    raise ClusterError(f"no figures for a device called {kind!r} in the cluster {spec!r}{hint}")


def is_description(spec: str) -> bool:
    """True for text that names kinds of devices rather than devices of this machine."""
    terms = [term.strip() for term in spec.split("+")]
    if "," in spec or ":" in spec or spec.strip().lower() in ("auto", "cpu", "cuda", "gpu"):
        return False
    return not all(term.isdecimal() for term in terms)


def reads(spec: str) -> bool:
    """True for text in the form of a description that names a known kind first."""
    terms = [_TERM.match(term.strip()) for term in spec.split("+")]
    kinds = [_name(match.group(3)).partition("-")[0] for match in terms if match is not None]
    known = {name.partition("-")[0] for name in PRESETS}
    return len(kinds) == len(terms) and all(kind in known for kind in kinds) and any(c in spec for c in "xX+@")


class _Device(msgspec.Struct):
    name: str
    memory: str
    flops: str
    memory_bandwidth: str
    kind: str = ""
    cores: tuple[int, ...] = ()
    overhead: str = "5us"
    node: int = 0
    half_flops: str = "0"
    host_bandwidth: str = "0"


class _Link(msgspec.Struct):
    between: tuple[str, str]
    bandwidth: str
    latency: str = "0s"
    host: str = ""
    overhead: str = "0s"


class _File(msgspec.Struct):
    partita_cluster: str
    devices: tuple[_Device, ...]
    links: tuple[_Link, ...] = ()


def loads(text: str, source: str = "the cluster") -> Cluster:
    """The Cluster a YAML text describes. Raises ClusterError naming every mistake with its line."""
    reader = Reader(text, source)
    tree = reader.tree
    if not isinstance(tree, dict):
        raise ClusterError(f"{source} is not a cluster: it should begin with 'partita_cluster: {VERSION}'")
    version = tree.get("partita_cluster")
    if version is not None and version != str(VERSION):
        raise ClusterError(f"{source}: this is a cluster file of version {version!r}; this partita reads {VERSION}")
    file = reader.fill(_File, tree)
    devices: list[Device] = []
    links: list[Link] = []
    for i, entry in enumerate(file.devices if file else ()):
        at = ("devices", i)
        devices.append(
            Device(
                name=entry.name,
                kind=entry.kind or entry.name,
                memory_bytes=int(_amount(reader, (*at, "memory"), entry.memory, "memory")),
                flops=_amount(reader, (*at, "flops"), entry.flops, "flop/s"),
                memory_bandwidth=_amount(reader, (*at, "memory_bandwidth"), entry.memory_bandwidth, "B/s"),
                cores=entry.cores,
                overhead_seconds=_amount(reader, (*at, "overhead"), entry.overhead, "seconds", zero=True),
                node=entry.node,
                half_flops=_amount(reader, (*at, "half_flops"), entry.half_flops, "flop/s", zero=True),
                host_bandwidth=_amount(reader, (*at, "host_bandwidth"), entry.host_bandwidth, "B/s", zero=True),
            )
        )
        if any(d.name == entry.name for d in devices[:-1]):
            reader.problem((*at, "name"), f"a second device called {entry.name!r}; names must differ")
    for i, line in enumerate(file.links if file else ()):
        bandwidth = _amount(reader, ("links", i, "bandwidth"), line.bandwidth, "B/s")
        latency = _amount(reader, ("links", i, "latency"), line.latency, "seconds", zero=True)
        host = _amount(reader, ("links", i, "host"), line.host, "B/s") if line.host else inf
        overhead = _amount(reader, ("links", i, "overhead"), line.overhead, "seconds", zero=True)
        links.append(Link(*line.between, bandwidth, latency, host, overhead))
    if file is not None and not devices:
        reader.problem(("devices",), "a cluster needs at least one device")
    if reader.problems:
        lines = "".join(f"\n  - {p}" for p in reader.sorted_problems())
        raise ClusterError(f"{source} cannot be used as a cluster:{lines}")
    return Cluster(tuple(devices), tuple(links))


def _amount(reader: Reader, path: tuple[str | int, ...], text: str, unit: str, zero: bool = False) -> float:
    """A positive amount with its unit; a problem is noted, and 1 returned, where it is not one."""
    try:
        value = float(parse_bytes(text)) if unit == "memory" else parse_amount(text, unit)
    except UsageError as error:
        reader.problem(path, str(error))
        return 1.0
    if value < 0 or (value == 0 and not zero) or value in (float("inf"),):
        reader.problem(path, f"must be {'at least 0' if zero else 'more than 0'} and finite, found {text!r}")
        return 1.0
    return value


def parse_amount(text: str, unit: str) -> float:
    """``("19.5 Tflop/s", "flop/s")`` -> 1.95e13; ``("20us", "seconds")`` -> 2e-5; a bare number is in base units."""
    match = re.match(r"^\s*([0-9][0-9.eE+-]*?)\s*([a-zA-Z/]*)\s*$", text)
    example = {"flop/s": "60 Gflop/s", "B/s": "20 GB/s", "seconds": "20us"}[unit]
    refusal = UsageError(
        f"{text!r} is not {'a time' if unit == 'seconds' else 'a rate'}; write for example '{example}'"
    )
    if match is None:
        raise refusal
    number, suffix = match.groups()
    table = _SECONDS if unit == "seconds" else _PREFIX
    stem = suffix if unit == "seconds" else suffix.removesuffix(unit)
    if suffix and stem not in table:
        raise refusal
    try:
        return float(Decimal(number).scaleb(table[stem] if suffix else 0))
    except (InvalidOperation, OverflowError):
        raise refusal from None


def _spell(value: float, unit: str) -> str:
    """The shortest text ``parse_amount`` reads back exactly."""
    table = _SECONDS.items() if unit == "seconds" else reversed(_PREFIX.items())
    for prefix, power in table:
        if value >= 10.0**power:
            text = f"{value / 10.0**power:.6g}{prefix if unit == 'seconds' else f' {prefix}{unit}'}"
            return text if parse_amount(text, unit) == value else repr(value)
    return repr(value)


def memory_text(count: int) -> str:
    """Exactly: '12288MiB', or bytes where it is not whole."""
    for suffix, scale in (("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("KiB", 2**10)):
        if count >= scale and count % scale == 0:
            return f"{count // scale}{suffix}"
    return str(count)


def dumps(cluster: Cluster) -> str:
    """The cluster as YAML; ``loads`` gives it back exactly."""
    devices = []
    for device in cluster.devices:
        entry = Flow(
            name=device.name,
            kind=device.kind,
            memory=memory_text(device.memory_bytes),
            flops=_spell(device.flops, "flop/s"),
            memory_bandwidth=_spell(device.memory_bandwidth, "B/s"),
            overhead=_spell(device.overhead_seconds, "seconds"),
        )
        if device.half_flops:
            entry["half_flops"] = _spell(device.half_flops, "flop/s")
        if device.host_bandwidth:
            entry["host_bandwidth"] = _spell(device.host_bandwidth, "B/s")
        if device.cores:
            entry["cores"] = FlowList(device.cores)
        if device.node:
            entry["node"] = device.node
        devices.append(entry)
    tree: dict[str, Any] = {"partita_cluster": VERSION, "devices": devices}
    if cluster.links:
        tree["links"] = [
            Flow(
                between=FlowList((link.source, link.target)),
                bandwidth=_spell(link.bandwidth, "B/s"),
                latency=_spell(link.latency_seconds, "seconds"),
                **({} if link.host_bandwidth == inf else {"host": _spell(link.host_bandwidth, "B/s")}),
                **({"overhead": _spell(link.overhead_seconds, "seconds")} if link.overhead_seconds else {}),
            )
            for link in cluster.links
        ]
    return dump(tree)


def load(path: str | os.PathLike[str]) -> Cluster:
    """``Cluster.load``."""
    return loads(read_text(path, "cluster file"), f"'{os.fspath(path)}'")


def save(cluster: Cluster, path: str | os.PathLike[str]) -> None:
    """``Cluster.save``."""
    write_text(path, dumps(cluster), "cluster file")
