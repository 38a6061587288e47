"""Whole: a model's weights in one safetensors file under its own names, from and to any plan, tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from partita.checkpoint import folder, tensor_file
from partita.checkpoint.holdings import Held, Holdings, holdings, unloadable, unsavable
from partita.checkpoint.ranks import Ranks
from partita.checkpoint.saving import told
from partita.errors import CheckpointError

Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # rank, offsets and sizes of a box


def export_safetensors(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write parameters and persistent buffers to one file, from every rank; rank 0 holds one whole tensor at a time.

    Tied weights are stored once, under their first name; the file's metadata lists the other names. The file appears
    when it is whole. Raises CheckpointError where a tensor or the disk refuses.
    """
    ranks, here = Ranks.of(model), holdings(model)
    ranks.agree("this model cannot be exported:", unsavable(here.tensors))
    entries, places = _layout(here, ranks)
    target = Path(path)
    if not ranks.first:
        for entry in entries:
            for rank, offsets, _ in places[entry.key]:
                if rank == ranks.rank:
                    part = _box(here.tensors[entry.key], offsets).to(ranks.wire).contiguous()
                    with ranks.waiting("rank 0 to write the file"):
                        dist.send(part, 0, group=ranks.group)
    else:
        scratch = target.with_name(f".{target.name}.partial")
        with told(f"cannot write '{target}'"), ranks.working(f"the writing of '{target}'"):
            try:
                tensor_file.write(scratch, entries, lambda number: _whole(entries[number], here, places, ranks),
                                  metadata={"tied": json.dumps(dict(here.ties))} if here.ties else {},
                                  moved=ranks.moved)  # fmt: skip
                os.replace(scratch, target)
                folder.sync(target.absolute().parent)
            finally:
                scratch.unlink(missing_ok=True)
    ranks.gather(None)


def _layout(here: Holdings, ranks: Ranks) -> tuple[list[tensor_file.Entry], dict[str, list[Place]]]:
    """Every rank's tensors in the order they are written, and on which ranks the boxes of each are."""
    mine = {
        name: (held.dtype, held.shape, [(b.offsets, tuple(b.tensor.shape)) for b in held.boxes if b.mine])
        for name, held in here.tensors.items()
    }
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    places: dict[str, list[Place]] = {}
    for rank, theirs in enumerate(ranks.gather(mine)):
        for name, (dtype, shape, boxes) in theirs.items():
            kinds[name] = dtype, shape
            places.setdefault(name, []).extend((rank, *box) for box in boxes)
    entries = tensor_file.ordered([tensor_file.Entry(n, d, s, 0) for n, (d, s) in kinds.items()])
    return [tensor_file.Entry(e.key, e.dtype, e.shape, i) for i, e in enumerate(entries)], places


def _whole(entry: tensor_file.Entry, here: Holdings, places: dict[str, list[Place]], ranks: Ranks) -> torch.Tensor:
    """On rank 0: one tensor from all ranks' boxes."""
    boxes = places[entry.key]
    if [(rank, sizes) for rank, _, sizes in boxes] == [(0, entry.shape)]:
        return here.tensors[entry.key].boxes[0].tensor
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    for rank, offsets, sizes in boxes:
        if rank == 0:
            part = _box(here.tensors[entry.key], offsets)
        else:
            part = torch.empty(sizes, dtype=entry.dtype, device=ranks.wire)
            with ranks.waiting(f"'{entry.key}' of rank {rank}"):
                dist.recv(part, rank, group=ranks.group)
        narrowed(whole, offsets, sizes).copy_(part)
    return whole


def _box(held: Held, offsets: tuple[int, ...]) -> torch.Tensor:
    return next(b.tensor for b in held.boxes if b.offsets == offsets and b.mine)


def narrowed(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dim, (begin, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, begin, length)
    return tensor


@dataclass(frozen=True, slots=True)
class _Found:
    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_safetensors(
    path: str | os.PathLike[str], model: nn.Module, *, strict: bool = True, cast: bool = False
) -> tuple[str, ...]:
    """Load weights from a safetensors file, or from a directory of them; each rank reads what it holds.

    Names are the model's own; of tied weights any of their names will do. ``strict`` False: what only one side has is
    left as it is and returned. ``cast`` True: values are converted to the model's dtypes. Raises CheckpointError, with
    the model as it was, naming every difference.
    """
    ranks, here = Ranks.of(model), holdings(model)
    files = ranks.first_says(lambda: _files(Path(path)))
    with told(f"'{path}' could not be read"):
        found = _contents(files)
    names = {name: (name, *(n for n, first in here.ties.items() if first == name)) for name in here.tensors}
    source = {name: next((n for n in several if n in found), None) for name, several in names.items()}
    known = {n for mine in ranks.gather({n for several in names.values() for n in several}) for n in mine}
    missing = [f"missing: the model has '{name}', the file has not" for name, n in source.items() if n is None]
    unexpected = [f"unexpected: the file has '{name}', the model has not" for name in found if name not in known]
    wrong = unloadable(here.tensors)
    for name, held in here.tensors.items():
        saved = found.get(source[name] or "")
        if saved is not None and saved.shape != held.shape:
            wrong.append(f"shape: '{name}' is {held.shape} in the model, {saved.shape} in the file")
        elif saved is not None and saved.dtype != tensor_file.CODES[held.dtype] and not cast:
            wrong.append(f"dtype: '{name}' is {tensor_file.CODES[held.dtype]} in the model, {saved.dtype} in the file; "
                         "cast=True converts it")  # fmt: skip
    loose = missing + unexpected
    ranks.agree(f"'{path}' does not fit the model; nothing was loaded:", wrong + (loose if strict else []))
    with torch.no_grad():
        for file in files:
            _read(file, here, {name: n for name, n in source.items() if n is not None and found[n].file == file})
    return tuple(dict.fromkeys(line for mine in ranks.gather(loose) for line in mine))


def _files(path: Path) -> tuple[Path, ...]:
    files = tuple(sorted(path.glob("*.safetensors"))) if path.is_dir() else (path,)
    if not files or not all(file.is_file() for file in files):
        raise CheckpointError(f"'{path}' is no safetensors file and no directory of such files")
    return files


def _contents(files: Sequence[Path]) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                    part = file.get_slice(name)
                    if name in found:
                        raise CheckpointError(f"'{name}' is in both '{found[name].file}' and '{path}'")
                    found[name] = _Found(path, tuple(part.get_shape()), str(part.get_dtype()))
        except SafetensorError as error:
            raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}") from error
    return found


def _read(path: Path, here: Holdings, source: dict[str, str]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, stored in source.items():
            held = here.tensors[name]
            for box in held.boxes:
                box.tensor.detach().copy_(_part(file, stored, held, box.offsets, tuple(box.tensor.shape)))


def _part(file: Any, key: str, held: Held, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    if sizes == held.shape:
        return file.get_tensor(key)  # type: ignore[no-any-return]
    box = tuple(slice(b, b + n) for b, n in zip(offsets, sizes, strict=True))
    return file.get_slice(key)[box]  # type: ignore[no-any-return]
