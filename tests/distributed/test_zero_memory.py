"""What a rank holds under each ZeRO level, and at the most during a step, is the closed form to five per cent."""

from __future__ import annotations

import json

import pytest

from benchmarks.distributed.zero_memory import compared
from tests.distributed.spawn import run_ranks


def test_bytes_of_each_rank_are_the_closed_form_of_its_zero_level() -> None:
    command = ["-m", "benchmarks.distributed.zero_memory", "--measure", "mlp", "--levels", "0,1,2,3"]
    ended = run_ranks(2, command, timeout=120)
    assert [e.code for e in ended] == [0, 0], "\n".join(e.err[-2000:] for e in ended)
    lines = [json.loads(line) for line in ended[0].out.splitlines() if line.startswith("{")]
    assert [seen["zero"] for seen in lines] == [0, 1, 2, 3]
    for seen in lines:
        have, form = compared("mlp", 2, seen)
        assert have == pytest.approx(form, rel=0.05), seen["zero"]
