"""Tensor files in the safetensors format (https://github.com/huggingface/safetensors#format), written tensor by tensor.

Eight bytes give the length of a JSON header of names, dtypes, shapes and byte ranges; the tensors' bytes follow. The
library's own writer wants every tensor in memory at once; this one holds two at most and takes the digest on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from partita.checkpoint.manifest import File

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


SLICE_BYTES = 1 << 25  # written, and on its way to the disk, before the next: no single wait for the disk is long


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write; ``number`` is what ``write`` asks its data by."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    number: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """As they stand in the file: by item size, so that each tensor begins at a multiple of its own; then by name."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))


def write(
    path: Path,
    entries: Iterable[Entry],
    data: Callable[[int], torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    moved: Callable[[], None] = lambda: None,
) -> File:
    """Write the file and wait until the disk has it. Raises OSError.

    ``data(number)``: an entry's tensor, on any device; asked for once, in the order of ``ordered``, and not kept.
    ``moved()`` is called whenever a slice is written.
    """
    entries = ordered(entries)
    seen, total = hashlib.sha256(), 0
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        parts = chain([_header(entries, metadata or {})], (_bytes(entry, data) for entry in entries))
        digested = synced = hashing.submit(lambda: None)
        due = 0
        for part in parts:
            for begin in range(0, part.nbytes, SLICE_BYTES):
                due += file.write(part[begin : begin + SLICE_BYTES])
                if due >= SLICE_BYTES:
                    synced.result()
                    synced, due = syncing.submit(os.fsync, file.fileno()), 0
                moved()
            digested.result()  # of the part before: at most two are in memory
            digested = hashing.submit(seen.update, part)
            total += part.nbytes
        synced.result()
        file.flush()
        os.fsync(file.fileno())
        digested.result()
    return File(total, seen.hexdigest())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> memoryview:
    begin = 0
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for entry in entries:
        end = begin + entry.num_bytes
        table[entry.key] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(entry: Entry, data: Callable[[int], torch.Tensor]) -> memoryview:
    tensor = data(entry.number).detach()
    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, f"{entry} but {tensor.shape}"
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
