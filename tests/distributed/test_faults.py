"""However one rank goes wrong, every rank ends within half a minute, not with success, and says which rank it was
and why."""

from __future__ import annotations

import pytest

from tests.distributed.spawn import run_ranks

SECONDS = 30.0
CALM = {"PARTITA_STALL": "6"}


def ends(what: str, where: str, culprit: int, size: int = 2, *, apart: bool = False) -> list[str]:
    """What the other ranks wrote; all have ended, none with success. ``apart``: ZeRO 3 over replicas, a host each."""
    words = ["tests/distributed/faulty.py", what, where, str(culprit), *(["zero3"] if apart else [])]
    found = run_ranks(size, words, timeout=90, env=CALM, hosts=size if apart else 1)
    others = [e for r, e in enumerate(found) if r != culprit]
    assert all(e.code != 0 for e in others), [e.code for e in found]
    assert all(e.seconds < 90 for e in others), "a rank had to be killed by the test"
    if what != "stop":  # a stopped process is no orphan of ours: its launcher ends it
        assert max(e.seconds for e in others) - found[culprit].seconds < SECONDS
    for ended in others:
        named = [line for line in ended.err.splitlines() if f"because rank {culprit} (cpu:{culprit}" in line]
        assert len(named) == 1, ended.err
    return [e.err for e in others]


def test_a_killed_rank_ends_the_others() -> None:
    (text,) = ends("kill", "forward", 1)
    assert "stage 1" in text and "ended without a word" in text


def test_an_error_on_one_rank_is_named_on_the_others() -> None:
    (text,) = ends("raise", "backward", 1)
    assert "the cooling has failed" in text and "Traceback" not in text


@pytest.mark.parametrize(("what", "where"), [("kill", "backward"), ("raise", "forward")])
def test_a_rank_that_goes_wrong_while_others_exchange_with_it_ends_them(what: str, where: str) -> None:
    ends(what, where, 0, apart=True)  # an op nobody knows runs on the whole batch, on the first replica


def test_ranks_that_wait_for_one_another_in_shared_memory_end_and_say_so() -> None:
    """Looking at the memory again and again takes of the processor, and is no sign of life."""
    ended = run_ranks(2, ["tests/distributed/mismatched.py"], timeout=90, env={"PARTITA_STALL": "3"})
    assert all(e.code > 0 for e in ended), [e.code for e in ended]
    words = "all ranks wait for one another: rank 0 for a sum of one over ranks 0, 1; rank 1 for words of one"
    assert all(words in e.err for e in ended), [e.err for e in ended]


@pytest.mark.distributed_full
def test_a_rank_that_stands_still_is_found_and_ended() -> None:
    (text,) = ends("hang", "forward", 1)
    assert "stood still" in text and "the forward of microbatch" in text


@pytest.mark.distributed_full
@pytest.mark.parametrize("what", ["kill", "raise", "hang", "stop"])
@pytest.mark.parametrize("where", ["start", "forward", "backward"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_every_fault_at_every_point_ends_every_rank(what: str, where: str, culprit: int) -> None:
    ends(what, where, culprit)
