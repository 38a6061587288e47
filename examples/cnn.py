"""The three-layer CNN that the examples divide, written as anybody would, and a check against the unsplit model."""

from __future__ import annotations

import copy

import torch
from torch import nn


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1)
        self.conv2 = nn.Conv2d(64, 128, 3, 1, 1)
        self.fc = nn.Linear(128 * 28 * 28, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.fc(torch.flatten(x, 1))


def data(batch: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 28, 28, generator=generator), torch.randint(10, (batch,), generator=generator)


def unsplit(model: nn.Module) -> nn.Module:
    """An ordinary copy to compare with; make it before the model is divided."""
    return copy.deepcopy(model)


def same_numbers(model: nn.Module, plain: nn.Module, loss: torch.Tensor, x: torch.Tensor, target: torch.Tensor) -> None:
    """Compare the gradients in ``model`` and its ``loss`` with an ordinary step of ``plain``; print the result."""
    expected = nn.functional.cross_entropy(plain(x), target)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale + 1e-6)
    print(f"same numbers: loss {loss.item():.6f}, {len(gradients)} gradients equal to the unsplit model's")
