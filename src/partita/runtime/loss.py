"""Loss: what a training step computes of a model: its loss function's value, or the loss that it returns itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class WithLoss:
    """``forward`` of a training step: the model, then the loss."""

    def __init__(self, module: Callable[..., Any], loss_fn: Callable[..., torch.Tensor] | None) -> None:
        self.module, self.loss_fn = module, loss_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.loss_fn is None:
            output = self.module(*args, **kwargs)
            if isinstance(output, torch.Tensor):
                return output
            return output["loss"] if isinstance(output, Mapping) and "loss" in output else output[0]
        return self.loss_fn(self.module(*args[:-1], **kwargs), args[-1])
