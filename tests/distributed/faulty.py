"""A training script in which one rank goes wrong: ``faulty.py what where rank [zero3]``, run on every rank. A stage
each, or with ``zero3`` replicas that gather their parameters.

``what``: 'kill', 'stop' (SIGSTOP: hung as a process), 'hang' (its main thread sleeps), 'raise', 'leave' (ends quietly).
``where``: 'start' (before its first step), 'forward' or 'backward' (in the middle of its part of the third step).
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import nn

import partita
from partita.plan import Batch, Plan, Stage
from tests.distributed.spawn import say_when

what, where, culprit = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
armed = False


def go_wrong() -> None:
    say_when()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "hang":
        time.sleep(1000)
    elif what == "leave":
        sys.exit(0)
    elif what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)
    raise RuntimeError("the cooling has failed")


@torch.library.custom_op("faulty::forward", mutates_args=())
def forward_op(x: torch.Tensor) -> torch.Tensor:
    if armed and where == "forward":
        go_wrong()
    return x.clone()


@forward_op.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def backward_op(ctx: object, grad: torch.Tensor) -> torch.Tensor:
    if armed and where == "backward":
        go_wrong()
    return grad


forward_op.register_autograd(backward_op)


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return forward_op(self.inner(x))


torch.manual_seed(0)
model = nn.Sequential(*(Fragile() for _ in range(size)))
plan = Plan(tuple(Stage((f"cpu:{r}",), (f"{r}",)) for r in range(size)), batch=Batch(8, 4))
if "zero3" in sys.argv:
    plan = Plan((Stage(tuple(f"cpu:{r}" for r in range(size)), ("",)),), batch=Batch(8, size), zero=3)
if what == "interrupt":
    signal.signal(signal.SIGINT, signal.default_int_handler)
pm = partita.parallelize(model, (torch.ones(8, 8),), plan=plan, loss_fn=nn.MSELoss())
optimizer = torch.optim.AdamW(pm.parameters())
for step in range(1000):
    armed = step == 2 and rank == culprit
    if armed and where == "start":
        go_wrong()
    optimizer.zero_grad()
    pm.train_step(torch.ones(8, 8), torch.ones(8, 8))
    optimizer.step()
print("done")
