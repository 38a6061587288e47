"""Saving: a model's, an optimizer's and the generators' state as one checkpoint, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from partita.checkpoint import folder, randomness
from partita.checkpoint import optimizer as optimizers
from partita.checkpoint.dcp import BoxSavePlanner, Writer
from partita.checkpoint.holdings import extra_states, holdings, unsavable
from partita.checkpoint.manifest import File, Manifest, Saved
from partita.checkpoint.ranks import Ranks
from partita.errors import CheckpointError, PartitaError, UsageError

VALUES = "values.pt"


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    extra: Any = None,
    keep: int | None = None,
) -> Path:
    """Save into the folder ``path`` as ``step-<step>``; returns that directory. Every rank calls it.

    ``model``: a ParallelModule under any plan, or a plain module. Saved are its parameters, persistent buffers and
    ``get_extra_state``; the optimizer's state and options; torch's, Python's and NumPy's random generators; ``step``;
    ``extra``: plain values and tensors of yours, such as ``scheduler.state_dict()``. ``keep``: how many checkpoints to
    leave in the folder, the newest; None: all.

    When it returns, the checkpoint is on disk and ``latest``. Interrupted at any moment it leaves the folder's other
    checkpoints, and ``latest``, as they were. Raises CheckpointError or UsageError, with nothing written, where a value
    cannot be saved; CheckpointError where the disk refuses.
    """
    if keep is not None and keep < 1:
        raise UsageError(f"keep must be at least 1 (this checkpoint), got {keep}; None keeps all")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UsageError(f"step must be a whole number, not negative; got {step!r}")
    ranks, here = Ranks.of(model), holdings(model)
    parts = optimizers.apart(optimizer, here, alone=ranks.alone) if optimizer is not None else None
    problems = unsavable(here.tensors) + (parts.problems if parts is not None else [])
    ranks.agree("this state cannot be saved:", problems)
    everyone = ranks.gather((parts.without_tensors() if parts is not None else None, here.ties))
    summaries = [summary for summary, _ in everyone if summary is not None]
    values = {"extra": extra, "modules": extra_states(here), "optimizer": _merged(summaries)}
    small = {f"random-{ranks.rank:05d}.pt": packed(randomness.states(), "the random generators' states")}
    root = Path(path)

    def prepare() -> tuple[str, str]:
        small[VALUES] = packed(values, "extra, a module's extra state, or an optimizer's options")
        return _prepare(root, step)

    partial, final = ranks.first_says(prepare)

    def describe(tensors: dict[str, Saved], files: dict[str, File]) -> Manifest:
        index = optimizers.index(summaries) if summaries else None
        ties = {name: first for _, known in everyone for name, first in known.items()}
        versions = {name: version(name) for name in ("torch", "safetensors")}
        return Manifest(step, here.name, ranks.size, tensors, files, ties, index, versions)

    held = {f"model.{name}": tensor for name, tensor in here.tensors.items()}
    held.update(parts.tensors if parts is not None else {})
    writer = Writer(root / partial, root / final, ranks=ranks, small=small, describe=describe)
    try:
        with told(f"the checkpoint could not be written to '{root}'"), quiet(), ranks.waiting("the checkpoint's files"):
            dcp_save(
                dict(held), storage_writer=writer, planner=BoxSavePlanner(), process_group=ranks.group,
                no_dist=ranks.alone,
            )  # fmt: skip
    except BaseException:
        if ranks.first:
            shutil.rmtree(root / partial, ignore_errors=True)
        raise
    ranks.first_says(lambda: folder.tidy(root, keep))
    return root / final


def _prepare(root: Path, step: int) -> tuple[str, str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot save into '{root}': {error.strerror}; give a folder") from None
    return folder.names(root, step)


def _merged(summaries: list[optimizers.Parts]) -> dict[str, Any]:
    """Every rank's options and values, for the file of values."""
    if not summaries:
        return {}
    values: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for summary in summaries:
        values.update(summary.values)
        for g, (names, options) in enumerate(summary.groups):
            if g == len(groups):
                groups.append(options)
            elif names and repr(options) != repr(groups[g]):
                raise UsageError(
                    f"param group {g} has other options on one rank than on another: {options} and {groups[g]}; "
                    "set them alike on every rank"
                )
    return {"values": values, "groups": groups, "others": summaries[0].others}


def packed(values: Any, what: str) -> bytes:
    """Values as torch saves them. Raises UsageError unless ``torch.load(weights_only=True)`` reads them back."""
    out = io.BytesIO()
    try:
        torch.save(values, out)
        out.seek(0)
        torch.load(out, weights_only=True, map_location="cpu")
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{what} must be plain values and tensors, which load without running code; found others ({reason}). "
            "Save a state_dict() instead of the object"
        ) from error
    return out.getvalue()


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """DCP's and the system's errors inside as CheckpointError, naming the rank; partita's own as they are."""
    try:
        yield
    except CheckpointException as error:
        failures: Mapping[int, Any] = error.failures
        rank, (cause, *_) = next(iter(failures.items()))
        if isinstance(cause, PartitaError):
            raise cause from error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        place = f"rank {rank}: " if dist.is_initialized() else ""
        raise CheckpointError(f"{what}: {place}{type(cause).__name__}: {cause}") from error
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DCP warns of one process alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
