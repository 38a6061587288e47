"""Bytes, seconds and counts: read what people write, write what people read."""

from __future__ import annotations

import re

from partita.errors import UsageError

_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BYTES = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([KMGTP]?)(i?)(B?)\s*$", re.IGNORECASE)


def parse_bytes(text: str | int | float) -> int:
    """``"2GiB"`` -> 2147483648; ``"2GB"`` -> 2000000000; a number is bytes. Raises UsageError."""
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise UsageError(f"{text!r} is not an amount of memory; write for example '2GiB' or 500_000_000")
    if isinstance(text, int | float):
        if text < 0 or text != text:
            raise UsageError(f"{text!r} is not an amount of memory; it must not be negative")
        return int(text)
    match = _BYTES.match(text)
    if match is None:
        raise UsageError(f"{text!r} is not an amount of memory; write for example '2GiB', '512MiB' or '1.5GB'")
    number, prefix, binary, _ = match.groups()
    table = _BINARY if binary or not prefix else _DECIMAL
    return int(float(number) * table[prefix.upper()])


def format_bytes(count: float) -> str:
    """1536 -> '1.5KiB'."""
    value, sign = abs(float(count)), "-" if count < 0 else ""
    for prefix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or prefix == "TiB":
            text = f"{value:.0f}" if prefix == "B" or value >= 100 else f"{value:.3g}"
            return f"{sign}{text}{prefix}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """0.00123 -> '1.23 ms'."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.3g} ns"


def format_count(count: float) -> str:
    """12_345_678 -> '12.3 M'."""
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.3g}"
