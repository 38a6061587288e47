"""What no trace can be made of: seen before one is tried, so that the model runs as it is or is refused with advice."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture.outward import own_hooks
from partita.errors import CaptureError


def unfit(model: nn.Module, inputs: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """Why the model must run as it is; '' where it can be traced. ``own``: its parameters and buffers.

    Raises CaptureError where it cannot run either.
    """
    lazy = [name for name, tensor in own.items() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise CaptureError(
            f"the parameter {lazy[0]} has no shape yet (a lazy module). Call the model once, or give it its sizes, "
            "before dividing it."
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            return f"{path or 'the model'} is a ScriptModule, whose parameters nothing can stand in for"
    if own_hooks(model):
        return "the model itself has forward hooks of yours"
    if tc.global_hooks():
        return "hooks for all modules are registered (torch.nn.modules.module)"
    for name, tensor in (*inputs.items(), *own.items()):
        if not ordinary(tensor):
            return f"{name} is {'a nested' if tensor.is_nested else f'a {tensor.layout}'} tensor"
    return ""


def ordinary(tensor: torch.Tensor) -> bool:
    """Whether the tensor has shape and strides, as a graph's must."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
