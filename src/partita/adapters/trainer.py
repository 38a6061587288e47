"""Trainer: ``transformers.Trainer`` over a divided model, in one process.

The Trainer keeps the user's own model, so that saving, ``config`` and column names work as always; only the calls
that compute go through the divided one, whose parameters are the same.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import ParallelMode

from partita.api import parallelize
from partita.errors import UsageError
from partita.plan import Plan
from partita.runtime.front import LazyParallel
from partita.runtime.module import ParallelModule


class ParallelTrainer(Trainer):
    """``Trainer`` whose forward, loss and backward run divided: ``ParallelTrainer(model, args, devices=[...], ...)``.

    ``model``: a ParallelModule, or a model that is divided at its first batch over ``devices`` (``plan`` None: found
    then). Everything else as in Trainer. Raises UsageError for what would go around the division: several processes,
    label smoothing, ``auto_find_batch_size`` and Trainer's own sharding.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        devices: Any = "auto",
        plan: Plan | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        settings = kwargs.get("args", args[0] if args else None)
        if settings is not None:
            _refuse(settings)
            settings._n_gpu = min(settings.n_gpu, 1)  # otherwise Trainer replicates the model with DataParallel
        if isinstance(model, ParallelModule):
            self.parallel: ParallelModule | LazyParallel = model
        else:
            self.parallel = LazyParallel(
                model, lambda module, given, named: parallelize(module, given, named, devices=devices, plan=plan)
            )
        super().__init__(self.parallel.module, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(self.parallel, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().prediction_step(self.parallel, inputs, *args, **kwargs)


def _refuse(settings: Any) -> None:
    problems = []
    if settings.parallel_mode == ParallelMode.DISTRIBUTED:
        problems.append("several processes: call partita.parallelize in a loop of your own")
    if settings.label_smoothing_factor:
        problems.append("label_smoothing_factor: smooth inside the model's loss")
    if settings.auto_find_batch_size:
        problems.append("auto_find_batch_size: give per_device_train_batch_size, or parallelize(memory=...)")
    if settings.fsdp or settings.deepspeed:
        problems.append("fsdp or deepspeed: the plan says how the model is divided")
    if problems:
        raise UsageError("ParallelTrainer does not go together with " + "; nor with ".join(problems))
