"""Members of a group exchange shards, rows and parts over a process group, in whatever order a plan lists them."""

from __future__ import annotations

import json

import pytest

from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_no_memory_exchange_what_they_should(ranks: int) -> None:
    ended = run_ranks(ranks, ["-m", "tests.distributed.exchanging"], hosts=ranks)
    assert [e.code for e in ended] == [0] * ranks, ended[0].err[-3000:]
    assert json.loads(ended[0].out.splitlines()[-1]) == [[]] * ranks
