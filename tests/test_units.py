"""Bytes, seconds and counts are read and written as people do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import UsageError
from partita.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GiB", 2 * 2**30), ("2GB", 2 * 10**9), ("2gib", 2 * 2**30), ("1.5 MiB", 3 * 2**19), ("512", 512),
        ("0", 0), (" 7B ", 7), (".5KiB", 512), ("3k", 3000), (500_000_000, 500_000_000), (1.9, 1),
    ],
)  # fmt: skip
def test_amounts_of_memory_are_read(text: str | int | float, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["two", "", "2XB", "-1GiB", "1..5GB", "GiB", -1, float("nan"), True, None, [1]])
def test_what_is_no_amount_is_refused_by_name(text: object) -> None:
    with pytest.raises(UsageError, match="is not an amount of memory"):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.integers(0, 2**55))
def test_written_bytes_read_back_within_half_a_percent(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(1, 0.006 * count)


def test_numbers_are_written_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 212 * 2**20, -2048)] == [
        "0B",
        "1023B",
        "1.5KiB",
        "212MiB",
        "-2KiB",
    ]
    assert [format_seconds(s) for s in (0, 0.00123, 2.5, 3e-6, 4e-9)] == ["0 s", "1.23 ms", "2.5 s", "3 us", "4 ns"]
    assert [format_count(n) for n in (12, 1234, 12_345_678, 3e9)] == ["12", "1.23 k", "12.3 M", "3 G"]
