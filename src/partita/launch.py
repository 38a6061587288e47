"""``partita run``: a training script on several processes, one a device; ``torchrun`` underneath, its options included.

    partita run --nproc 4 --plan plan.yaml train.py --epochs 3
    partita run --nproc 8 --nnodes 2 --rdzv-endpoint host:29500 train.py       on each of two hosts

The script is the one that runs in one process: ``parallelize`` finds the process group.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from partita.errors import UsageError
from partita.plan import Plan


def command(words: Sequence[str], *, nproc: int | None, plan: str | None) -> tuple[list[str], dict[str, str]]:
    """What to run, and what to add to its environment. ``words``: torchrun's own options, the script, its arguments.

    Raises UsageError where the script is not there or the plan asks for another number of processes; PlanError for a
    plan file that cannot be read.
    """
    position = _script(words)
    script = words[position]
    as_module = "-m" in words[:position] or "--module" in words[:position]
    if not as_module and not Path(script).is_file():
        raise UsageError(f"there is no script '{script}'; write: partita run [--nproc N] script.py [its arguments]")
    env: dict[str, str] = {}
    several = any(word.split("=")[0] in ("--nnodes", "--rdzv-endpoint", "--rdzv_endpoint") for word in words[:position])
    count = nproc
    if plan is not None:
        loaded = Plan.load(plan)
        wanted = len(loaded.devices or {d for s in loaded.stages for d in s.devices})
        if count is None and not several:
            count = wanted
        elif not several and count != wanted:
            raise UsageError(
                f"'{plan}' is a plan for {wanted} devices, and --nproc is {count}: one process runs one device; "
                f"say --nproc {wanted}, or make a plan for {count}"
            )
        env["PARTITA_PLAN"] = str(Path(plan).absolute())
    if count is None:
        count = default_processes()
    if count < 1:
        raise UsageError(f"--nproc {count} starts nothing; it must be at least 1")
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, _cores() // count))
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", *words], env


def run(words: Sequence[str], *, nproc: int | None = None, plan: str | None = None) -> int:
    """Start the processes and wait for them; the launcher's exit code (0: every process ended well)."""
    argv, env = command(words, nproc=nproc, plan=plan)
    with subprocess.Popen(argv, env={**os.environ, **env}) as launcher:
        while True:
            try:
                return launcher.wait()
            except KeyboardInterrupt:  # the processes have had it too; they are waited for
                continue


def default_processes() -> int:
    """One for each GPU, else one for each core, at most four."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return gpus or min(_cores(), 4)


def _cores() -> int:
    from partita.measure.machine import usable_cores

    return len(usable_cores())


FLAGS = frozenset({"-m", "--module", "--standalone", "--no-python", "--no_python", "--run-path", "--run_path"})


def _script(words: Sequence[str]) -> int:
    """Where the script's name stands: after torchrun's options, each of which takes one value or is a flag."""
    position = 0
    while position < len(words) and words[position].startswith("-"):
        word = words[position]
        position += 1 if word in FLAGS or "=" in word else 2
    if position >= len(words):
        raise UsageError("no script is named; write: partita run [--nproc N] [--plan plan.yaml] script.py [arguments]")
    return position
