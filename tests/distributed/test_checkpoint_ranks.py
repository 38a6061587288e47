"""Checkpoints across processes: any number of ranks to any other, one rank killed in the middle of a save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from partita import checkpoint
from tests.distributed.checkpoints import made, plan_of, train
from tests.distributed.spawn import run_ranks

TWO = ("pp:2", "pp:1+tp:2", "pp:1+dp:2+zero:1", "pp:1+dp:2+zero:3")
FOUR = ("pp:2+dp:2+zero:2", "pp:4", "pp:1+dp:4+zero:3", "pp:2+tp:2")
PLANS = {2: TWO, 4: FOUR}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def whole(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together by plain torch.distributed.checkpoint."""
    reader = checkpoint.Reader(root)
    found = {
        key: torch.zeros(saved.shape, dtype=getattr(torch, saved.dtype))
        for key, saved in reader.manifest.tensors.items()
    }
    dcp_load(found, storage_reader=reader, no_dist=True)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def cross(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """One process -> each number of ranks in turn, four plans each -> one process."""
    pm, optimizer = made(plan_of(2), seed=3)
    train(pm, optimizer, 2)
    start = tmp_path / "start"
    checkpoint.save(start, pm, optimizer, step=2, extra={"note": "two"})
    checkpoint.export_safetensors(start / "whole.safetensors", pm)
    expected, losses = whole(start), train(pm, optimizer, 2)
    assert len(expected) == 4 * len(dict(pm.named_parameters()))  # weights, two moments, and the count of steps

    saved = [start] * len(TWO)
    for size in sizes:
        plans = PLANS[size]
        froms, saved = saved, [tmp_path / plan for plan in plans]
        jobs = [f"load={a},save={b},plan={p}" for a, b, p in zip(froms, saved, plans, strict=True)]
        ended = run_ranks(size, ["-m", "tests.distributed.checkpoints", *jobs], timeout=240)
        assert [e.code for e in ended] == [0] * size, "\n".join(e.err[-2000:] for e in ended)
        for line in ended[0].out.splitlines():
            assert json.loads(line)["losses"] == pytest.approx(losses, rel=1e-4), line
        for to in saved:
            assert same(whole(to), expected), to
            assert same(load_file(to / "whole.safetensors"), load_file(start / "whole.safetensors"))
    for number, root in enumerate(saved):
        other, fresh = made(plan_of(1 + number % 2), seed=99)
        checkpoint.load(root, other, fresh)
        checkpoint.save(tmp_path / f"end{number}", other, fresh)
        assert same(whole(tmp_path / f"end{number}"), expected)
        assert train(other, fresh, 2) == pytest.approx(losses, rel=1e-4)


def test_checkpoints_cross_to_two_ranks_and_back_bit_by_bit(tmp_path: Path) -> None:
    cross(tmp_path, (2,))


@pytest.mark.distributed_full
def test_checkpoints_cross_from_two_ranks_to_four_and_back_bit_by_bit(tmp_path: Path) -> None:
    cross(tmp_path, (2, 4))


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.distributed_full), 1])
def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_previous_checkpoint(culprit: int, tmp_path: Path) -> None:
    job = f"save={tmp_path},plan=pp:2,die={culprit}"
    ended = run_ranks(2, ["-m", "tests.distributed.checkpoints", job], timeout=120)
    assert ended[culprit].code == -9
    other = ended[1 - culprit]
    assert other.code not in (0, -9), other.err
    assert f"rank {culprit}" in other.err
    assert other.seconds - ended[culprit].seconds < 30
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest.name == "step-00000002"
    pm, optimizer = made(plan_of(1), seed=4)
    assert checkpoint.load(tmp_path, pm, optimizer).step == 2
    checkpoint.save(tmp_path, pm, optimizer, step=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest", "step-00000002", "step-00000005", "whole.safetensors",
    ]  # fmt: skip
