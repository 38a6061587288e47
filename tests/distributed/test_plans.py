"""Processes compute what one process computes: outputs, every gradient, twenty steps of training, for many plans at
once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.cases import Case, product_of
from tests.distributed.matrix import shows, widest_first
from tests.distributed.spawn import ROOT, environment, run_ranks

# Each family, schedule, ZeRO level and kind of division; the whole product: pytest -m distributed_full
TWO = (
    Case("gpt", 2, 1, "1f1b", 4), Case("t5", 2, 1, "zero_bubble", 4), Case("cnn", 1, 1, "1f1b", 1, tp=2),
    Case("vit", 1, 1, "1f1b", 1, tp=2), Case("moe", 1, 2, "1f1b", 2, zero=3), Case("llama", 1, 2, "1f1b", 2, zero=2),
    Case("tied", 1, 2, "1f1b", 3, zero=1), Case("wide", 1, 2, "1f1b", 2, zero=2), Case("wide", 1, 2, "1f1b", 2, zero=3),
    Case("gpt", 1, 1, "1f1b", 1, tp=2, backwards=True),
)  # fmt: skip
THREE = (Case("cnn", 1, 3, "1f1b", 3), Case("gpt", 3, 1, "1f1b", 4), Case("vit", 1, 3, "1f1b", 3, zero=3),
         Case("gpt", 2, 1, "1f1b", 4, tp=2, divided="last"), Case("cnn", 2, 1, "gpipe", 4, tp=2, divided="first"),
         Case("tied", 2, 1, "zero_bubble", 4, tp=2, backwards=True, divided="last"))  # fmt: skip
FOUR = (
    Case("t5", 2, 2, "gpipe", 4), Case("llama", 2, 2, "interleaved", 4, zero=3), Case("cnn", 2, 2, "1f1b", 4),
    Case("cnn", 2, 1, "zero_bubble", 4, tp=2), Case("moe", 1, 2, "1f1b", 2, zero=3, tp=2),
    Case("tied", 2, 2, "1f1b", 4, zero=3), Case("tied", 1, 2, "interleaved", 4, zero=3, tp=2),
    Case("t5", 2, 1, "1f1b", 4, tp=2, backwards=True), Case("gpt", 1, 2, "1f1b", 2, zero=3, tp=2, backwards=True),
)  # fmt: skip
EIGHT = (Case("gpt", 2, 2, "1f1b", 4, zero=1, tp=2),)
APART = (
    Case("moe", 1, 1, "1f1b", 1, tp=2), Case("wide", 1, 2, "1f1b", 2), Case("wide", 1, 2, "1f1b", 2, zero=2),
    Case("tied", 1, 2, "1f1b", 3, zero=3), Case("t5", 2, 1, "zero_bubble", 4),
)  # fmt: skip
FOUR_APART = (Case("vit", 1, 2, "1f1b", 2, zero=3, tp=2), Case("gpt", 1, 4, "1f1b", 4, zero=2))


def run(ranks: int, cases: tuple[Case, ...], timeout: float, *, hosts: int = 1) -> None:
    command = ["-m", "tests.distributed.cases", *map(str, cases)]
    ended = run_ranks(ranks, command, timeout=timeout, hosts=hosts)
    found = [json.loads(line) for line in ended[0].out.splitlines() if line.startswith("{")]
    assert [f for f in found if f["count"]] == []
    assert len(found) == len(cases), "\n".join(e.err[-3000:] for e in ended)
    assert [e.code for e in ended] == [0] * ranks


def test_the_first_of_a_sample_show_all_there_is_to_show() -> None:
    cases = list(product_of(2))
    found = widest_first(cases, seed=2)
    assert sorted(map(str, found)) == sorted(map(str, cases))
    assert set.union(*map(shows, found[: len(cases) // 4])) == set.union(*map(shows, cases))


def test_two_ranks_compute_what_one_process_computes() -> None:
    run(2, TWO, 180)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), [(3, THREE), (4, FOUR), (8, EIGHT)])
def test_more_ranks_compute_what_one_process_computes(ranks: int, cases: tuple[Case, ...]) -> None:
    run(ranks, cases, 400)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), [(2, APART), (4, FOUR_APART)])
def test_ranks_of_two_hosts_compute_what_one_process_computes(ranks: int, cases: tuple[Case, ...]) -> None:
    """No memory is shared between hosts: sums, shards and parts go over sockets."""
    run(ranks, cases, 400, hosts=2)


@pytest.mark.distributed_full
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_every_plan_computes_what_one_process_computes(ranks: int, tmp_path: Path) -> None:
    command = ["-m", "tests.distributed.all", "--ranks", str(ranks), "--results", str(tmp_path / "results")]
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(1, 0, 0), check=False)
    assert ended.returncode == 0
