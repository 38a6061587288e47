"""A ParallelModule is a drop-in module: optimizers, modes, state, hooks, autocast, other shapes, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dividing import cluster, divided
from torch import nn
from torch.utils.checkpoint import checkpoint

import partita
from partita.errors import ExecutionError, PlanError, UsageError
from partita.plan import Batch, Plan, Stage
from partita.runtime.module import ParallelModule

pytestmark = pytest.mark.timeout(60)


class Net(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.drop = nn.Dropout(p)
        self.b = nn.Linear(12, 12)
        self.c = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(torch.relu(self.norm(self.a(x))))
        return self.c(torch.tanh(self.b(h)) + h)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6), torch.randint(0, 4, (rows,))


def pair(p: float = 0.0, **options: Any) -> tuple[nn.Module, ParallelModule]:
    """The unsplit model, and a divided copy of it."""
    model = Net(p)
    options = {"at": ["b"], "microbatches": 4, "loss_fn": F.cross_entropy, **options}
    return model, divided(copy.deepcopy(model), (batch()[0],), **options)


def grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def assert_same_grads(a: nn.Module, b: nn.Module, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    left, right = grads(a), grads(b)
    assert list(left) == list(right)
    for name, grad in left.items():
        if grad is None or right[name] is None:
            assert grad is right[name], name
        else:
            torch.testing.assert_close(right[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# -- training ----------------------------------------------------------------------------------------------------------

OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=1e-2),
]


def test_a_script_for_ranks_asks_the_same_of_one_process() -> None:
    model, parallel = pair()
    x, t = batch()
    F.cross_entropy(model(x), t).backward()
    parallel.train_step(x, t)
    found = parallel.gradients()
    assert set(found) == set(grads(model))
    assert_same_grads(model, parallel)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(parallel.clip_grad_norm_(0.1), norm)
    assert_same_grads(model, parallel)


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("way", ["call", "train_step"])
@pytest.mark.parametrize("to_none", [True, False])
def test_ten_steps_of_any_optimizer_have_the_unsplit_models_losses(
    make: Callable[[Any], torch.optim.Optimizer], way: str, to_none: bool
) -> None:
    model, parallel = pair(0.2)
    ours, theirs = make(parallel.parameters()), make(model.parameters())
    batches = [batch(rows) for rows in (8, 7) for _ in range(5)]
    for step, (x, t) in enumerate(batches):
        torch.manual_seed(step)
        theirs.zero_grad(set_to_none=to_none)
        expected = F.cross_entropy(model(x), t)
        expected.backward()
        theirs.step()
        torch.manual_seed(step)
        ours.zero_grad(set_to_none=to_none)
        if way == "call":
            loss = F.cross_entropy(parallel(x), t)
            loss.backward()
        else:
            loss = parallel.train_step(x, t)
        ours.step()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_gradients_of_two_calls_are_accumulated() -> None:
    model, parallel = pair()
    for x, t in (batch(), batch()):
        F.cross_entropy(model(x), t).backward()
        F.cross_entropy(parallel(x), t).backward()
    assert_same_grads(model, parallel.module)
    (x, t), (x2, t2) = batch(), batch()
    (F.cross_entropy(model(x), t) + F.cross_entropy(model(x2), t2)).backward()
    parallel.train_step(x, t)
    parallel.train_step(x2, t2)
    assert_same_grads(model, parallel.module)


def test_two_calls_may_be_in_flight_before_one_backward() -> None:
    model, parallel = pair()
    (x, t), (x2, t2) = batch(), batch()
    for net in (model, parallel):
        (F.cross_entropy(net(x), t) + F.cross_entropy(net(x2), t2)).backward()
    assert_same_grads(model, parallel.module)


def test_frozen_parameters_get_no_gradient_and_may_be_frozen_between_calls() -> None:
    model, parallel = pair()
    x, t = batch()
    for net in (model, parallel.module):
        net.a.weight.requires_grad_(False)
    F.cross_entropy(model(x), t).backward()
    F.cross_entropy(parallel(x), t).backward()
    assert parallel.module.a.weight.grad is None
    assert_same_grads(model, parallel.module)
    for net in (model, parallel.module):
        net.zero_grad()
        net.a.weight.requires_grad_(True)
        net.c.requires_grad_(False)
    F.cross_entropy(model(x), t).backward()
    parallel.train_step(x, t)
    assert_same_grads(model, parallel.module)


def test_a_model_frozen_altogether_runs_forward_and_refuses_to_train() -> None:
    model, parallel = pair()
    x, t = batch()
    parallel.requires_grad_(False)
    assert not parallel(x).requires_grad
    with pytest.raises(UsageError, match="does not depend on any parameter"):
        parallel.train_step(x, t)


def test_inputs_that_require_gradients_get_them() -> None:
    model, parallel = pair()
    x, t = batch(7)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(model(left * 2), t).backward()
    F.cross_entropy(parallel(right * 2), t).backward()
    torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-6)


def test_autograd_grad_gives_gradients_without_touching_grad() -> None:
    model, parallel = pair()
    x, t = batch()
    expected = torch.autograd.grad(F.cross_entropy(model(x), t), list(model.parameters()))
    found = torch.autograd.grad(F.cross_entropy(parallel(x), t), list(parallel.parameters()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in parallel.parameters())


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_two_losses_of_one_call_may_go_backward_one_after_the_other(schedule: str) -> None:
    model, parallel = pair(schedule=schedule)
    x, _ = batch()
    results = []
    for call in (model, parallel):
        own = x.clone().requires_grad_()
        out = call(own)
        by_first = torch.autograd.grad(out[:, :2].mean(), list(call.parameters()), retain_graph=True)
        out[:, 2:].square().mean().backward(retain_graph=True)
        out[:, 0].sum().backward()
        results.append([*by_first, own.grad, *(p.grad for p in call.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_backward_twice_without_retaining_says_what_to_do() -> None:
    _, parallel = pair()
    x, t = batch()
    loss = F.cross_entropy(parallel(x), t) * 2
    parts = parallel(x)
    parts[:, 0].sum().backward()
    with pytest.raises(UsageError, match="second time.*retain_graph=True"):
        parts[:, 1].sum().backward()
    loss.backward()


def test_gradients_of_gradients_are_refused() -> None:
    _, parallel = pair()
    x, t = batch()
    with pytest.raises(UsageError, match="create_graph"):
        torch.autograd.grad(F.cross_entropy(parallel(x), t), list(parallel.parameters()), create_graph=True)


def test_an_optimizer_step_between_forward_and_backward_is_an_error_that_names_the_cause() -> None:
    _, parallel = pair()
    x, t = batch()
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    F.cross_entropy(parallel(x), t).backward()
    loss = F.cross_entropy(parallel(x), t)
    optimizer.step()
    with pytest.raises(ExecutionError, match="modified by an inplace operation"):
        loss.backward()
    F.cross_entropy(parallel(x), t).backward()


def test_recomputation_gives_the_same_numbers_with_dropout_and_batch_norm() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 4)
    )
    other = copy.deepcopy(model)
    x, t = batch()
    parallel = divided(other, (x,), at=["4"], microbatches=4, recompute=("0", "1", "2", "3", "4", "5"))
    for net in (model, parallel):
        torch.manual_seed(4)
        F.cross_entropy(net(x), t).backward()
    assert_same_grads(model, other)
    for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# -- inference and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_gives_the_unsplit_models_outputs(mode: Callable[[], Any]) -> None:
    model, parallel = pair(0.3)
    x, _ = batch(7)
    for _ in range(2):
        with mode():
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            found = parallel(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not found.requires_grad and found.is_inference() == expected.is_inference()
    F.cross_entropy(parallel(x), torch.zeros(7, dtype=torch.long)).backward()


def test_train_and_eval_switch_dropout_and_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    parallel = divided(copy.deepcopy(model), (batch()[0],), at=["3"], microbatches=4)
    for training in (True, False, True, False):
        model.train(training)
        parallel.train(training)
        assert parallel.module.training is training
        x, _ = batch()
        torch.manual_seed(2)
        expected = model(x)
        torch.manual_seed(2)
        torch.testing.assert_close(parallel(x), expected, rtol=1e-5, atol=1e-6)


def test_a_part_that_was_put_in_eval_mode_stays_in_it() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model[1].eval()
    parallel = divided(model, (batch()[0],), at=["2"], microbatches=4)
    x, _ = batch()
    found = parallel(x)
    assert model[1].training is False and parallel.training and copy.deepcopy(parallel).module[1].training is False
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 0


def test_a_configuration_changed_between_calls_is_noticed_and_a_plan_that_no_longer_fits_is_refused() -> None:
    class Config:
        def __init__(self) -> None:
            self.scale = 1.0

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.order = Config(), [0, 1]
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in self.order:
                x = (self.a, self.b)[index](x) * self.config.scale
            return x

    model = Configured()
    parallel = divided(model, (torch.randn(8, 6),), at=["b"], microbatches=2)
    x = torch.randn(8, 6)
    torch.testing.assert_close(parallel(x), model(x), rtol=1e-5, atol=1e-6)
    model.config.scale = 3.0
    torch.testing.assert_close(parallel(x), model(x), rtol=1e-5, atol=1e-6)
    model.order.reverse()
    model.order.append(0)
    with pytest.raises(PlanError, match="another order than the plan's stages"):
        parallel(x)
    model.order[:] = [0, 1]
    torch.testing.assert_close(parallel(x), model(x), rtol=1e-5, atol=1e-6)


def test_autocast_around_the_call_is_the_unsplit_models_autocast() -> None:
    model, parallel = pair()
    x, t = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x), parallel(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    F.cross_entropy(expected.float(), t).backward()
    F.cross_entropy(found.float(), t).backward()
    assert_same_grads(model, parallel.module, rtol=5e-2, atol=5e-3)
    whole = divided(copy.deepcopy(model), (x,), at=["b"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whole(x), model(x)), "one microbatch: bitwise"
    assert whole(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.zero_grad()
        parallel.zero_grad()
        loss = parallel.train_step(x, t)
        wanted = F.cross_entropy(model(x), t)
    wanted.backward()
    torch.testing.assert_close(loss.float(), wanted.detach().float(), rtol=2e-2, atol=2e-2)
    assert_same_grads(model, parallel.module, rtol=5e-2, atol=5e-3)


def test_double_precision_works_after_the_model_was_moved() -> None:
    model, parallel = pair()
    x, t = batch()
    F.cross_entropy(parallel(x), t).backward()
    parallel.zero_grad()
    model.double()
    parallel.double()
    F.cross_entropy(model(x.double()), t).backward()
    F.cross_entropy(parallel(x.double()), t).backward()
    assert_same_grads(model, parallel.module, rtol=1e-10, atol=1e-12)


# -- other calls -------------------------------------------------------------------------------------------------------


def test_other_batch_sizes_and_sequence_lengths_are_captured_once_each() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 6), nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True), nn.Linear(6, 3)
    )
    parallel = divided(model, (torch.randint(0, 9, (4, 5)),), at=["2"], microbatches=2)
    shapes = [(4, 5), (3, 5), (4, 7), (1, 2)]
    for _ in range(2):
        for shape in shapes:
            x = torch.randint(0, 9, shape)
            torch.testing.assert_close(parallel(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(parallel._binder.entries) == len(shapes)


def test_keyword_arguments_and_plain_values_are_part_of_the_call() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, *, bias: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
            h = self.a(x) * scale
            return self.b(h if bias is None else h + bias)

    model = Named()
    parallel = divided(model, (torch.randn(8, 6),), at=["b"], microbatches=2)
    x, bias = torch.randn(8, 6), torch.randn(8, 6)
    for kwargs in ({}, {"scale": 2.0}, {"scale": 3.0, "bias": bias}, {"bias": bias}, {"scale": 2.0}):
        torch.testing.assert_close(parallel(x, **kwargs), model(x, **kwargs), rtol=1e-5, atol=1e-6)


def test_a_parameter_a_module_or_an_attribute_replaced_between_calls_is_noticed() -> None:
    model, parallel = pair()
    net = parallel.module
    x, _ = batch()
    parallel(x)
    net.a.weight = nn.Parameter(torch.randn(12, 6))
    torch.testing.assert_close(parallel(x), net(x), rtol=1e-5, atol=1e-6)
    net.c = nn.Linear(12, 4, bias=False)
    torch.testing.assert_close(parallel(x), net(x), rtol=1e-5, atol=1e-6)
    net.c = nn.Sequential(nn.Linear(12, 4), nn.Tanh())
    torch.testing.assert_close(parallel(x), net(x), rtol=1e-5, atol=1e-6)
    net.drop.p = 0.9
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(parallel(x), expected, rtol=1e-5, atol=1e-6)
    assert all(len(e.census.modules) == len(list(net.modules())) for e in parallel._binder.entries), "old ones are gone"


def test_a_counter_that_forward_moves_on_is_moved_on_and_not_captured_again() -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.steps = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return self.b(self.a(x))

    model = Stepping()
    parallel = divided(model, (torch.randn(4, 6),), at=["b"])
    for _ in range(3):
        parallel(torch.randn(4, 6))
    assert model.steps == 3
    assert len(parallel._binder.entries) == 1


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_dict_has_the_models_own_names_and_loads_strictly_also_inside_another_module() -> None:
    model, parallel = pair()
    assert list(parallel.state_dict()) == list(model.state_dict())
    assert [n for n, _ in parallel.named_parameters()] == [n for n, _ in model.named_parameters()]
    other = Net()
    parallel.load_state_dict(other.state_dict(), strict=True)
    x, _ = batch()
    torch.testing.assert_close(parallel(x), other(x), rtol=1e-5, atol=1e-6)
    outer = nn.ModuleDict({"inner": parallel, "tail": nn.Linear(2, 2)})
    saved = outer.state_dict()
    assert "inner.a.weight" in saved
    outer.load_state_dict({k: torch.zeros_like(v) for k, v in saved.items()}, strict=True)
    assert not any(v.any() for v in parallel.state_dict().values())


def test_deepcopy_and_pickle_give_an_independent_module_with_the_same_numbers() -> None:
    _, parallel = pair()
    x, t = batch()
    expected = parallel(x)
    parallel.eval()
    for other in (copy.deepcopy(parallel), pickle.loads(pickle.dumps(parallel))):
        assert other.training is False and other.plan == parallel.plan
        torch.testing.assert_close(other(x), expected, rtol=1e-6, atol=1e-7)
        other.train_step(x, t)
        assert all(p.grad is None for p in parallel.parameters())


def test_a_plan_survives_pickle_and_deepcopy() -> None:
    _, parallel = pair()
    assert pickle.loads(pickle.dumps(parallel.plan)) == parallel.plan == copy.deepcopy(parallel.plan)


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_parameter_hooks_see_the_whole_gradient_once() -> None:
    model, parallel = pair()
    x, t = batch()
    for run in ("call", "step"):
        seen: dict[str, list[torch.Tensor]] = {"model": [], "parallel": []}
        handles = []
        for label, net in (("model", model), ("parallel", parallel.module)):
            net.zero_grad()
            handles.append(net.a.weight.register_hook(lambda g, s=seen[label]: s.append(g.clone()) or g * 2))
            handles.append(
                net.b.weight.register_post_accumulate_grad_hook(lambda p, s=seen[label]: s.append(p.grad.clone()))
            )
        F.cross_entropy(model(x), t).backward()
        if run == "call":
            F.cross_entropy(parallel(x), t).backward()
        else:
            parallel.train_step(x, t)
        assert len(seen["parallel"]) == len(seen["model"]) == 2
        assert_same_grads(model, parallel.module)
        for handle in handles:
            handle.remove()


def test_forward_hooks_on_submodules_are_honoured() -> None:
    model, parallel = pair()
    x, t = batch()
    parallel(x)
    for net in (model, parallel.module):
        net.b.register_forward_hook(lambda m, args, out: out * 2)
        net.c.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    F.cross_entropy(model(x), t).backward()
    F.cross_entropy(parallel(x), t).backward()
    assert_same_grads(model, parallel.module)


def test_a_forward_hook_that_keeps_activations_sees_real_ones() -> None:
    _, parallel = pair()
    kept: list[torch.Tensor] = []
    parallel.module.b.register_forward_hook(lambda m, args, out: kept.append(out.detach()))
    x, _ = batch()
    parallel(x)
    kept.clear()
    parallel(x)
    rows = torch.cat(kept)
    net = parallel.module
    torch.testing.assert_close(rows, net.b(net.drop(torch.relu(net.norm(net.a(x))))).detach(), rtol=1e-5, atol=1e-6)


def test_full_backward_hooks_on_submodules_are_honoured() -> None:
    model, parallel = pair()
    x, t = batch()
    seen: dict[str, list[torch.Tensor]] = {"model": [], "parallel": []}
    for label, net in (("model", model), ("parallel", parallel.module)):
        net.b.register_full_backward_hook(lambda m, gi, go, s=seen[label]: s.append(go[0].clone()) or (gi[0] * 3,))
        F.cross_entropy((model if label == "model" else parallel)(x), t).backward()
    torch.testing.assert_close(torch.cat(seen["parallel"]), torch.cat(seen["model"]), rtol=1e-4, atol=1e-6)
    assert_same_grads(model, parallel.module)


def test_hooks_on_the_parallel_module_itself_run_as_on_any_module() -> None:
    _, parallel = pair()
    seen: list[torch.Size] = []
    parallel.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    parallel(batch()[0])
    assert seen == [torch.Size([8, 4])]


# -- live --------------------------------------------------------------------------------------------------------------


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 4)
        self.last = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.last = float(h.sum()) + self.last
        for _ in range(int(h.abs().sum()) % 3 + 1):
            h = torch.relu(self.b(h)) if self.last > 0 else torch.tanh(self.b(h))
        return self.c(h)


def test_a_model_that_decides_by_values_trains_with_the_same_numbers() -> None:
    model = Deciding()
    other = copy.deepcopy(model)
    parallel = partita.split(other, (torch.randn(4, 6),), at=["b"], devices=cluster(2), loss_fn=F.cross_entropy)
    for step in range(4):
        x, t = torch.randn(4, 6) * (step + 1), torch.randint(0, 4, (4,))
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        if step % 2:
            found = F.cross_entropy(parallel(x), t)
            found.backward()
        else:
            found = parallel.train_step(x, t)
        assert torch.equal(found.detach(), loss.detach())
        assert_same_grads(model, other, rtol=0, atol=0)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x.transpose(1, 2))


class Changed(nn.Module):
    """A copy is changed, not what it was made from: ``contiguous`` copies a tensor that does not lie as it stands."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().add_(1) * x


def test_a_copy_of_joined_parts_is_a_copy_where_the_unsplit_models_is() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Turned(), Changed(), nn.Linear(4, 3))
    other, x = copy.deepcopy(model), torch.randn(4, 4, 6)
    parallel = partita.split(other, (x,), at=["2"], devices=cluster(2), microbatches=2)
    y = torch.randn(5, 4, 6)
    assert torch.allclose(model(y), parallel(y), rtol=1e-5)
    for module in (model, parallel):
        module(y).sum().backward()
    assert_same_grads(model, other)


class RunAgain(nn.Module):
    """A BatchNorm whose statistics move twice a step: once in forward, once where backward runs it again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.reentrant = nn.BatchNorm1d(6), nn.Linear(6, 6), reentrant

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(self.norm(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.part, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class RunAgainAtTheTop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=False))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["plain", "reentrant", "top"])
def test_statistics_inside_a_checkpoint_move_as_often_as_in_the_unsplit_model(form: str) -> None:
    torch.manual_seed(0)
    layers = (RunAgain(form == "reentrant") for _ in range(2))
    model = RunAgainAtTheTop() if form == "top" else nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 4))
    other, x = copy.deepcopy(model), torch.randn(8, 6)
    parallel = partita.split(other, (x,), at=["c" if form == "top" else "2"], devices=cluster(2))
    for _ in range(2):
        for module in (model, parallel):
            module(x).sum().backward()
    assert_same_grads(model, other)
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine, theirs), name
    assert int(next(b for n, b in model.named_buffers() if n.endswith("tracked"))) == 4


class ReadsItsInput(nn.Module):
    """Python decides by a value of the input, in a part of the model."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
            for _ in range(int(count.sum().item())):
                x = torch.tanh(self.scale(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.part = ReadsItsInput.Part()
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return self.last(self.part(self.first(x), count))


def test_a_value_that_changes_in_every_call_is_right_and_stops_being_captured() -> None:
    model = ReadsItsInput()
    divided = partita.split(model, (torch.randn(4, 6), torch.ones(4)), at=["last"], devices=["cpu", "cpu"])
    for count in range(8):
        x, n = torch.randn(4, 6), torch.full((4,), count / 4)
        assert torch.equal(divided(x, n), model(x, n)), count
    assert len(divided._binder.entries) <= 5
    divided.close()


def test_under_torch_compile_a_divided_model_runs_as_it_is() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(6, 8)
    pm = partita.split(net, (x,), at=["2"], devices=["cpu", "cpu"])

    def step(x: torch.Tensor) -> torch.Tensor:
        return (pm(2.0 * x) + 1.0).square().mean()

    try:
        loss = torch.compile(step, backend="eager")(x)
        loss.backward()
        found = {name: p.grad for name, p in pm.named_parameters()}
        assert torch.allclose(torch.compile(pm, backend="eager")(x), net(x))
    finally:
        pm.close()
        torch.distributions.Distribution.set_default_validate_args(True)  # the compiler leaves them off
    wanted = torch.autograd.grad((net(2.0 * x) + 1.0).square().mean(), list(net.parameters()))
    for (name, _), grad in zip(net.named_parameters(), wanted, strict=True):
        assert torch.allclose(found[name], grad), name


class ChangedInPlace(nn.Module):
    """What layers give is changed in place, as ``nn.ReLU(inplace=True)`` and ``x += positions`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(9, 6), nn.Parameter(torch.randn(5, 6))
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        h += self.places
        return self.b(torch.relu_(self.a(h)))  # type: ignore[no-any-return]


def test_what_a_layer_gives_may_be_changed_in_place_in_every_microbatch() -> None:
    model = ChangedInPlace()
    other, x = copy.deepcopy(model), torch.randint(0, 9, (4, 5))
    parallel = partita.split(other, (x,), at=["b"], devices=cluster(2), microbatches=2)
    for module in (model, parallel):
        module(x).sum().backward()
    assert_same_grads(model, other)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = lambda t: torch.tanh(self.a(t)), lambda t: torch.relu(self.b(t))
        return torch.cond(x.sum() > 0, *branches, (x,))  # type: ignore[no-any-return]


def test_torch_cond_runs_in_a_model_that_runs_live() -> None:
    model = Conditional()
    other, x = copy.deepcopy(model), torch.rand(4, 6)
    parallel = partita.split(other, (x,), at=["b"], devices=cluster(2))
    for module in (model, parallel):
        (module(x).sum() + module(-x).sum()).backward()
    assert_same_grads(model, other)


@pytest.mark.parametrize("schedule", ["zero_bubble", "1f1b"])
def test_stages_in_a_v_give_the_unsplit_models_numbers(schedule: str) -> None:
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))), torch.randn(8, 6)
    names = ("cpu:0", "cpu:1", "cpu:1", "cpu:0")
    stages = tuple(Stage((name,), modules=(str(i),)) for i, name in enumerate(names))
    plan = Plan(stages, devices=names[:2], batch=Batch(8, 4), schedule=schedule)
    assert partita.verify(model, (x,), plan=plan).ok


class Viewed(nn.Module):
    """One sample's gradient of ``tokens`` is a view of the gradient of what they are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens = nn.Linear(4, 8), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.tokens.view(1, 8).expand(len(x), 8)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_gradients_that_autograd_keeps_as_views_of_others_do_not_change_these(schedule: str) -> None:
    torch.manual_seed(0)
    model, x, w = Viewed(), torch.randn(3, 4), torch.randn(3, 8, requires_grad=True)
    parallel = divided(model, (x,), microbatches=3, schedule=schedule)
    found = []
    for call in (model, parallel):
        model.zero_grad()
        w.grad = None
        ((call(x) + w * 2).tanh() ** 2).sum().backward()
        found.append([p.grad for p in (*model.parameters(), w)])
    parallel.close()
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
