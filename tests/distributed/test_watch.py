"""The watch tells a rank that works from one that waits, also where work is part of a wait; and a test of the real
thing: a rank that hangs in the middle of a save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partita.runtime.distributed.watch import Watch
from tests.distributed.faults import judged


class Store:
    """A dict with the store's words."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)

    def get(self, key: str) -> bytes:
        return self.kept[key].encode()

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.kept.setdefault(key, value).encode()


def watch(rank: int, store: Store) -> Watch:
    made = Watch(rank, 2, "cpu")
    made._store = store
    return made


def later(made: Watch, seconds: float) -> None:
    """As though the main thread had done nothing for so long."""
    made._beat()
    since, use = made._alive
    made._alive, made._since = (since - seconds, use), made._since - seconds


def test_who_stands_still_in_work_within_a_wait_is_at_fault_and_who_waits_is_not() -> None:
    store = Store()
    first, second = watch(0, store), watch(1, store)
    with first.waiting("the checkpoint's files"), second.waiting("the checkpoint's files"):
        with second.working("the writing of its part of a checkpoint"):
            for each in (first, second):
                later(each, 16.0)
                each._beat()
            reports = {r: json.loads(store.kept[f"/beat/{r}"]) for r in (0, 1)}
            assert [bool(reports[r]["waits"]) for r in (0, 1)] == [True, False]
            first._look(silent_after=15.0)
        assert second._waits == "the checkpoint's files"
    found = first.notice
    assert found is not None and found.rank == 1 and found.still
    assert "stood still for 16 s in the writing of its part of a checkpoint" in found.text


def test_work_that_moves_on_is_never_at_fault() -> None:
    store = Store()
    first, second = watch(0, store), watch(1, store)
    with first.waiting("the checkpoint's files"), second.working("the writing of its part of a checkpoint"):
        for each in (first, second):
            later(each, 16.0)
        second.moved()
        for each in (first, second):
            each._beat()
        first._look(silent_after=15.0)
    assert first.notice is None


@pytest.mark.distributed_full
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("what", ["hang", "raise", "stop"])
def test_a_fault_in_the_middle_of_a_save_ends_every_rank_and_names_one(what: str, culprit: int, tmp_path: Path) -> None:
    well, line = judged(what, "save", culprit)
    assert well, line
    if what == "hang":
        assert "the writing of its part of a checkpoint" in line
