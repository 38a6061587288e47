"""The demonstration's data: found on any machine or made on the spot, nothing is downloaded."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from partita.errors import UsageError

Batch = tuple[torch.Tensor, torch.Tensor]

TONES = 16
SAMPLE_RATE = 4000
FRAME = 40  # samples that the speech model's convolutions turn into one frame


def library_text(limit: int = 2_000_000) -> str:
    """The Python standard library's sources, the first ``limit`` characters, ASCII only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(root.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= limit:
            break
    text = "".join(c for c in text[:limit] if c == "\n" or " " <= c <= "~")
    if len(text) < 10_000:
        raise UsageError(
            f"the Python standard library's sources are not at {root}, so there is no text to train on; "
            "run the demonstration without the text model: partita demo --only digits,speech"
        )
    return text


def text_batches(text: str, *, batch: int, context: int, seed: int = 0) -> Iterator[Batch]:
    """Endless (characters, next characters), each (batch, context)."""
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([letters[c] for c in text])
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(codes) - context - 1, (batch,), generator=generator)
        rows = torch.stack([codes[s : s + context + 1] for s in starts.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def digit_batches(*, batch: int, seed: int = 0) -> Iterator[Batch]:
    """Endless (images (batch, 1, 8, 8), digits) of scikit-learn's 1,797 handwritten digits."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed; pip install 'partita[demo]', "
            "or run the demonstration without them: partita demo --only text,speech"
        ) from None
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(images), (batch,), generator=generator)
        yield images[rows], labels[rows]


def tone_batches(*, batch: int, seconds: float = 0.64, parts: int = 4, seed: int = 0) -> Iterator[Batch]:
    """Endless (audio (batch, samples), tone of each frame): a few tones and chirps one after another, with noise."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(seconds * SAMPLE_RATE)
    each = samples // parts
    while True:
        tone = torch.randint(TONES, (batch, parts), generator=generator)
        hertz = 150.0 * 2 ** (tone / 6)
        chirp = 1 + 0.1 * (torch.rand(batch, parts, generator=generator) - 0.5)
        bend = torch.linspace(0, 1, each)
        frequency = hertz[..., None] * (1 + (chirp[..., None] - 1) * bend)
        phase = 2 * torch.pi * (frequency.flatten(1) / SAMPLE_RATE).cumsum(1)
        audio = torch.sin(phase) + 0.1 * torch.randn(batch, phase.shape[1], generator=generator)
        yield audio, tone.repeat_interleave(each // FRAME, 1)
