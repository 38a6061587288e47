"""Steps of an optimizer on ranks beside one process: ``python -m tests.distributed.optimizers OPTIMIZER/PLAN ...``.

A line a case on every rank: by how much the trained parameters differ, or how the optimizer was refused.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

import partita
from partita.errors import UsageError
from partita.plan import Batch, Plan, Stage

BOTH = ("cpu:0", "cpu:1")
PLANS = {
    "stages": Plan((Stage(("cpu:0",), ("0", "1")), Stage(("cpu:1",), ("2",))), batch=Batch(6, 2)),
    "replicas": Plan((Stage(BOTH, ("",)),), batch=Batch(6, 2)),
    "zero1": Plan((Stage(BOTH, ("",)),), batch=Batch(6, 2), zero=1),
    "zero3": Plan((Stage(BOTH, ("",)),), batch=Batch(6, 2), zero=3),
    "tensor": Plan((Stage(BOTH, ("",), tensor=2),), batch=Batch(6, 1)),
}


class Lamb(torch.optim.SGD):
    """Only by its name."""


MADE: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, history_size=3, line_search_fn="strong_wolfe"),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.05),
    "Lamb": lambda p: Lamb(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def trained(model: nn.Module, step: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return step()

    for _ in range(3):
        optimizer.step(closure)


def difference(kind: str, plan: Plan) -> float:
    """Largest difference between parameters trained here and in one process, of the largest parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, target, alone, loss_fn = torch.randn(6, 6), torch.randn(6, 4), copy.deepcopy(model), nn.MSELoss()

    def plain() -> torch.Tensor:
        loss = loss_fn(alone(x), target)
        loss.backward()
        return loss.detach()

    trained(alone, plain, MADE[kind](list(alone.parameters())))
    pm = partita.parallelize(model, (x,), plan=plan, loss_fn=loss_fn, profile=False)
    trained(pm, lambda: pm.train_step(x, target), MADE[kind](list(pm.parameters())))
    found, wanted = pm.state_dict(), alone.state_dict()
    return max(float((found[n] - t).abs().max() / t.abs().max()) for n, t in wanted.items())


def main(words: Sequence[str]) -> None:
    for word in words:
        kind, plan = word.split("/")
        try:
            off, refused = difference(kind, PLANS[plan]), ""
        except UsageError as error:
            off, refused = 0.0, str(error)
        print(json.dumps({"case": word, "off": off, "refused": refused}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
