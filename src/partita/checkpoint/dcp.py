"""DCP: torch.distributed.checkpoint's planners over boxes of tensors, and its storage as safetensors files + manifest.

DCP decides which rank writes which box, refuses boxes that overlap or leave gaps, finds what to read where saved and
wanted boxes differ, and carries one rank's failure to all. Pickled metadata stays out: see docs/decisions/0018.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from partita.checkpoint import folder, manifest, tensor_file
from partita.checkpoint.holdings import Held
from partita.checkpoint.manifest import Chunk, File, Manifest, Saved
from partita.checkpoint.ranks import ALONE, Ranks
from partita.errors import CheckpointError

_KINDS = {"model.": "model", "optimizer.state.": "optimizer"}  # by a key's beginning: which files it goes into


class BoxSavePlanner(DefaultSavePlanner):
    """Writes the boxes that are this rank's to write. State dict: DCP key -> Held."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, held in self.state_dict.items():
            for number, box in enumerate(held.boxes):
                if box.mine:
                    items.append(_write_item(key, held, number))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        held: Held = self.state_dict[index.fqn]
        return next(b.tensor for b in held.boxes if b.mine and torch.Size(b.offsets) == index.offset)


def _write_item(key: str, held: Held, number: int) -> WriteItem:
    box = held.boxes[number]
    offsets = torch.Size(box.offsets)
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, box.tensor.shape), TensorProperties(held.dtype), torch.Size(held.shape)
    )
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)


class BoxLoadPlanner(LoadPlanner):
    """Reads into every box, from whatever boxes were saved. State dict: DCP key -> Held."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, held in self.state_dict.items():
            saved = self.metadata.state_dict_metadata[key]
            assert isinstance(saved, TensorStorageMetadata)
            wanted = [ChunkStorageMetadata(torch.Size(b.offsets), b.tensor.shape) for b in held.boxes]
            items += create_read_items_for_chunk_list(key, saved, wanted)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("nothing is saved as bytes")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        held: Held = self.state_dict[read_item.dest_index.fqn]
        tensor = held.boxes[read_item.dest_index.index or 0].tensor.detach()
        for dim, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, begin, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a box went, and the file as a whole; what a rank tells the coordinator of each."""

    name: str
    file: File
    chunk: Chunk | None = None


class Writer(StorageWriter):
    """A checkpoint as a directory of safetensors files, one per rank and kind, under a manifest; published when whole.

    ``small``: this rank's other files by name. ``describe(tensors, files)``: the manifest, on rank 0.
    """

    def __init__(
        self,
        partial: Path,
        final: Path,
        *,
        ranks: Ranks,
        small: Mapping[str, bytes],
        describe: Callable[[dict[str, Saved], dict[str, File]], Manifest],
    ) -> None:
        self.partial, self.final, self.ranks, self.small, self.describe = partial, final, ranks, small, describe

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.partial.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with self.ranks.working("the writing of its part of a checkpoint"):
            for name, data in self.small.items():
                folder.write(self.partial / name, data)
                results.append(WriteResult(MetadataIndex(name), len(data), _Stored(name, File.of(data))))
            for beginning, kind in _KINDS.items():
                items = [item for item in plan.items if item.index.fqn.startswith(beginning)]
                if items:
                    file = f"{kind}-{self.ranks.rank:05d}.safetensors"
                    results += self._write_tensors(file, beginning, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_tensors(
        self, name: str, beginning: str, items: list[WriteItem], planner: SavePlanner
    ) -> Iterable[WriteResult]:
        entries, chunks = [], []
        for number, item in enumerate(items):
            data = item.tensor_data
            assert data is not None
            offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
            key = item.index.fqn.removeprefix(beginning)
            if sizes != tuple(data.size):
                key += f"[{', '.join(f'{o}:{o + s}' for o, s in zip(offsets, sizes, strict=True))}]"
            entries.append(tensor_file.Entry(key, data.properties.dtype, sizes, number))
            chunks.append(Chunk(offsets, sizes, name, key))

        def values(number: int) -> torch.Tensor:
            found = planner.resolve_data(items[number])
            assert isinstance(found, torch.Tensor)
            return found

        file = tensor_file.write(self.partial / name, entries, values, moved=self.ranks.moved)
        return [
            WriteResult(item.index, entry.num_bytes, _Stored(name, file, chunk))
            for item, entry, chunk in zip(items, entries, chunks, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = [(result.index.fqn, result.storage_data) for mine in results for result in mine]
        chunks: dict[str, list[Chunk]] = {}
        for key, where in stored:
            if where.chunk is not None:
                chunks.setdefault(key, []).append(where.chunk)
        tensors = {}
        for key, saved in metadata.state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata)
            dtype = str(saved.properties.dtype).removeprefix("torch.")
            tensors[key] = Saved(dtype, tuple(saved.size), tuple(sorted(chunks[key], key=lambda c: c.offsets)))
        files = {where.name: where.file for _, where in sorted(stored, key=lambda s: s[1].name)}
        with self.ranks.working("the completion of a checkpoint"):
            folder.write(self.partial / manifest.NAME, manifest.dumps(self.describe(tensors, files)))
            folder.publish(self.partial, self.final)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # never chosen by path: only partita.checkpoint.save knows what else belongs to a checkpoint


class Reader(StorageReader):
    """Gives a checkpoint to ``torch.distributed.checkpoint.load(state_dict, storage_reader=Reader(path))``.

    Keys are ``model.<name>`` and ``optimizer.state.<name>.<key>``: ``{"model": model.state_dict()}`` as a state dict.
    ``path``: a checkpoint or the folder it is the latest of. Raises CheckpointError where a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, checked: Manifest | None = None, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = folder.resolve(path), ranks
        self.manifest = checked if checked is not None else manifest.read(self.path)
        if checked is None:
            problems = manifest.damage(self.path, self.manifest.files)
            if problems:
                raise CheckpointError(f"the checkpoint '{self.path}' is damaged:", tuple(problems))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors = {
            key: TensorStorageMetadata(
                TensorProperties(getattr(torch, saved.dtype)),
                torch.Size(saved.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in saved.chunks],
            )
            for key, saved in self.manifest.tensors.items()
        }
        return Metadata(dict(tensors), storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._chunks = {
            MetadataIndex(key, chunk.offsets): chunk
            for key, saved in self.manifest.tensors.items()
            for chunk in saved.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            chunk = self._chunks[item.storage_index]
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for name, wanted in by_file.items():
            working = self.ranks.working("the reading of a checkpoint")
            with working, safe_open(self.path / name, framework="pt") as file:
                for item, chunk in wanted:
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(_read(file, chunk, item))
                    planner.commit_tensor(item, target)
                    self.ranks.moved()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return (Path(checkpoint_id) / manifest.NAME).is_file()


def _read(file: Any, chunk: Chunk, item: ReadItem) -> torch.Tensor:
    """The part of a saved box that is wanted; no more of the file is touched."""
    lengths = tuple(item.lengths)
    if lengths == chunk.sizes:
        return file.get_tensor(chunk.key)  # type: ignore[no-any-return]
    box = tuple(slice(b, b + n) for b, n in zip(item.storage_offsets, lengths, strict=True))
    return file.get_slice(chunk.key)[box]  # type: ignore[no-any-return]
