"""The divided model has the unsplit model's numbers: outputs, every named gradient, buffers.

Each care has its own test, over stages {1, 2, 3} x microbatches {1, 4} x schedules, and a second one that takes the
care out and sees the numbers go wrong: without that, the first would prove nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dividing import Case, assert_same, cases, cluster, differences, divided, divided_hard, training_step
from torch import nn

import partita
from partita.capture import capture
from partita.errors import PartitaError
from partita.plan import Plan, Stage
from partita.runtime import codegen
from partita.runtime.bind import Entry
from partita.runtime.local import Local
from partita.runtime.module import ParallelModule
from partita.runtime.progress import StepState
from partita.runtime.worker import WAYS, Worker

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def wrong(*args: Any, **kwargs: Any) -> bool:
    """Whether the numbers of the hard case are wrong, or it cannot run at all."""
    try:
        found = differences(*args, only=divided_hard, **kwargs)
    except (PartitaError, RuntimeError, KeyError, TypeError, IndexError):
        return True
    return not all(comparison.ok for comparison in found.values())


def only_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out: the sum over the devices that share a parameter."""
    whole = Local.parameter_grads

    def first(self: Local, state: StepState) -> dict[str, torch.Tensor]:
        seen: set[str] = set()
        for device in state.devices.values():
            for name, alias in device.aliases.items():
                if name in seen:
                    alias.grad = None
                seen.add(name)
        return whole(self, state)

    monkeypatch.setattr(Local, "parameter_grads", first)


# -- tied weights ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.emb(ids))))


def ids(rows: int = 8) -> torch.Tensor:
    return torch.randint(0, 11, (rows, 5))


def test_tied_weights_get_the_summed_gradient_and_stay_one_parameter() -> None:
    model = Tied()
    assert_same(model, (ids(),), at=["mid", "head"], fresh=(ids(),))
    assert model.head.weight is model.emb.weight


def test_tied_weights_would_be_wrong_with_one_stages_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    only_first_device(monkeypatch)
    assert wrong(Tied(), (ids(),), at=["mid", "head"])


# -- batch norm --------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3)
        self.norm2 = nn.BatchNorm2d(6, momentum=None)
        self.c = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.a(x)))
        return self.c(F.relu(self.norm2(self.b(h))).mean((2, 3)))


def test_batch_norm_uses_the_statistics_of_the_whole_batch() -> None:
    # in float64: before an average pool a batch norm magnifies float32 rounding beyond any tolerance worth the name
    inputs = [(torch.randn(8, 3, 6, 6, dtype=torch.float64),) for _ in range(2)]
    assert_same(Normed().double(), inputs[0], at=["norm", "b"], fresh=inputs[1])


def test_batch_norm_per_microbatch_would_be_wrong() -> None:
    model = Normed()
    assert wrong(model, (torch.randn(8, 3, 6, 6),), at=["norm", "b"], batch_norm="per_microbatch")


# -- dropout -----------------------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.drop = nn.Dropout(p)
        self.b = nn.Linear(16, 16)
        self.drop2 = nn.Dropout(p)
        self.c = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(torch.relu(self.a(x)))
        return self.c(self.drop2(torch.relu(self.b(h))))


def test_dropout_with_one_seed_gives_the_same_numbers_for_any_division_and_recomputation() -> None:
    model, x = Dropped(), torch.randn(8, 6)
    assert_same(model, (x,), at=["b", "drop2"], fresh=(torch.randn(8, 6),))
    assert_same(model, (x,), at=["b", "drop2"], fresh=(torch.randn(8, 6),), recompute=("a", "b", "c", "drop", "drop2"))


def test_dropout_leaves_the_random_generator_where_the_unsplit_model_leaves_it() -> None:
    model, x = Dropped(), torch.randn(8, 6)
    torch.manual_seed(5)
    model(x)
    expected = torch.rand(3)
    parallel = divided(model, (x,), at=["b"], microbatches=4)
    parallel(x)
    torch.manual_seed(5)
    parallel(x)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_drawn_anew_in_each_microbatch_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WAYS["once"]

    def anew(self: Worker, step: Any, inlet: Any) -> torch.Tensor:
        return torch.empty_like(whole(self, step, inlet)).bernoulli_(0.6).div_(0.6)

    monkeypatch.setitem(WAYS, "once", anew)
    assert wrong(Dropped(), (torch.randn(8, 6),), at=["b", "drop2"])


class Branches(nn.Module):
    """Two stages that wait for nothing but the input, and draw by their own values; the first is the slow one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(*(nn.Linear(6, 6) for _ in range(40)))
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.softmax(self.a(x), -1)
        u = torch.multinomial(h.detach(), 1)
        g = torch.softmax(self.b(x), -1)
        v = torch.multinomial(g.detach(), 1)
        return self.c(h * u + g * v)


def test_draws_that_depend_on_values_happen_in_the_models_order_whichever_stage_is_ready_first() -> None:
    assert_same(Branches(), (torch.randn(8, 6),), at=["b", ":mul"], bitwise=False)


def test_draws_by_whoever_is_ready_first_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from partita.runtime import route

    monkeypatch.setattr(route, "random_turns", lambda graph, program: {})
    model, x = Branches(), torch.randn(8, 6)
    found = differences(model, (x,), at=["b", ":mul"], only=lambda case: case.stages == 3)
    assert not all(comparison.ok for comparison in found.values())


def test_a_plan_whose_stages_draw_by_turns_is_refused() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u = torch.multinomial(torch.softmax(self.a(x), -1).detach(), 1)
            v = torch.multinomial(torch.softmax(self.b(x), -1).detach(), 1)
            w = torch.multinomial(torch.softmax(self.c(x), -1).detach(), 1)
            return self.a(x) * u + self.b(x) * v + self.c(x) * w

    x = torch.randn(8, 6)
    graph = capture(Turns(), (x,)).graph
    draws = [i for i, op in enumerate(graph.ops) if op.random]
    assert len(draws) == 3
    later = {op.name for op in graph.ops[draws[0] + 1 : draws[1] + 1]}
    stage_of = {op.name: int(op.name in later or i > draws[2]) for i, op in enumerate(graph.ops)}
    stages = tuple(
        Stage((f"cpu:{k}",), ops=tuple(name for name, stage in stage_of.items() if stage == k)) for k in range(2)
    )
    parallel = ParallelModule(Turns(), Plan(stages, devices=("cpu:0", "cpu:1")), cluster(2))
    with pytest.raises(PartitaError, match="draw random numbers by turns"):
        parallel(x)


# -- uneven batches ----------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.b = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.b(torch.relu(self.a(x)))
        return F.cross_entropy(y, target), y.pow(2).mean(), y


def labelled(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.randint(0, 5, (rows,))
    target[::3] = -100
    return torch.randn(rows, 6), target


@pytest.mark.parametrize("rows", [7, 10, 5])
def test_a_batch_that_does_not_divide_is_neither_padded_nor_dropped_and_means_are_weighted(rows: int) -> None:
    assert_same(WithLoss(), labelled(rows), at=["b"], fresh=labelled(rows))


def test_a_batch_smaller_than_the_microbatches_runs() -> None:
    assert_same(WithLoss(), labelled(8), at=["b"], fresh=labelled(3))


def test_means_of_uneven_microbatches_without_weights_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = codegen.rewritten

    def unweighted(function: Any, rewrite: Any) -> Any:
        if rewrite.kind == "weighted":
            return lambda share, *args, **kwargs: function(*args, **kwargs) / 4
        return plain(function, rewrite)

    monkeypatch.setattr(codegen, "rewritten", unweighted)
    assert wrong(WithLoss(), labelled(7), at=["b"])


def test_a_mean_over_the_labels_present_in_each_microbatch_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = codegen.rewritten

    def own_total(function: Any, rewrite: Any) -> Any:
        if rewrite.kind == "sum_over_total":
            return lambda wholes, *args, **kwargs: function(*args, **kwargs) / 4
        return plain(function, rewrite)

    monkeypatch.setattr(codegen, "rewritten", own_total)
    x, target = torch.randn(8, 6), torch.tensor([1, 2, -100, -100, 3, -100, 0, 1])
    assert wrong(WithLoss(), (x, target), at=["b"])


# -- structures --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None
    name: str = "answer"


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 2)

    def forward(self, batch: dict[str, Any], *, extra: Answer | None = None, flag: bool = True) -> Any:
        x, mask = batch["x"], batch["inner"][0]
        h = torch.relu(self.a(x)) * mask
        g = self.b(h)
        if extra is not None:
            g = g + extra.logits
        y = self.c(g)
        return {"answer": Answer(y, (h, g)), "nested": [(y.sum(-1), None), {"flag": flag}], "nothing": None}


def structured(rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch = {"x": torch.randn(rows, 4), "inner": [torch.rand(rows, 1) > 0.3, None]}
    return (batch,), {"extra": Answer(torch.randn(rows, 8), ()), "flag": False}


def test_none_dict_dataclass_and_nested_values_go_in_and_come_out_as_they_are() -> None:
    model = Structured()
    args, kwargs = structured(8)
    assert_same(model, args, kwargs, at=["b", "c"])
    expected = model(*args, **kwargs)
    for case in cases():
        parallel = divided(model, args, kwargs, at=["b", "c"][: case.stages - 1], microbatches=case.microbatches)
        got = parallel(*args, **kwargs)
        assert type(got) is dict and list(got) == list(expected)
        assert type(got["answer"]) is Answer and got["answer"].loss is None and got["answer"].name == "answer"
        assert type(got["answer"].hidden) is tuple
        assert got["nested"][0][1] is None and got["nested"][1] == {"flag": False} and got["nothing"] is None


def test_outputs_put_in_another_order_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from partita.capture import Captured

    whole = Captured.unflatten
    monkeypatch.setattr(
        Captured, "unflatten", lambda self, outputs, *rest: whole(self, [*outputs[1:], outputs[0]], *rest)
    )
    args, kwargs = structured(8)
    assert wrong(Structured(), args, kwargs, at=["b", "c"])


# -- skips -------------------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        g = torch.tanh(self.b(h)) + h
        return self.c(g) * h + x


def test_a_value_used_by_several_later_stages_gets_the_gradients_of_all_of_them() -> None:
    assert_same(Skips(), (torch.randn(8, 6),), at=["b", "c"], fresh=(torch.randn(8, 6),), bitwise=False)


def test_a_skips_gradient_taken_instead_of_added_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(self: Worker, key: tuple[str, int], grad: torch.Tensor) -> None:
        self.mine.grads[key] = grad

    monkeypatch.setattr(Worker, "add_grad", instead)
    model, x = Skips(), torch.randn(8, 6)
    found = differences(model, (x,), at=["b", "c"], only=lambda case: case == Case(3, 4, "1f1b"))
    assert not all(comparison.ok for comparison in found.values())


# -- shared modules ----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.mid = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.block(x))
        return self.last(self.block(torch.relu(self.mid(h))))


def test_a_module_called_twice_on_two_stages_gets_both_gradients() -> None:
    assert_same(Shared(), (torch.randn(8, 6),), at=["mid", "last"], fresh=(torch.randn(8, 6),))


def test_a_shared_modules_gradient_of_one_stage_alone_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    only_first_device(monkeypatch)
    assert wrong(Shared(), (torch.randn(8, 6),), at=["mid", "last"])


# -- mutated buffers ---------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.a(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.b(h - self.average)


def test_buffers_that_forward_changes_end_as_the_unsplit_models_do() -> None:
    assert_same(Counting(), (torch.randn(8, 6),), at=["b"], fresh=(torch.randn(8, 6),))


def test_buffers_changed_on_a_copy_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Entry.bound

    def copied(self: Entry, leaves: list[torch.Tensor]) -> Any:
        bound = whole(self, leaves)
        bound.given.update({name: bound.given[name].clone() for name, _, _ in self.buffers})
        return bound

    monkeypatch.setattr(Entry, "bound", copied)
    assert wrong(Counting(), (torch.randn(8, 6),), at=["b"])


# -- integers and booleans ---------------------------------------------------------------------------------------------


class Discrete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.a(x)
        positive = h > 0
        best = h.argmax(-1)
        y = self.b(torch.where(positive & keep, h, h * 0.1))
        return y.gather(1, index), best + index[:, 0], positive, y.argmax(-1)


def discrete(rows: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, 6), torch.randint(0, 6, (rows, 2)), torch.rand(rows, 6) > 0.5


def test_integer_and_bool_tensors_cross_stages_and_come_out_exactly() -> None:
    assert_same(Discrete(), discrete(8), at=["b"], fresh=discrete(8))


def test_integers_treated_as_differentiable_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from partita.runtime import route

    plain = route._inlets

    def every(*args: Any, **kwargs: Any) -> Any:
        return tuple(dataclasses.replace(inlet, leaf=True) for inlet in plain(*args, **kwargs))

    monkeypatch.setattr(route, "_inlets", every)
    assert wrong(Discrete(), discrete(8), at=["b"])


# -- outputs that are views, unused, inputs, parameters ----------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.idle = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.a(x)
        unused = self.idle(h)
        y = self.b(h) * self.scale
        del unused
        return y, y[:, 2:], h.view(-1, 2, 3), x, x[:, :2], self.scale, h, self.scale * 2


def test_outputs_that_are_views_inputs_or_parameters_and_results_nobody_uses() -> None:
    model = Odd()
    x = torch.randn(8, 6, requires_grad=True)
    assert_same(model, (x,), at=["b"], bitwise=False)
    parallel = divided(model, (x,), at=["b"], microbatches=4)
    out = parallel(x)
    assert out[3] is x and out[5] is model.scale, "what is handed through is the same object"
    out[0].sum().backward()
    assert model.idle.weight.grad is None, "no gradient appears where the unsplit model has none"


def test_an_output_whose_gradient_does_not_enter_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Local.seed
    seen: list[str] = []

    def first_only(self: Local, state: Any, name: str, grad: torch.Tensor) -> None:
        if not seen:
            whole(self, state, name, grad)
        seen.append(name)

    monkeypatch.setattr(Local, "seed", first_only)
    assert wrong(Odd(), (torch.randn(8, 6),), at=["b"])


# -- the step, with the loss inside ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Dropped, Skips, Shared], ids=lambda m: m.__name__)
def test_train_step_gives_the_plain_steps_loss_and_gradients(model: type[nn.Module]) -> None:
    net, x = model(), torch.randn(7, 6)
    target = torch.randint(0, 2, (7,))
    loss, grads = training_step(net, (x, target), F.cross_entropy)
    for case in cases(2):
        parallel = divided(
            net, (x,), at=["c" if hasattr(net, "c") else "last"][: case.stages - 1], loss_fn=F.cross_entropy,
            microbatches=case.microbatches, schedule=case.schedule,
        )  # fmt: skip
        net.zero_grad()
        torch.manual_seed(3)
        got = parallel.train_step(x, target)
        parallel.close()
        torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6, msg=f"{case} {name}")


# -- kinds of tensors and ops found by a survey of other people's models -----------------------------------------------


def few(case: Case) -> bool:
    return case.schedule == "1f1b"


class Spectrum(nn.Module):
    """A Fourier layer: complex weights, products written into a slice of zeros."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(5, dtype=torch.cfloat))
        self.c = nn.Linear(3, 3, dtype=torch.cfloat)
        self.last = nn.Linear(8, 2)
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.rfft(self.inner(x))
        if self.mix == "slice":
            out = torch.zeros(x.shape[0], 5, dtype=torch.cfloat)
            out[:, :3] = self.c(y[:, :3]) * self.w[:3]
        else:
            out = torch.cat([self.c(y[:, :3]), y[:, 3:]], 1) * self.w
        return self.last(torch.fft.irfft(out, n=8))


@pytest.mark.parametrize(("mix", "at"), [("slice", "c"), ("slice", ":fft_irfft"), ("cat", "last")])
def test_complex_weights_and_values_written_into_zeros_get_their_gradients(mix: str, at: str) -> None:
    assert_same(Spectrum(mix), (torch.randn(8, 8),), at=[at], bitwise=False, only=few)


def test_the_gradient_of_a_put_off_complex_weight_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_complex", lambda self: False)
    assert wrong(Spectrum("cat"), (torch.randn(8, 8),), at=["last"])


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = self.b(torch.tanh(self.a(x)))
        return {"max": h.max(-1), "top": h.topk(2), "parts": (h, None)}


def test_results_of_max_and_topk_come_back_as_what_they_were() -> None:
    model, x = Sorted(), torch.randn(8, 6)
    assert_same(model, (x,), at=["b"], only=few)
    parallel = divided(model, (x,), at=["b"])
    assert type(parallel(x)["max"]) is torch.return_types.max
    assert torch.equal(parallel(x)["top"].indices, model(x)["top"].indices)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, sparse=True)
        self.mid = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mid(self.emb(ids).mean(1))


def test_sparse_gradients_are_compared_and_stay_sparse() -> None:
    model = Sparse()
    assert_same(model, (ids(),), at=["mid"], bitwise=False, only=few)
    parallel = divided(model, (ids(),), at=["mid"], microbatches=4)
    parallel(ids()).sum().backward()
    assert model.emb.weight.grad is not None and model.emb.weight.grad.layout == torch.sparse_coo


class Latent(nn.Module):
    """A variational autoencoder: distributions whose arguments follow from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(6, 8)
        self.dec = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, scale = self.enc(x).chunk(2, -1)
        z = torch.distributions.Normal(mean, scale.exp())
        return self.dec(z.rsample()), z.log_prob(torch.zeros(4))


def test_distributions_make_a_graph_without_the_checks_of_their_arguments() -> None:
    model, x = Latent(), torch.randn(8, 6)
    captured = capture(model, (x,))
    assert not captured.live and any("validate_args" in note for note in captured.graph.notes)
    with pytest.raises(ValueError, match="Expected parameter"):
        torch.distributions.Normal(torch.tensor(0.0), torch.tensor(-1.0))  # checks are back
    assert_same(model, (x,), at=["dec"], only=few)


def test_values_made_without_gradient_from_weights_cross_stages() -> None:
    """Power iteration: views of a weight under no_grad still say that they require a gradient."""
    norm = nn.utils.spectral_norm
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    assert_same(model, (torch.randn(8, 6),), at=["2", "4"], only=few)


class Stateful(nn.Module):
    """In eval mode the blocks write their part of a state, which a plan made in training knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = torch.zeros(3, *x.shape) if not self.training else None
        for k, layer in enumerate((self.a, self.b, self.c)):
            x = torch.tanh(layer(x))
            if state is not None:
                state[k] = x
        return (x,) if state is None else (x, state)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_memory_changed_in_place_across_the_stages_of_a_plan_made_for_another_mode(microbatches: int) -> None:
    model = Stateful()
    parallel = divided(model, (torch.randn(6, 4),), at=["b", "c"], microbatches=microbatches)
    model.eval()
    x = torch.randn(6, 4)
    torch.testing.assert_close(parallel(x), model(x), rtol=1e-5, atol=1e-6)


def test_modules_inside_vmap_run_where_it_runs() -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def energy(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x))).sum()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.vmap(torch.func.grad(self.energy))(x).square().sum(1)

    model = Penalty()
    parallel = partita.split(model, (torch.randn(6, 4),), at=["b"], devices=["cpu", "cpu"])
    x = torch.randn(6, 4)
    torch.testing.assert_close(parallel(x), model(x))
    parallel.close()
