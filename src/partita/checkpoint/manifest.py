"""Manifest: what a checkpoint holds and where, as JSON with its own digest; no pickle is needed to read one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from partita.errors import CheckpointError

NAME = "manifest.json"
VERSION = 1
_BLOCK = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins, its size in each dim, and where its bytes are: ``key`` in ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True, slots=True)
class Saved:
    """One whole tensor. ``dtype`` in torch's spelling, without ``torch.``; the chunks cover it without overlap."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class File:
    """How long a file is, and its SHA-256 in hexadecimal digits."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> File:
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class OptimizerIndex:
    """``kind``: the optimizer's class. ``parameters``: the names in each param group. ``state``: name -> key -> how it
    is kept (``optimizer.py``).
    """

    kind: str
    parameters: tuple[tuple[str, ...], ...]
    state: dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """``tensors``: by DCP key, ``model.<name>`` and ``optimizer.state.<name>.<key>``. ``ties``: name -> the name it is
    saved under. ``ranks``: processes that wrote it. ``files``: every other file of the checkpoint.
    """

    step: int
    model: str
    ranks: int
    tensors: dict[str, Saved]
    files: dict[str, File]
    ties: dict[str, str] = field(default_factory=dict)
    optimizer: OptimizerIndex | None = None
    versions: dict[str, str] = field(default_factory=dict)


class _Sealed(msgspec.Struct):
    partita_checkpoint: int
    sha256: str
    content: msgspec.Raw


def dumps(manifest: Manifest) -> bytes:
    """The manifest as JSON, sealed: ``loads`` notices any change of its content."""
    content = msgspec.json.encode(manifest)
    seal = hashlib.sha256(content).hexdigest()
    return b'{"partita_checkpoint": %d, "sha256": "%s", "content":\n%s}\n' % (VERSION, seal.encode(), content)


def loads(text: bytes, source: str) -> Manifest:
    """The manifest a text holds. Raises CheckpointError where it is no manifest, of another version, or altered."""
    try:
        sealed = msgspec.json.decode(text, type=_Sealed)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{source} is damaged or no checkpoint manifest: {error}; load an earlier checkpoint"
        ) from None
    if sealed.partita_checkpoint != VERSION:
        raise CheckpointError(
            f"{source} is of checkpoint version {sealed.partita_checkpoint}; this partita reads version {VERSION}; "
            "load it with the partita that wrote it, and export_safetensors there"
        )
    content = bytes(sealed.content)
    actual = hashlib.sha256(content).hexdigest()
    if actual != sealed.sha256:
        raise CheckpointError(
            f"{source} is damaged: expected SHA-256 {sealed.sha256} of its content, found {actual}; "
            "load an earlier checkpoint"
        )
    return msgspec.json.decode(content, type=Manifest)


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``. Raises CheckpointError as ``loads``, or where there is none."""
    path = folder / NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' is not a whole checkpoint: cannot read its {NAME}: {error.strerror}; load an earlier one"
        ) from None
    return loads(text, f"'{path}'")


def digest(path: Path) -> File:
    """Length and SHA-256 of a file as it is on disk. Raises OSError."""
    seen, total = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            seen.update(block)
            total += len(block)
    return File(total, seen.hexdigest())


def damage(folder: Path, files: Mapping[str, File]) -> list[str]:
    """What is wrong with these files of a checkpoint, a line each with expected and found; empty: nothing."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as readers:
        found = readers.map(lambda name: _damage(folder / name, files[name]), files)
        return [problem for problem in found if problem]


def _damage(path: Path, expected: File) -> str:
    try:
        size = path.stat().st_size
        if size != expected.num_bytes:
            return f"'{path}': expected {expected.num_bytes} bytes, found {size}"
        found = digest(path)
    except OSError as error:
        return f"'{path}': cannot be read: {error.strerror}"
    return "" if found == expected else f"'{path}': expected SHA-256 {expected.sha256}, found {found.sha256}"
