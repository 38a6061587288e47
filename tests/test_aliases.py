"""What is the input itself, a view or a copy is so in the graph as in eager; what is changed in place shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dividing import cluster
from torch import nn
from torch.nn import functional as F

from partita.capture import capture
from partita.plan import Batch, Plan, Stage
from partita.runtime.compare import compare, observe
from partita.runtime.module import ParallelModule

torch.set_num_threads(1)

Way = Callable[[torch.Tensor], torch.Tensor]
WAYS: dict[str, Way] = {
    "dropout with p=0": lambda x: F.dropout(x, 0.0, True),
    "dropout in eval": lambda x: F.dropout(x, 0.3, False),
    "alpha_dropout in eval": lambda x: F.alpha_dropout(x, 0.5, False),
    "feature_dropout in eval": lambda x: F.dropout1d(x, 0.5, False),
    "feature_alpha_dropout in eval": lambda x: F.feature_alpha_dropout(x, 0.5, False),
    "rrelu in eval": lambda x: F.rrelu(x, training=False),
    "Identity": lambda x: nn.Identity()(x),
    "contiguous": lambda x: x.contiguous(),
    "contiguous of a transposed": lambda x: x.T.contiguous(),
    "to its dtype": lambda x: x.to(torch.float32),
    "to another dtype": lambda x: x.to(torch.float64),
    "to copy": lambda x: x.to(torch.float32, copy=True),
    "float": lambda x: x.float(),
    "cpu": lambda x: x.cpu(),
    "type_as": lambda x: x.type_as(x),
    "reshape": lambda x: x.reshape(3, -1),
    "reshape of a transposed": lambda x: x.T.reshape(-1),
    "flatten": lambda x: x.flatten(0),
    "ravel": lambda x: x.ravel(),
    "expand_as": lambda x: x.expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x, x.shape),
    "view_as": lambda x: x.view_as(x),
    "squeeze": lambda x: x.squeeze(-1),
    "movedim": lambda x: x.movedim(0, 0),
    "sum_to_size": lambda x: x.sum_to_size(x.shape),
    "positive": lambda x: +x,
    "real": lambda x: torch.real(x),
    "conj": lambda x: torch.conj(x),
    "resolve_conj": lambda x: x.resolve_conj(),
    "as_tensor": lambda x: torch.as_tensor(x),
    "nan_to_num": lambda x: torch.nan_to_num(x),
    "clone": lambda x: x.clone(),
    "cat of one": lambda x: torch.cat([x], 1),
    "pad by nothing": lambda x: F.pad(x, (0, 0)),
    "repeat once": lambda x: x.repeat(1, 1),
    "tile": lambda x: x.tile(1),
    "roll by nothing": lambda x: torch.roll(x, 0, 1),
    "einsum of nothing": lambda x: torch.einsum("ab->ab", x),
    "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(1, 2, 2),
}


class Beside(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.first, self.way = nn.Linear(4, 6), way

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x).tanh()
        return h, self.way(h)


@pytest.mark.parametrize("name", WAYS)
def test_the_graph_shares_memory_where_eager_does(name: str) -> None:
    model, x = Beside(WAYS[name]), torch.randn(6, 4)
    h, found = model(x)
    shared = h.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()
    graph = capture(model, (x,)).graph
    bases = {graph.tensor(n).base or n for n in graph.outputs}  # one output, where they are one object
    assert (len(bases) == 1) is shared


class Changed(nn.Module):
    """``h`` is read after what a dropout that does nothing gave is changed."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        dropped = self.drop(h)
        if self.drop.training:
            dropped += 1
        else:
            dropped[:, 0] = 0
        out: torch.Tensor = self.c(h) * self.b(dropped)
        return out


PLANS = (
    Plan((Stage(("cpu:0",), ("a", "drop")), Stage(("cpu:1",), ("b", "c"))), batch=Batch(6, 2)),
    Plan((Stage(("cpu:0", "cpu:1"), ("",), tensor=2),), batch=Batch(6, 1)),
)


@pytest.mark.parametrize("plan", PLANS, ids=["stages", "members"])
def test_an_inactive_dropout_is_its_input_in_both_modes(plan: Plan) -> None:
    torch.manual_seed(0)
    model, x = Changed(nn.Dropout(0.0)), torch.randn(6, 8)
    parallel = ParallelModule(model, plan, cluster(2))
    for training in (True, False, True):
        model.train(training)
        parallel.train(training)
        found = compare(observe(model, model, (x,), {}), observe(parallel, model, (x,), {}))
        assert found.ok, found
    parallel.close()
