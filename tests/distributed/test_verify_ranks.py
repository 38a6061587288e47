"""``verify`` in processes started together says what it says in one, on every rank; the command line says it once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.spawn import Ended, run_ranks
from tests.distributed.verified import plans

FACTORY = "tests/distributed/verified.py:"


def cli(factory: str, plan: Path, *more: str) -> list[Ended]:
    return run_ranks(2, ["-m", "partita.cli", "verify", FACTORY + factory, "--plan", str(plan), *more], timeout=90)


def test_every_rank_finds_the_same_under_every_way_to_divide() -> None:
    ended = run_ranks(2, ["-m", "tests.distributed.verified"], timeout=120)
    assert [e.code for e in ended] == [0, 0], "\n".join(e.err[-2000:] for e in ended)
    said = [[json.loads(line) for line in e.out.splitlines() if line.startswith("{")] for e in ended]
    assert said[0] == said[1]
    *equal, turned, wrong = said[0]
    assert turned["ok"], turned
    assert [(e["plan"], e["ok"], e["kept"]) for e in equal] == [(p, True, True) for p in plans(4)]
    assert all(e["counts"] == {"output": 1, "gradient": 6} for e in equal)
    assert (wrong["ok"], wrong["worst"]) == (False, "output")


def test_the_command_line_speaks_once_and_its_code_is_every_ranks(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plans(5)["stages"].save(path)
    ended = cli("make_wrong", path)
    assert [e.code for e in ended] == [2, 2], "\n".join(e.err[-2000:] for e in ended)
    said = [line for e in ended for line in (e.out + e.err).splitlines() if "DIFFERENT" in line]
    assert said == ["error: DIFFERENT: 1 of 1 outputs, 6 gradients"]


def test_what_one_rank_alone_refuses_is_the_cause_that_the_others_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plans(5)["stages"].save(path)
    ended = cli("make_uncopied", path)
    assert all(e.code for e in ended)
    assert ended[1].err.splitlines()[-1] == "error: the licence allows one copy"
    (said,) = (line for line in ended[0].err.splitlines() if "rank 1 (" in line)
    assert said.endswith("failed: UsageError: the licence allows one copy")


@pytest.mark.distributed_full
def test_the_command_line_says_equal_once_also_as_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plans(4)["tensor"].save(path)
    ended = cli("make", path)
    assert [e.code for e in ended] == [0, 0], "\n".join(e.err[-2000:] for e in ended)
    assert ended[0].out.startswith("equal: 1 outputs, 6 gradients") and not ended[1].out
    ended = cli("make", path, "--json")
    assert json.loads(ended[0].out)["equal"] is True and not ended[1].out
