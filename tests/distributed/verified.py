"""A factory for ``partita verify`` on ranks, and the API's verb: ``python -m tests.distributed.verified``."""

from __future__ import annotations

import json
import os

import torch
from torch import nn

import partita
from partita.errors import UsageError
from partita.plan import Batch, Plan, Stage


@torch.library.custom_op("verified::shifted", mutates_args=())
def shifted(x: torch.Tensor) -> torch.Tensor:
    """Off by a tenth on rank 1: what a wrong kernel on one host would do."""
    return x + 0.1 * (os.environ.get("RANK") == "1")


@shifted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


shifted.register_autograd(lambda ctx, grad: grad)


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = shifted(x)
        return out


class Scaled(nn.Linear):
    """By a scalar, which has no strides that could say that it is elsewhere."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.transpose(1, 2))


class Changed(nn.Module):
    """A copy is changed, not what it was made from: ``contiguous`` copies a tensor that does not lie as it stands."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().add_(1) * x


def make_turned() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Turned(), Changed(), nn.Linear(4, 3)), (torch.randn(5, 4, 6),)


def make(*more: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    parts = nn.Linear(6, 8), nn.Dropout(0.3), Scaled(8, 8), nn.Linear(8, 3)
    model = nn.Sequential(*parts, *more)
    model[3].weight.requires_grad_(False)
    return model, (torch.randn(5, 6),)


def make_wrong() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return make(Shifted())


class Uncopied(nn.Linear):
    """Rank 1 alone cannot copy it a second time."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Uncopied:
        Uncopied.copies += 1
        if Uncopied.copies == 2 and os.environ.get("RANK") == "1":
            raise UsageError("the licence allows one copy")
        made = Uncopied(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


def make_uncopied() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return make(Uncopied(3, 3))


def plans(parts: int) -> dict[str, Plan]:
    """Of two ranks, by what divides the model."""
    both, names = ("cpu:0", "cpu:1"), tuple(map(str, range(parts)))
    return {
        "stages": Plan((Stage(("cpu:0",), names[:2]), Stage(("cpu:1",), names[2:])), batch=Batch(5, 2)),
        "replicas": Plan((Stage(both, ("",)),), batch=Batch(5, 2), zero=3),
        "tensor": Plan((Stage(both, ("",), tensor=2),), batch=Batch(5, 1)),
    }


def main() -> None:
    model, args = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, plan in plans(4).items():
        found = partita.verify(model, args, plan=plan)
        kept = all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        print(json.dumps({"plan": name, "ok": found.ok, "counts": found.counts(), "kept": kept}), flush=True)
    turned, args = make_turned()
    found = partita.verify(turned, args, plan=plans(4)["stages"])
    print(json.dumps({"plan": "turned", "ok": found.ok, "found": str(found)}), flush=True)
    wrong, args = make_wrong()
    found = partita.verify(wrong, args, plan=plans(5)["stages"])
    print(json.dumps({"plan": "wrong", "ok": found.ok, "worst": found.worst.name if found.worst else ""}), flush=True)


if __name__ == "__main__":
    main()
