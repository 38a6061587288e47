"""The demonstration: its data is real, its models are what it says, and a wrong number makes it fail."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from partita.demo import data, models, run


def parameters(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_the_text_is_the_standard_librarys_sources() -> None:
    text = data.library_text(200_000)
    assert "def __init__(self" in text and "import " in text
    x, y = next(data.text_batches(text, batch=4, context=16))
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1]), "the target is the next character"


def test_the_tones_are_where_their_labels_say() -> None:
    audio, tone = next(data.tone_batches(batch=3))
    frames = audio.shape[1] // data.FRAME
    assert tone.shape == (3, frames)
    piece = audio[0, : audio.shape[1] // 4]
    heard = torch.fft.rfft(piece).abs().argmax().item() * data.SAMPLE_RATE / len(piece)
    assert heard == pytest.approx(150.0 * 2 ** (tone[0, 0].item() / 6), rel=0.06)


def test_the_models_have_the_size_and_output_that_is_promised() -> None:
    gpt = models.CharGPT(96)
    assert 10 < parameters(gpt) < 11.5
    assert gpt(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 96)
    assert gpt.head.weight is gpt.tokens.weight
    assert models.DigitViT()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    audio, tone = next(data.tone_batches(batch=2))
    assert models.ToneReader(data.TONES)(audio).shape == (*tone.shape, data.TONES)


def test_an_unknown_model_name_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as said:
        run.main(["--only", "text,pictures"])
    assert stopped.value.code == 2
    assert "'pictures' is not one of text, digits, speech" in said.getvalue()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.drop(torch.relu(self.up(x))))
        return y


def small() -> tuple[nn.Module, Iterator[data.Batch]]:
    def batches() -> Iterator[data.Batch]:
        while True:
            yield torch.randn(8, 8), torch.randint(4, (8,))

    return Small(), batches()


def test_it_shows_plan_proof_prediction_and_summary_and_ends_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "WORKLOADS", (run.Workload("small", "a small model", small),))
    assert run.main(["--steps", "4", "--only", "small"]) == 0
    said = capsys.readouterr().out
    for part in ("1. the plan", "2. the same numbers", "3. predicted and measured", "Summary", "all numbers are"):
        assert part in said


def test_a_wrong_gradient_is_found_and_makes_it_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from partita import ParallelModule

    ordinary = ParallelModule.train_step

    def wrong(self: ParallelModule, *args: torch.Tensor) -> torch.Tensor:
        loss = ordinary(self, *args)
        gradient = self.module.get_parameter("down.bias").grad
        assert gradient is not None
        gradient.mul_(1.01)
        return loss

    monkeypatch.setattr(ParallelModule, "train_step", wrong)
    monkeypatch.setattr(run, "WORKLOADS", (run.Workload("small", "a small model", small),))
    assert run.main(["--steps", "2", "--only", "small"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERENT NUMBERS" in said and "down.bias" in said
