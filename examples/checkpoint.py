"""Checkpoints: trained under one plan, interrupted, resumed under another; the losses are as if it had gone on."""

import tempfile

import torch
from cnn import CNN, data
from torch import nn

import partita

torch.manual_seed(0)
x, target = data()
folder = tempfile.mkdtemp()


def divided(at: list[str]) -> tuple[partita.ParallelModule, torch.optim.Optimizer]:
    devices = ["cpu"] * (len(at) + 1)
    pm = partita.split(CNN(), (x,), at=at, devices=devices, loss_fn=nn.functional.cross_entropy)
    return pm, torch.optim.AdamW(pm.parameters(), lr=1e-3)


def train(pm: partita.ParallelModule, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(pm.train_step(x, target).item())
        optimizer.step()
    return losses


pm, optimizer = divided(["conv2"])
train(pm, optimizer, 2)
where = partita.checkpoint.save(folder, pm, optimizer, step=2, extra={"note": "before the interruption"})
uninterrupted = train(pm, optimizer, 2)
print(f"saved {where.name}: {', '.join(sorted(p.name for p in where.iterdir()))}")

pm, optimizer = divided(["conv2", "fc"])  # three stages now, and other weights
restored = partita.checkpoint.load(folder, pm, optimizer)
resumed = train(pm, optimizer, 2)
assert resumed == uninterrupted
print(f"resumed after step {restored.step} ({restored.extra['note']}): losses equal, bit by bit")

damaged = where / "model-00000.safetensors"
content = bytearray(damaged.read_bytes())
content[-1] ^= 1
damaged.write_bytes(content)
try:
    partita.checkpoint.load(folder, pm, optimizer)
except partita.CheckpointError as error:
    print(f"one bit changed: {error}")
