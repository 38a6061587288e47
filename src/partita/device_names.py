"""Device names in few words: ``cuda:0..7`` for eight of them, ``node0..127/cuda:0..7`` for a thousand, in order.

The last number counts fastest. Two dots between two numbers are no part of a device's own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, product

from partita.errors import UsageError

SHORT = 8  # lists up to this long are written out
LEAST = 3  # names in a row that are worth a range
MOST = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LAST = re.compile(r"(?P<stem>.*?)(?P<number>0|[1-9]\d*)(?P<rest>)$", re.ASCII)
_NODE = re.compile(r"(?P<stem>[^/]*?)(?P<number>0|[1-9]\d*)(?P<rest>/.*)$", re.ASCII)


def expanded(entry: str) -> tuple[str, ...]:
    """The names an entry stands for; itself where it holds no range. Raises UsageError for one that runs backward."""
    parts = _RANGE.split(entry)
    texts, ranges = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    if not ranges:
        return (entry,)
    count = 1
    for low, high in ranges:
        if int(high) < int(low) or any(len(x) > 1 and x[0] == "0" for x in (low, high)):
            raise UsageError(f"{entry!r}: {low}..{high} is no range of device numbers; write the smaller one first")
        count *= int(high) - int(low) + 1
        if count > MOST:
            raise UsageError(f"{entry!r} names more than {MOST:,} devices")
    numbers = product(*(range(int(low), int(high) + 1) for low, high in ranges))
    return tuple("".join(x for pair in zip(texts, (*map(str, n), ""), strict=True) for x in pair) for n in numbers)


def shortened(names: Iterable[str]) -> tuple[str, ...]:
    """Entries that stand for these names in this order; a few names are left as they are."""
    every = tuple(names)
    if len(every) <= SHORT:
        return every
    return _folded(_folded(every, _LAST, LEAST), _NODE, 2)


def shortened_keys(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """(device, text) pairs with ranges for neighbours of equal text."""
    if len(pairs) <= SHORT:
        return tuple(pairs)
    found = []
    for text, run in groupby(pairs, key=lambda pair: pair[1]):
        found += [(entry, text) for entry in shortened([name for name, _ in run])]
    return tuple(found)


def _folded(entries: Sequence[str], pattern: re.Pattern[str], least: int) -> tuple[str, ...]:
    """Entries that differ only in one number, which counts up, as one."""
    runs: list[list[str]] = []
    after: tuple[str, str, int] | None = None
    for entry in entries:
        match = pattern.match(entry)
        counts = match is not None and match["stem"][-1:] not in (*"0123456789.",)
        here = (match["stem"], match["rest"], int(match["number"])) if match and counts else None
        if here is not None and here == after:
            runs[-1].append(entry)
        else:
            runs.append([entry])
        after = (here[0], here[1], here[2] + 1) if here is not None else None
    found: list[str] = []
    for run in runs:
        first, last = pattern.match(run[0]), pattern.match(run[-1])
        if len(run) < least or first is None or last is None:
            found += run
        else:
            found.append(f"{first['stem']}{first['number']}..{last['number']}{first['rest']}")
    return tuple(found)
