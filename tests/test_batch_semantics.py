"""Captured models run on parts of the batch, as their layouts say, against the same models run whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import batch_reference
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from batch_reference import run_parts, run_whole

from partita.capture import Captured, capture, decode_symbol, resolve
from partita.graph import Op, Symbol
from partita.program import Split
from partita.runtime.kernels import OWN
from partita.sharding.batch import BatchLayouts, layouts

torch.set_num_threads(1)


def _symbol(value: Symbol) -> Any:
    return torch.device("cpu") if value.text.startswith("device") else decode_symbol(value)


batch_reference.symbol = _symbol


def _resolve(captured: Captured) -> Callable[[Op], Callable[..., Any]]:
    def find(op: Op) -> Callable[..., Any]:
        return OWN.get(op.target) or captured.opaques.get(op.target) or resolve(op.target)

    return find


def _leaves(captured: Captured, model: nn.Module, inputs: list[torch.Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tensor in captured.graph.tensors:
        if tensor.role == "parameter":
            found[tensor.name] = model.get_parameter(tensor.path).detach().clone().requires_grad_()
        elif tensor.role == "buffer":
            found[tensor.name] = model.get_buffer(tensor.path).clone()
        elif tensor.role == "constant":
            found[tensor.name] = captured.constants[tensor.name]
    found.update(zip(captured.inputs, [x.clone() for x in inputs], strict=True))
    return found


def same_numbers(make: Callable[[], nn.Module], inputs: Callable[[int], tuple[torch.Tensor, ...]]) -> BatchLayouts:
    """Asserts that outputs, every gradient and every buffer agree for several ways to part a batch of seven."""
    torch.manual_seed(0)
    model = make().train()
    captured = capture(model, inputs(4), {})
    graph = captured.graph
    assert not captured.live, captured.live
    found = layouts(graph)
    fresh = captured.flatten(inputs(7))
    assert fresh is not None

    def step(run: Callable[[dict[str, Any]], dict[str, Any]]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        leaves = _leaves(captured, model, fresh)
        values = run(leaves)
        outputs = [values[name] for name in graph.outputs]
        torch.manual_seed(2)
        loss = sum((out * torch.rand(out.shape)).sum() for out in outputs if out.requires_grad)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        state = {k: v.grad if v.requires_grad else v for k, v in leaves.items()}
        return [out.detach() for out in outputs], {k: v for k, v in state.items() if v is not None}

    outputs, state = step(lambda leaves: run_whole(graph, leaves, 7, _resolve(captured)))
    for parts in ((7,), (3, 4), (1, 1, 5), (1,) * 7):
        outputs2, state2 = step(lambda leaves, p=parts: run_parts(graph, found, leaves, p, _resolve(captured)))
        torch.testing.assert_close(outputs2, outputs, rtol=1e-4, atol=1e-5)
        assert state2.keys() == state.keys()
        for name in state:
            torch.testing.assert_close(
                state2[name], state[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    return found


class Gpt(nn.Module):
    """Token and position embeddings, causal attention, dropout, tied head, loss with ignored targets."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.dropout = dropout

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size, length = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(length))
        q, k, v = (t.view(size, length, 2, 4).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(size, length, 8)), self.dropout, self.training)
        logits = self.head(x)
        target = torch.where(ids[:, 1:] == 3, -100, ids[:, 1:])
        return logits, F.cross_entropy(logits[:, :-1].reshape(-1, 11), target.reshape(-1))


def tokens(size: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 11, (size, 6)),)


def rows(size: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(size, 5, 8),)


def test_a_language_model_with_dropout_tied_weights_and_ignored_targets_divides() -> None:
    found = same_numbers(Gpt, tokens)
    assert not found.couplings and found.microbatchable


def test_encoder_layers_whose_attention_merges_samples_inside_the_steps_divide() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
    found = same_numbers(lambda: nn.Sequential(layer, nn.Linear(8, 2)), rows)
    assert not found.couplings


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x)[0][:, -1])


def test_a_recurrent_net_divides() -> None:
    assert not same_numbers(Lstm, rows).couplings


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.mix(x).softmax(-1)[:, 0].squeeze()


def test_a_class_token_expanded_to_the_batch_divides() -> None:
    assert not same_numbers(ClassToken, rows).couplings


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)).relu())


def test_batch_norm_in_training_stays_exact_by_running_on_the_whole_batch() -> None:
    found = same_numbers(Norms, rows)
    assert [c.op for c in found.couplings] == ["norm:batch_norm"] and found.microbatchable
    assert found.phase["a:linear"] == "split"


class LastToken(nn.Module):
    """Pools each row at its own place, scales by how many real tokens the batch holds, shifts with in-place writes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shifted = ids.new_zeros(ids.shape)
        shifted[:, 1:] = ids[:, :-1].clone()
        shifted[:, 0] = 1
        x = self.head(self.tokens(shifted))
        pooled = x[torch.arange(ids.shape[0]), ids.argmax(-1)]
        real = ids != 0
        return pooled, (x.sum(-1) * real).sum() / real.sum()


def test_row_lookups_shifted_inputs_and_masked_means_divide() -> None:
    found = same_numbers(LastToken, tokens)
    assert not found.couplings and Split(0, 1) in found.of.values()


class Contrast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(40, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = F.normalize(self.net(x.flatten(1)), dim=-1)
        return F.cross_entropy(z @ z.t(), torch.arange(x.shape[0]))


def test_a_contrastive_loss_keeps_its_encoder_divided_and_its_pairs_whole() -> None:
    found = same_numbers(Contrast, rows)
    assert found.phase["net:linear"] == "split" and len(found.couplings) == 1


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_a_mean_loss_is_the_weighted_sum_of_the_parts_means(loss: str) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(F, loss)(self.net(x), x) * 2.0

    found = same_numbers(WithLoss, rows)
    assert not found.couplings and list(found.weighted)


class CountsSamples(nn.Module):
    """The number of samples as a value, and in a size that is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        h = self.a(x) * x.new_full((n, 1), n)
        return self.b(h.repeat_interleave(2, 0, output_size=2 * n))


def test_a_number_of_samples_is_the_whole_batchs_as_a_value_and_the_parts_as_a_size() -> None:
    same_numbers(CountsSamples, lambda n: (torch.randn(n, 6),))
