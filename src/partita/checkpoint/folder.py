"""Folder: checkpoints side by side in one directory, each there whole or not at all.

A checkpoint is written under a name beginning with a dot, synced to disk, then renamed; a rename is atomic. The file
``latest`` holds the newest one's name and is replaced the same way. One program at a time saves into a folder.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from partita.checkpoint.manifest import NAME
from partita.errors import CheckpointError

LATEST = "latest"
_PARTIAL = ".partial-"
_STEP = re.compile(r"step-(\d+)(?:-(\d+))?$")


def complete(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _STEP.match(path.name)
        if match and (path / NAME).is_file():
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for *_, path in sorted(found)]


def names(root: Path, step: int) -> tuple[str, str]:
    """(name to write under, final name) of a new checkpoint. A step that is there already is not overwritten: the new
    one is ``step-00000010-2``.
    """
    base = f"step-{step:08d}"
    final, count = base, 1
    while (root / final).exists():
        count += 1
        final = f"{base}-{count}"
    return f"{_PARTIAL}{final}-{uuid.uuid4().hex[:8]}", final


def publish(partial: Path, final: Path) -> None:
    """Give a written checkpoint its name, then point ``latest`` at it. Every step is on disk before the next begins."""
    sync(partial)
    os.rename(partial, final)
    sync(final.parent)
    pointer = final.parent / f"{_PARTIAL}{LATEST}"
    write(pointer, f"{final.name}\n".encode())
    os.replace(pointer, final.parent / LATEST)
    sync(final.parent)


def tidy(root: Path, keep: int | None) -> None:
    """Remove what interrupted saves left behind and all but the newest ``keep`` checkpoints (None: all stay)."""
    if keep is not None:
        pointed = latest(root)
        for old in complete(root)[:-keep]:
            if old != pointed:
                os.rename(old, root / f"{_PARTIAL}{old.name}-{uuid.uuid4().hex[:8]}")  # never half there
    for left in root.glob(f"{_PARTIAL}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that ``load(root)`` would load; None where nothing was saved yet.

    Raises CheckpointError where the folder's ``latest`` names a checkpoint that is not there.
    """
    folder = Path(root)
    try:
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = folder / name
    if not _STEP.match(name) or not (found / NAME).is_file():
        there = ", ".join(f"'{p}'" for p in complete(folder)) or "none"
        raise CheckpointError(
            f"'{folder / LATEST}' names {name[:80]!r}, which is not a checkpoint in '{folder}'; "
            f"whole ones there: {there}; load one of them by its own path"
        )
    return found


def resolve(path: str | os.PathLike[str]) -> Path:
    """A checkpoint's own directory, or the folder it is the latest of. Raises CheckpointError where there is none."""
    given = Path(path)
    if (given / NAME).is_file():
        return given
    found = latest(given)
    if found is not None:
        return found
    there = ", ".join(f"'{p.name}'" for p in complete(given))
    if there:
        raise CheckpointError(f"'{given}' has no '{LATEST}' file; load one of its checkpoints by its own path: {there}")
    if given.is_dir() and _STEP.match(given.name):
        raise CheckpointError(f"'{given}' is not a whole checkpoint: its {NAME} is missing; load an earlier one")
    what = "has no checkpoint" if given.is_dir() else "does not exist" if not given.exists() else "is a file"
    raise CheckpointError(
        f"'{given}' {what}; give the folder that was saved into, or one of its directories (step-...)"
    )


def write(path: Path, data: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Wait until the disk has a directory's entries."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
