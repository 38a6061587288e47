"""Members of a group exchange sums, shards, rows and parts, in whatever order a plan lists them."""

from __future__ import annotations

import json

import pytest

from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_members_exchange_what_they_should(ranks: int, apart: bool) -> None:
    """On one host through memory they share; on a host each over the process group."""
    ended = run_ranks(ranks, ["-m", "tests.distributed.exchanging"], hosts=ranks if apart else 1)
    assert [e.code for e in ended] == [0] * ranks, ended[0].err[-3000:]
    assert json.loads(ended[0].out.splitlines()[-1]) == [[]] * ranks
