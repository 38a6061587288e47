"""Devices that share a memory: full price where all compute, ``alone`` of it where the others wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.cost.beside import paces


def test_no_overlap_is_alone_and_full_overlap_is_the_full_price() -> None:
    spans = {("a", 0): (0.0, 1.0, 0.8), ("b", 0): (0.0, 1.0, 0.9), ("a", 1): (1.0, 2.0, 0.8), ("b", 1): (3.0, 4.0, 0.9)}
    found = paces(spans)
    assert found["a", 0] == pytest.approx(1.0) and found["b", 0] == pytest.approx(1.0)
    assert found["a", 1] == pytest.approx(0.8) and found["b", 1] == pytest.approx(0.9)


def test_between_them_it_is_linear_in_the_share_that_overlaps() -> None:
    found = paces({("a", 0): (0.0, 4.0, 0.8), ("b", 0): (1.0, 2.0, 0.5)})
    assert found["a", 0] == pytest.approx(0.8 + 0.2 * 0.25) and found["b", 0] == pytest.approx(1.0)
    three = paces({("a", 0): (0.0, 1.0, 0.6), ("b", 0): (0.0, 1.0, 0.6), ("c", 0): (5.0, 6.0, 0.6)})
    assert three["a", 0] == pytest.approx(0.6 + 0.4 * 0.5)


def test_one_device_is_alone() -> None:
    assert paces({("a", 0): (0.0, 1.0, 0.7)}) == {("a", 0): 0.7}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 1.0), st.floats(0.0, 1.0)), max_size=20))
def test_every_pace_lies_between_alone_and_the_full_price(work: list[tuple[str, float, float]]) -> None:
    clock, spans = dict.fromkeys("abc", 0.0), {}
    for i, (device, wait, length) in enumerate(work):
        start = clock[device] + wait
        clock[device] = start + length
        spans[device, i] = (start, clock[device], 0.75)
    for pace in paces(spans).values():
        assert 0.75 - 1e-9 <= pace <= 1.0 + 1e-9
