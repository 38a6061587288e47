"""Collectives over alpha-beta links: closed forms and what must hold between them."""

from __future__ import annotations

from math import ceil, isclose, log2

from hypothesis import given
from hypothesis import strategies as st

from partita.cost.communication import (
    COLLECTIVES,
    Channel,
    Team,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    ring_all_gather,
    ring_all_reduce,
    tree_all_reduce,
)

FAST, SLOW = Channel(300e9, 5e-6), Channel(25e9, 10e-6)
teams = st.builds(lambda k, n: Team(k, n, FAST, SLOW), st.integers(1, 16), st.integers(1, 300))
sizes = st.floats(1.0, 1e12)


def test_a_ring_moves_two_shares_of_all_but_one_part() -> None:
    assert isclose(ring_all_reduce(8e9, 8, FAST), 14 * (5e-6 + 1e9 / 300e9))


def test_a_tree_takes_logarithmic_latency() -> None:
    assert isclose(tree_all_reduce(1.0, 64, SLOW), 2 * (ceil(log2(64)) * 10e-6 + 1 / 25e9))


def test_small_messages_go_over_the_tree_and_large_ones_round_the_ring() -> None:
    team = Team(64, 1, SLOW, SLOW)
    assert all_reduce(1e3, team) == tree_all_reduce(1e3, 64, SLOW) < ring_all_reduce(1e3, 64, SLOW)
    assert all_reduce(1e10, team) == ring_all_reduce(1e10, 64, SLOW) < tree_all_reduce(1e10, 64, SLOW)


def test_over_nodes_only_a_share_crosses() -> None:
    team = Team(8, 4, FAST, SLOW)
    inside = 2 * ring_all_gather(1e9, 8, FAST)
    assert isclose(all_reduce(1e9, team), inside + ring_all_reduce(1e9 / 8, 4, SLOW))
    assert all_reduce(1e9, team) < ring_all_reduce(1e9, 32, SLOW) / 4


def test_one_device_exchanges_nothing() -> None:
    for collective in COLLECTIVES.values():
        assert collective(1e9, Team(1, 1, FAST, SLOW)) == 0.0
        assert collective(0.0, Team(8, 2, FAST, SLOW)) == 0.0


@given(sizes, teams)
def test_gathering_after_scattering_is_reducing(nbytes: float, team: Team) -> None:
    assert all_reduce(nbytes, team) <= (reduce_scatter(nbytes, team) + all_gather(nbytes, team)) * (1 + 1e-9)


@given(sizes, sizes, teams)
def test_more_bytes_never_take_less(a: float, b: float, team: Team) -> None:
    for collective in COLLECTIVES.values():
        assert collective(min(a, b), team) <= collective(max(a, b), team)


@given(sizes, st.integers(2, 16))
def test_exchanging_parts_is_cheaper_than_gathering_all(nbytes: float, n: int) -> None:
    team = Team(n, 1, FAST, SLOW)
    assert all_to_all(nbytes, team) <= all_gather(nbytes, team)
