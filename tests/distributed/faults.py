"""Every fault at every point: ``python -m tests.distributed.faults``, a line each.

One rank of two is killed, stopped, hangs or raises, at the start, in the middle of a forward, of a backward, of a save;
seconds from that rank's end to the last other rank's end (for a rank that is stopped or hangs: from its last step), and
how each ended. Several run at once: they mostly wait.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from tests.distributed.spawn import Ended, run_ranks

WHAT = ("kill", "raise", "hang", "stop")
WHERE = ("start", "forward", "backward", "save")
ALLOWED_SECONDS = 30.0


def run(what: str, where: str, culprit: int) -> list[Ended]:
    if where == "save":
        with tempfile.TemporaryDirectory() as folder:
            job = f"save={folder},plan=pp:2,die={culprit},how={what}"
            return run_ranks(2, ["-m", "tests.distributed.checkpoints", job], timeout=150)
    return run_ranks(2, ["tests/distributed/faulty.py", what, where, str(culprit)], timeout=150)


def judged(what: str, where: str, culprit: int) -> tuple[bool, str]:
    ended = run(what, where, culprit)
    other = ended[1 - culprit]
    began = max((e.wrong for e in ended if e.wrong), default=0.0)
    seconds = other.seconds - began
    lines = [line for line in other.err.splitlines() if f"rank {culprit} (" in line or f"rank {culprit}: " in line]
    well = other.code != 0 and bool(lines) and seconds < ALLOWED_SECONDS
    well = well and (what != "hang" or "stood still" in lines[-1])  # and the cause is the true one
    reason = lines[-1] if lines else other.err[-160:]
    codes = f"{ended[0].code}, {ended[1].code}"
    return (
        well,
        f"{'ok  ' if well else 'FAIL'} {what:5} {where:8} rank {culprit}  {seconds:5.1f} s  {codes:9} {reason[:150]}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.faults")
    parser.add_argument("--what", default=",".join(WHAT))
    parser.add_argument("--where", default=",".join(WHERE))
    parser.add_argument("--together", type=int, default=4, help="how many run at once")
    given = parser.parse_args()
    cases = list(product(given.what.split(","), given.where.split(","), (0, 1)))
    wrong = 0
    with ThreadPoolExecutor(given.together) as pool:
        for well, line in pool.map(lambda case: judged(*case), cases):
            wrong += not well
            print(line, flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} end within {ALLOWED_SECONDS:.0f} s, and say which rank it was")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
