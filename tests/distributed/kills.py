"""A rank killed at a random moment of a save, twenty times over: ``python -m tests.distributed.kills``, a line each.

Two ranks have saved step 2, train on, and begin to save step 4; one of them gets SIGKILL at a moment drawn from as
long as such a save takes. Afterwards the folder's latest checkpoint is read whole and must be, bit by bit, that of
step 2, or of step 4 where it was published in time.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

from partita import checkpoint
from tests.distributed.spawn import Ended, run_ranks
from tests.distributed.test_checkpoint_ranks import TWO, same, whole


def run(folder: str, plan: str, die: int, after: float) -> list[Ended]:
    job = f"save={folder},plan={plan},die={die},after={after:.4f}"
    return run_ranks(2, ["-m", "tests.distributed.checkpoints", job], timeout=400)


def seconds_of(ended: list[Ended]) -> float:
    """Of the save that nobody interrupted, on the slower rank."""
    lines = [line for e in ended for line in e.err.splitlines() if line.startswith("saved in ")]
    return max(float(line.split()[2]) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.kills")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    draw, wrong, middle = random.Random(given.seed), 0, 0
    known: dict[str, tuple[float, dict[str, dict[str, torch.Tensor]]]] = {}
    for number in range(given.count):
        plan, die = TWO[number % len(TWO)], draw.randrange(2)
        if plan not in known:
            with tempfile.TemporaryDirectory() as folder:
                took = seconds_of(run(folder, plan, -1, 0.0))
                steps = {s: whole(Path(folder) / s) for s in ("step-00000002", "step-00000004")}
            known[plan] = took, steps
        took, steps = known[plan]
        after = draw.uniform(0.0, took)
        with tempfile.TemporaryDirectory() as folder:
            ended = run(folder, plan, die, after)
            left = any(p.name.startswith(".partial") for p in Path(folder).iterdir())
            latest = checkpoint.latest(folder)
            well = latest is not None and latest.name in steps and same(whole(latest), steps[latest.name])
        middle += left
        wrong += not well
        print(f"{'ok  ' if well else 'FAIL'} {plan:18} rank {die} after {1e3 * after:4.0f} of {1e3 * took:4.0f} ms  "
              f"{'half written' if left else '            '}  codes {[e.code for e in ended]}  latest "
              f"{latest.name if latest else None}", flush=True)  # fmt: skip
    whole_ones = f"{given.count - wrong} of {given.count} leave a whole checkpoint, the last or the one before"
    print(f"{whole_ones}; {middle} were killed in the middle of writing")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
