"""Loading: a checkpoint into a model and an optimizer under any plan; everything is checked before anything changes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from partita.checkpoint import folder, manifest, randomness
from partita.checkpoint import optimizer as optimizers
from partita.checkpoint.dcp import BoxLoadPlanner, Reader
from partita.checkpoint.holdings import Held, Holdings, holdings, unloadable
from partita.checkpoint.manifest import Manifest
from partita.checkpoint.ranks import Ranks
from partita.checkpoint.saving import VALUES, quiet, told


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """What a checkpoint held besides the model and the optimizer: the ``step`` and ``extra`` it was saved with."""

    step: int
    extra: Any
    path: Path


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    random_state: bool = True,
) -> Restored:
    """Load a checkpoint (``step-...``), or the latest in a folder. Every rank calls it.

    ``model``: whatever its plan, ``optimizer``: made from its parameters, in the same param groups; None loads the
    weights alone. ``random_state``: also put the random generators back: each rank's own where as many ranks saved it,
    rank 0's otherwise. Values are the saved ones bit by bit; memory beyond the optimizer's new state is one tensor's.

    Raises CheckpointError, with model and optimizer as they were, where a file is damaged or missing, or where names,
    shapes, dtypes or param groups differ: every difference, a line each.
    """
    ranks, here = Ranks.of(model), holdings(model)
    found = ranks.first_says(lambda: folder.resolve(path))
    table = ranks.first_says(lambda: manifest.read(found))
    problems = manifest.damage(found, _share(table.files, ranks))
    ranks.agree(f"the checkpoint '{found}' is damaged; nothing was loaded. Load an earlier one:", problems)
    wrong = unloadable(here.tensors) + differences(here, table, ranks)
    if optimizer is not None:
        wrong += optimizers.misfits(optimizer, here, table, alone=ranks.alone)
        wrong += _without_place(optimizer, here, table, ranks)
    ranks.agree(f"the checkpoint '{found}' (of {table.model}) does not fit; nothing was loaded:", wrong)
    values = _unpacked(found / VALUES)
    wanted: dict[str, Held] = {}
    for name, held in here.tensors.items():
        key = f"model.{table.ties.get(name, name)}"
        before = wanted[key].boxes if key in wanted else ()
        wanted[key] = Held(held.dtype, held.shape, before + held.boxes)
    made = None
    if optimizer is not None:
        made = optimizers.fresh(optimizer, here, table, values["optimizer"]["values"])
        wanted.update(made.tensors)
    with told(f"'{found}' could not be read"), quiet(), torch.no_grad(), ranks.waiting("the checkpoint to be read"):
        reader = Reader(found, checked=table, ranks=ranks)
        dcp_load(
            dict(wanted), storage_reader=reader, planner=BoxLoadPlanner(), process_group=ranks.group,
            no_dist=ranks.alone,
        )  # fmt: skip
    if optimizer is not None and made is not None:
        optimizers.install(optimizer, made, values["optimizer"]["groups"], values["optimizer"]["others"])
    for prefix, module in here.extra.items():
        module.set_extra_state(values["modules"][prefix])
    if random_state:
        own = ranks.rank if table.ranks == ranks.size else 0
        randomness.restore(_unpacked(found / f"random-{own:05d}.pt"))
    return Restored(table.step, values["extra"], found)


def check(path: str | os.PathLike[str]) -> Manifest:
    """Read every file of a checkpoint (or of a folder's latest) and compare with its manifest, which is returned.

    Raises CheckpointError naming each damaged file.
    """
    return Reader(path).manifest


def _share(files: Mapping[str, manifest.File], ranks: Ranks) -> dict[str, manifest.File]:
    """The files this rank checks: about the same number of bytes for each rank."""
    loads = [0] * ranks.size
    mine = {}
    for name, file in sorted(files.items(), key=lambda f: (-f[1].num_bytes, f[0])):
        rank = loads.index(min(loads))
        loads[rank] += file.num_bytes
        if rank == ranks.rank:
            mine[name] = file
    return mine


def differences(here: Holdings, table: Manifest, ranks: Ranks) -> list[str]:
    """Names missing from the checkpoint, unexpected in it, and shapes and dtypes that differ, a line each."""
    saved = {key.removeprefix("model."): s for key, s in table.tensors.items() if key.startswith("model.")}
    everyone = ranks.gather((tuple(here.tensors), dict(here.ties)))
    names = dict.fromkeys(name for mine, _ in everyone for name in mine)
    tied = {name: first for _, ties in everyone for name, first in ties.items()}
    read = {table.ties.get(name, name) for name in names}
    problems = []
    for name in names:
        if table.ties.get(name, name) not in saved:
            near = difflib.get_close_matches(name, saved, n=1, cutoff=0.8)
            problems.append(f"missing: the model has '{name}', the checkpoint has not"
                            + (f" (it has '{near[0]}')" if near else ""))  # fmt: skip
    for name in saved:
        if name not in read:
            why = f"the model ties it to '{tied[name]}'" if name in tied else "the model has not"
            problems.append(f"unexpected: the checkpoint has '{name}' on its own, {why}")
    for name, held in here.tensors.items():
        found = saved.get(table.ties.get(name, name))
        if found is None:
            continue
        dtype = str(held.dtype).removeprefix("torch.")
        if found.shape != held.shape:
            problems.append(f"shape: '{name}' is {held.shape} in the model, {found.shape} in the checkpoint")
        elif found.dtype != dtype:
            problems.append(f"dtype: '{name}' is {dtype} in the model, {found.dtype} in the checkpoint: "
                            f"convert the model first, with .to(torch.{found.dtype})")  # fmt: skip
    return problems


def _without_place(optimizer: torch.optim.Optimizer, here: Holdings, table: Manifest, ranks: Ranks) -> list[str]:
    """Parameters that only the saved optimizer has, on no rank of this one."""
    mine = {table.ties.get(name, name) for group in optimizer.param_groups for name in optimizers.names_of(group, here)}
    known = set().union(*ranks.gather(mine))
    groups = table.optimizer.parameters if table.optimizer is not None else ()
    return [
        f"the checkpoint's optimizer has '{name}', this one has not"
        for names in groups
        for name in names
        if name not in known
    ]


def _unpacked(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")
