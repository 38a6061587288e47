"""Models by name: published sizes, no weight allocated, real modules, and the way from a name to a plan."""

from __future__ import annotations

import json

import pytest
import torch

from partita import cli, models
from partita.capture import capture
from partita.errors import UsageError
from partita.factory import load
from partita.models import GPT, GPTSize, Llama, LlamaSize

PUBLISHED = {  # billions of parameters
    "gpt2": 0.124, "gpt2-xl": 1.558, "gpt3-175b": 174.6, "gpt-39b": 39.1, "gpt-1t": 1008.0, "llama-7b": 6.74,
    "llama-65b": 65.3, "llama2-70b": 68.98, "llama3-8b": 8.03, "llama-405b": 405.9,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_their_published_number_of_parameters(name: str) -> None:
    model, _ = models.make(name)
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert count == pytest.approx(PUBLISHED[name], rel=0.005)
    assert all(p.is_meta for p in model.parameters())


def test_every_name_says_where_its_size_is_published() -> None:
    assert all("20" in models.describe(name) for name in models.NAMES)


@pytest.mark.parametrize("fused", [True, False])
def test_gpt_is_causal_and_fused_attention_changes_nothing(fused: bool) -> None:
    torch.manual_seed(0)
    model = GPT(GPTSize(2, 32, 4, vocabulary=50, positions=16, fused=fused)).eval()
    tokens = torch.randint(50, (2, 16))
    later = tokens.clone()
    later[:, 9:] = 0
    assert torch.allclose(model(tokens)[:, :9], model(later)[:, :9], atol=1e-5)
    other = GPT(GPTSize(2, 32, 4, vocabulary=50, positions=16, fused=not fused)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.allclose(model(tokens, tokens), other(tokens, tokens), atol=1e-5)


def test_llama_is_causal_and_groups_of_one_query_are_plain_heads() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaSize(2, 32, 4, 2, 64, vocabulary=50)).eval()
    tokens = torch.randint(50, (2, 12))
    later = tokens.clone()
    later[:, 7:] = 1
    assert torch.allclose(model(tokens)[:, :7], model(later)[:, :7], atol=1e-5)
    assert not torch.allclose(model(tokens)[:, 7:], model(later)[:, 7:], atol=1e-3)


def test_llama_turns_by_relative_position_only() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaSize(1, 32, 4, 4, 64, vocabulary=50)).eval()
    cos, sin = model.angles(torch.zeros(1, 8, dtype=torch.int64))
    from partita.models.llama import rotate

    q, k = torch.randn(8), torch.randn(8)
    scores = (rotate(q.expand(8, 8), cos, sin) @ rotate(k.expand(8, 8), cos, sin).T).detach()
    assert torch.allclose(scores[0, 3], scores[2, 5], atol=1e-5)


def test_a_large_model_is_captured_without_a_weight() -> None:
    graph = capture(*models.make("llama3-8b", 2, 512)).graph
    assert graph.batch == 2
    assert sum(op.flops for op in graph.ops) == pytest.approx(2 * 7.5e9 * 2 * 512, rel=0.05)


def test_names_are_read_in_any_case_and_misspelt_ones_are_corrected() -> None:
    model, args, _ = load("Llama-405B", 3, 128)
    assert isinstance(model, Llama)
    assert args[0].shape == (3, 128)
    with pytest.raises(UsageError, match="llama-405b"):
        load("lama-405b")
    with pytest.raises(UsageError, match="2048 learned positions"):
        load("gpt3-175b", 1, 4096)


def test_the_command_plans_a_name_for_a_described_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "gpt2", "--cluster", "2x8xA100", "--batch", "64", "--seq", "512", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["batch"]["size"] == 64
    assert plan["predicted"]["step_seconds"] > 0
    assert len(plan["devices"]) == 16


def test_what_cannot_fit_ends_in_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "gpt3-6.7b", "--cluster", "2xT4", "--batch", "8", "--seq", "128"]) == 3
    said = capsys.readouterr().err
    assert "fit" in said and "times as many devices" in said
