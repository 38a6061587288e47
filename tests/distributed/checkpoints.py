"""Loads and saves checkpoints on every rank: ``python -m tests.distributed.checkpoints JOB...``.

A job is ``load=FROM,save=TO,plan=NAME`` (a plan of ``plans``, with as many ranks as there are); its model and optimizer
begin with other numbers than any checkpoint has. Rank 0 prints the losses of two further steps after the save.
``die=RANK``: that rank goes wrong in the middle of a second save into the same folder, as ``how`` says: 'kill',
'stop' (SIGSTOP), 'hang' (its main thread sleeps), 'raise'; ``after``: killed so many seconds after that save began.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import partita
from partita import checkpoint
from partita.plan import Batch, Plan, Stage
from tests.distributed.models import FAMILIES, loss_of
from tests.distributed.spawn import say_when

FAMILY = FAMILIES["tied"]
BATCH = 8


def plan_of(pp: int, dp: int = 1, tp: int = 1, zero: int = 0) -> Plan:
    """``pp`` stages of ``dp`` replicas of ``tp`` devices."""
    stages, each = [], dp * tp
    for s in range(pp):
        parts = FAMILY.parts[s * len(FAMILY.parts) // pp : (s + 1) * len(FAMILY.parts) // pp]
        names = tuple(name for part in parts for name in part) if pp > 1 else ("",)
        stages.append(Stage(tuple(f"cpu:{r}" for r in range(s * each, (s + 1) * each)), names, tensor=tp))
    devices = tuple(f"cpu:{r}" for r in range(pp * each))
    return Plan(tuple(stages), devices=devices, batch=Batch(BATCH, 2 * dp if pp > 1 else dp), zero=zero)


def made(plan: Plan, seed: int) -> tuple[partita.ParallelModule, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = FAMILY.make()
    pm = partita.parallelize(
        model, FAMILY.inputs(BATCH), plan=plan, devices=list(plan.devices), loss_fn=loss_of, profile=False
    )
    norms = [p for n, p in pm.named_parameters() if "norm" in n]
    others = [p for n, p in pm.named_parameters() if "norm" not in n]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return pm, torch.optim.AdamW(groups, lr=1e-2)


def train(pm: partita.ParallelModule, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        inputs, target = FAMILY.inputs(BATCH), FAMILY.target(BATCH)
        optimizer.zero_grad()
        losses.append(float(pm.train_step(*inputs, target)))
        optimizer.step()
    return losses


def run(job: dict[str, str], rank: int) -> list[float]:
    plan = plan_of(**{k: int(v) for k, v in (part.split(":") for part in job["plan"].split("+"))})
    pm, optimizer = made(plan, seed=17)
    if "load" in job:
        train(pm, optimizer, 1)
        restored = checkpoint.load(job["load"], pm, optimizer)
        assert (restored.step, restored.extra) == (2, {"note": "two"}), restored
    checkpoint.save(job["save"], pm, optimizer, step=2, extra={"note": "two"})
    checkpoint.export_safetensors(Path(job["save"]) / "whole.safetensors", pm)
    losses = train(pm, optimizer, 2)
    if "die" in job:
        if rank == int(job["die"]) and "after" in job:
            threading.Timer(float(job["after"]), os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif rank == int(job["die"]):
            synced = os.fsync

            def die(handle: Any) -> None:
                synced(handle)
                say_when()
                how = job.get("how", "kill")
                if how == "raise":
                    raise RuntimeError("the cooling has failed")
                if how == "hang":
                    time.sleep(1000)
                os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)

            os.fsync = die
        began = time.monotonic()
        checkpoint.save(job["save"], pm, optimizer, step=4)
        print(f"saved in {time.monotonic() - began:.4f} s", file=sys.stderr, flush=True)
    pm.close()
    return losses


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for word in words:
        job = dict(pair.split("=", 1) for pair in word.split(","))
        losses = run(job, int(os.environ.get("RANK", "0")))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"job": word, "losses": losses}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
